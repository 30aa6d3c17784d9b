#!/usr/bin/env bash
# One call on a machine with a CUDA device: builds the CUDA library where none was carried along, runs the tests marked
# `gpu` and compute-sanitizer, then the head benchmark at the five shapes of the design and the accuracy at one.
# Works from a bare checkout without network or hypothesis (hence --noconftest); everything lands in $OUT (default benchmarks/results/gpu). Under
# nine minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-benchmarks/results/gpu}" PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$OUT"
status=0
# rivals that lie here as wheels (benchmarks/wheels, carried along): TRL, Liger, CCE; they need nothing that is not there
if compgen -G "benchmarks/wheels/*.whl" >/dev/null; then
  python3 -m pip install -q --no-index --no-deps --target /tmp/rivals benchmarks/wheels/*.whl
  export PYTHONPATH=.:/tmp/rivals
fi
{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  git rev-parse HEAD 2>/dev/null
  python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} | tee "$OUT/machine.txt"
# libraries that were built elsewhere and carried along serve here: that is what the stable ABI is for
[ -f sdpo_kernels/_cuda.so ] ||
  SDPO_REQUIRE_NATIVE=1 timeout 120 python3 setup.py -q build_ext --inplace 2>&1 | tail -5 | tee "$OUT/build.txt" || status=1
timeout 240 python3 -m pytest -q -m gpu -p no:cacheprovider --noconftest tests/test_cuda.py 2>&1 | tee "$OUT/tests.txt" || status=1
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 75 compute-sanitizer --tool $tool --error-exitcode 9 \
      python3 -m pytest -q -p no:cacheprovider --noconftest tests/test_cuda.py -k "small_run and not eager" 2>&1 |
      tail -20 | tee "$OUT/$tool.txt" || status=1
  done
fi

# rivals that are not installed are listed with why; naive code and chunked linear_cross_entropy would take too long
CASES="gemms ours ours_native ours_without_stash trl_fused_scored liger_dpo cce"
# rows scored, hidden, vocabulary: all positions are scored, 4 pairs a batch
while read -r rows hidden vocab; do
  echo "== N $rows, H $hidden, V $vocab"
  timeout 95 python3 -m benchmarks.head --device cuda --cases $CASES --pairs 4 --length $((rows / 8)) --scored 1.0 \
    --hidden "$hidden" --vocab "$vocab" --rounds 1 --repeats 10 --json "$OUT/head-$rows-$hidden-$vocab.json" || status=1
done <<SHAPES | tee "$OUT/head.txt"
8192 4096 128256
8192 2048 151936
16384 3584 152064
4096 8192 128256
8192 2304 256000
SHAPES
# summed log-probs of 512 tokens and gradients against float64
timeout 60 python3 -m benchmarks.accuracy --device cuda --cases ours ours_native trl_fused_scored cce --dtypes bf16 \
  --hidden 2048 --vocabs 151936 --inputs plain confident --json "$OUT/accuracy.json" 2>&1 | tee "$OUT/accuracy.txt" || status=1
exit $status
