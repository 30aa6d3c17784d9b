"""The machine that a call runs on: versions, tools, whether both libraries load, whether packed kernels serve here.

Fails if something is missing that everything after it needs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.gpu_steps import kill_tree
from benchmarks.measure import ROOT, surroundings
from sdpo_kernels.info import info_text

TOOLS = ("nvidia-smi", "nvcc", "gcc", "compute-sanitizer", "ncu", "cuobjdump", "git")
PACKED_KEY = ROOT / "build" / "gpu" / "triton.key"


def main() -> int:
    """Print and record everything; 1 if something is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_about")
    parser.add_argument("--jsonl", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()

    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,temperature.gpu"
        subprocess.run(["nvidia-smi", query, "--format=csv,noheader"])
    print(info_text(), flush=True)
    tools = {tool: shutil.which(tool) for tool in TOOLS}
    print("tools:", ", ".join(f"{tool} {'there' if path else 'missing'}" for tool, path in tools.items()), flush=True)

    device = torch.device(options.device)
    missing = list(what_is_missing(device))
    kernels = "none needed" if device.type == "cpu" else have_kernels()
    print(f"kernels of Triton: {kernels}", flush=True)
    found = surroundings(torch.get_num_threads(), torch.device("cpu") if missing else device)
    records.append(options.jsonl, {"about": found, "tools": tools, "kernels": kernels, "missing": missing})
    for problem in missing:
        print(f"MISSING {problem}", flush=True)
    return 1 if missing else 0


def what_is_missing(device: torch.device) -> Iterator[str]:
    """What the tests and benchmarks cannot do without."""
    from sdpo_kernels.backends import BACKENDS

    native = BACKENDS["native"]
    if device.type == "cuda" and not torch.cuda.is_available():
        yield "a CUDA device"
        return
    for name in ("native", "triton") if device.type == "cuda" else ("native",):
        try:
            reason = BACKENDS[name].supports_pairs(device)
        except RuntimeError as error:
            reason = str(error)
        if reason:
            yield f"the backend {name}: {reason}"
    if device.type == "cuda" and native.supports_rows(torch.device("cpu"), torch.float32):
        yield "the CPU library"


def have_kernels() -> str:
    """Whether this Triton finds the packed kernels; else they are compiled now, in several processes."""
    from benchmarks.compile_triton import triton_key

    if PACKED_KEY.is_file() and PACKED_KEY.read_text().strip() == triton_key():
        return "packed"
    jobs = max(1, (os.cpu_count() or 2) - 2)
    command = [sys.executable, "-m", "benchmarks.compile_triton", f"--jobs={jobs}"]
    why = "packed for another Triton" if PACKED_KEY.is_file() else "not packed"
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        status = process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        return f"{why}, and not all compiled within 40 s"
    return f"{why}, compiled here by {jobs} processes" if status == 0 else f"{why}, and compiling failed"


if __name__ == "__main__":
    raise SystemExit(main())
