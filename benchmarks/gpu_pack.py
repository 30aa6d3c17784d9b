"""`benchmarks/gpu.sh pack`: prepares here what a call on a lent GPU carries, and prints the two calls.

sdpo_kernels/_cpu.so, _cuda.so    built with SDPO_REQUIRE_NATIVE=1
build/gpu/commit                  for results made where there is no git
build/gpu/triton                  Triton's kernels for sm_90, compiled by SDPO_GPU_PYTHON: a Python of the machine's
                                  version (3.12) with its triton (3.6.0) and any torch. Without one, or where the
                                  machine's Triton is another one, call1 compiles them there, in several processes
build/gpu/persistent              the persistent kernel for Hopper as libraries, compiled by SDPO_QUACK_PYTHON, a Python
                                  with g++, nvcc and the extra `quack`. Without one it is not measured. Its
                                  compiler would take 50 MB of the 64, these take 3
runs/real/*/tiles.safetensors     which tiles real rows keep, if `python -m benchmarks.routed --write` has made them:
                                  without them the backward with grad_tol is not timed. The models themselves are
                                  never carried, and never committed
benchmarks/wheels                 rivals: TRL, Liger, CCE as wheels, and Liger's library for Hopper as *.tar.xz
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from benchmarks.gpu import MODELS, SECONDS
from benchmarks.measure import ROOT

PACKED = ROOT / "build" / "gpu"
WHEELS = ROOT / "benchmarks" / "wheels"
MASKS = tuple(f"runs/real/{model}/tiles.safetensors" for model in MODELS)
CARRIED = ("sdpo_kernels/_cpu.so", "sdpo_kernels/_cuda.so", "build/gpu", "benchmarks/wheels", *MASKS)
MOST_CARRIED = 64 * 2**20  # bytes: the working tree and what is carried
MOST_COMMAND = 2000  # characters
SLACK = 60  # seconds between a call's own deadline and the machine's
CACHE = Path("/tmp/sdpo-triton")  # the same path here and there: see compile_triton.py
RIVALS = ("trl", "liger-kernel", "cut-cross-entropy", "apache-tvm-ffi")
LIGER_LIBRARY = "liger-cute-kernels"


def main() -> int:
    """Prepare everything, and print what to call."""
    PACKED.mkdir(parents=True, exist_ok=True)
    build_libraries()
    (PACKED / "commit").write_text(commit() + "\n")
    compile_kernels(os.environ.get("SDPO_GPU_PYTHON"))
    compile_persistent(os.environ.get("SDPO_QUACK_PYTHON"))
    gather_rivals()
    print(calls(size_of_tree(), size_of_carried()))
    return 0


def build_libraries() -> None:
    """Both libraries, or an error."""
    environment = os.environ | {"SDPO_REQUIRE_NATIVE": "1"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    for library in CARRIED[:2]:
        if not (ROOT / library).is_file():
            raise SystemExit(f"{library}: was not built, must be there (is nvcc installed?)")


def commit() -> str:
    """As measure.py names it."""
    from benchmarks import measure

    return measure._commit()


def compile_kernels(python: str | None) -> None:
    """Triton's kernels, with `python`; only what a launch reads is kept."""
    shutil.rmtree(PACKED / "triton", ignore_errors=True)
    (PACKED / "triton.key").unlink(missing_ok=True)
    if python is None:
        print("SDPO_GPU_PYTHON is not set: Triton's kernels will be compiled on the machine")
        return

    shutil.rmtree(CACHE, ignore_errors=True)
    environment = os.environ | {"TRITON_CACHE_DIR": str(CACHE), "PYTHONPATH": str(ROOT)}
    jobs = f"--jobs={os.cpu_count()}"
    subprocess.run([python, "-m", "benchmarks.compile_triton", jobs], cwd=ROOT, env=environment, check=True)
    key = "from benchmarks.compile_triton import triton_key; print(triton_key())"
    done = subprocess.run([python, "-c", key], cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    (PACKED / "triton.key").write_text(done.stdout)

    for path in CACHE.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".cubin"):
            kept = PACKED / "triton" / path.relative_to(CACHE)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, kept)


def compile_persistent(python: str | None) -> None:
    """The persistent kernel's libraries, with `python`."""
    folder = PACKED / "persistent"
    shutil.rmtree(folder, ignore_errors=True)
    if python is None:
        print("SDPO_QUACK_PYTHON is not set: the persistent kernel will not be measured")
        return
    command = [python, "-m", "benchmarks.compile_persistent", str(folder), "--link"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def gather_rivals() -> None:
    """Download the wheels that are not there yet; what cannot be had is left out, and its cases say so."""
    WHEELS.mkdir(exist_ok=True)
    there = " ".join(path.name.replace("_", "-") for path in WHEELS.iterdir())
    machine = ["--python-version=3.12", "--implementation=cp", "--platform=manylinux_2_28_x86_64"]
    for name in RIVALS:
        if name not in there:
            download(WHEELS, name, *machine, "--platform=manylinux_2_24_x86_64", "--platform=manylinux2014_x86_64")
    if LIGER_LIBRARY not in there:
        gather_liger_library()


def download(folder: Path, name: str, *options: str) -> bool:
    """Whether `pip download` found it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    done = subprocess.run([*command, *options, name], capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: not packed, {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.returncode == 0


def gather_liger_library() -> None:
    """Liger's wheel has 280 MB for several chips and operators; the part for Hopper's losses is 6 MB as xz."""
    folder = PACKED.parent / "liger"
    if not download(folder, LIGER_LIBRARY):
        return
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as whole:
        wanted = [name for name in whole.namelist() if name.endswith((".py", "sm90a.so"))]
        whole.extractall(folder, wanted)
    with tarfile.open(WHEELS / f"{LIGER_LIBRARY}.tar.xz", "w:xz") as packed:
        packed.add(folder / "liger_cute_kernels", "liger_cute_kernels")
    shutil.rmtree(folder)


def size_of_tree() -> int:
    """Bytes of the files that travel with the repository: tracked, and untracked ones that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sum((ROOT / name).stat().st_size for name in names if name and (ROOT / name).is_file())


def size_of_carried() -> int:
    """Bytes of the ignored paths that are carried along."""
    paths = [path for name in CARRIED for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    return sum(path.stat().st_size for path in paths if path.is_file())


def calls(tree: int, carried: int) -> str:
    """The two calls of the device's `run`, ready to be copied."""
    if tree + carried > MOST_CARRIED:
        raise SystemExit(f"carried: was {(tree + carried) / 2**20:.0f} MiB, must be at most 64 MiB")
    lines = [f"{tree / 2**20:.1f} MiB of working tree and {carried / 2**20:.1f} MiB carried, of 64 MiB"]
    for call, seconds in SECONDS.items():
        command = f"bash benchmarks/gpu.sh {call}"
        assert len(command) <= MOST_COMMAND
        given = {"command": command, "timeout_s": int(seconds) + SLACK, "carry": list(CARRIED)}
        lines.append("run " + json.dumps(given))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
