#!/usr/bin/env bash
# What a machine with a GPU that is lent for fifteen minutes answers, in two calls of 240 and 380 seconds:
#
#     benchmarks/gpu.sh pack     here, without a GPU: builds both libraries, compiles Triton's kernels, gathers rivals,
#                                and prints the two commands and what they carry
#     benchmarks/gpu.sh call1    there: versions, tests, accuracy, our own cases at the first shape
#     benchmarks/gpu.sh call2    there: other shapes, rivals, parts of a step, memcheck, racecheck
#
# Between the calls give the machine back and read log.txt: what call1 finds wrong is worth more than call2's figures.
# `call1 --only own-8192-4096-128256` runs one step again.
#
# Everything lands in $OUT (default runs/gpu): results.jsonl, to which every measurement is appended as it is made, and
# log.txt. For the page: cp $OUT/results.jsonl benchmarks/results/<card>-<date>.jsonl, then python -m benchmarks.page.
# Needs neither git nor a network. SDPO_GPU_STUB=1 rehearses a call without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
call="${1:-}"
case "$call" in call1 | call2 | pack) ;; *) sed -n '2,14p' "$0" >&2; exit 2 ;; esac
python="${PYTHON:-python3}"
export OUT="${OUT:-runs/gpu}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
packed=build/gpu

if [ "$call" = pack ]; then exec "$python" -m benchmarks.gpu_pack; fi
mkdir -p "$OUT"

# the commit that was packed: there may be no git
if [ -z "${SDPO_COMMIT:-}" ] && [ -f $packed/commit ]; then
  SDPO_COMMIT="$(cat $packed/commit)" && export SDPO_COMMIT
fi

# Triton's cache names its files by their whole path, so it lies where it was made
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/sdpo-triton}"
if [ -d $packed/triton ]; then mkdir -p "$TRITON_CACHE_DIR" && cp -r $packed/triton/. "$TRITON_CACHE_DIR"; fi

# rivals, unpacked: they need nothing that is not there
rivals=/tmp/sdpo-rivals
if [ "${SDPO_GPU_STUB:-}" != 1 ]; then
  for packed_rival in benchmarks/wheels/*; do # the pattern itself if there are none
    case "$packed_rival" in
      *.whl) "$python" -m zipfile -e "$packed_rival" $rivals ;;
      *.tar.xz) "$python" -m tarfile -e "$packed_rival" $rivals ;;
    esac
  done
  export PYTHONPATH="$PYTHONPATH:$rivals"
fi
exec "$python" -m benchmarks.gpu "$@"
