"""How the benchmarks measure: time, peak extra memory, the machine, and one fresh process per case.

**Time** is the wall-clock time of one call after a warm-up at full size; the device is synchronised before and after.

**Peak extra memory** is the highest memory during a call minus the memory just before it, when the inputs exist. It
counts everything the call allocates: temporaries, tensors saved for the backward, and gradients. On the CPU it is the
process's peak resident memory (VmHWM, reset through /proc/self/clear_refs) minus its resident memory before the call. A
tiny call loads libraries and starts threads first; then the first call of full size is measured, because later the
allocator reuses freed memory. On CUDA it is `torch.cuda.max_memory_allocated` minus the memory before the call.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sdpo_kernels.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "sdpo-kernels", "triton", "numpy", "transformers", "trl", "liger-kernel",
    "cut-cross-entropy", "quack-kernels",
)  # fmt: skip


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The peak memory during `call` minus the memory before it; None if the system does not report it."""
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    _give_back_free_memory()
    if not _reset_peak():
        call()
        return None

    # the result is kept until the peak is read
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return peak


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of all rounds' `times_s`, and the memory; {"skipped": why} if the last round was skipped."""
    last = answers[-1]
    if "skipped" in last:
        return {key: last[key] for key in ("skipped", "failed") if key in last}

    # every call counts alike; of the memory peaks, one per process, the median is a measured one
    times = [time for answer in answers for time in answer["times_s"]]
    memories = [a["peak_extra_bytes"] for a in answers if a["peak_extra_bytes"] is not None]
    return {
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "times_s": times,
        "peak_extra_bytes": statistics.median_high(memories) if memories else None,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_back_free_memory() -> None:
    """Return freed memory to the system: memory that `call` reuses would not be counted (glibc)."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Reset VmHWM to VmRSS; False if the system has no Linux /proc that allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    """The value of `key` in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def run_fresh(module: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """Run `python -m module arguments…` in a new process; the last line of its output is its answer, in JSON.

    If the process fails, the answer is {"skipped": the last line of its error output}: a rival that cannot run is
    listed with the reason, and the others continue.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    complaint = done.stderr.strip().splitlines() or ["no message"]
    return {"skipped": f"exit status {done.returncode}: {complaint[-1]}", "failed": True}


def exit_status(results: list[dict[str, Any]], device: str) -> int:
    """1 if a case of ours was not measured though it should have been, else 0; says which.

    On CUDA all of ours must run. On the CPU a case that says why it cannot run there is no failure.
    """
    ours = [result for result in results if result["case"].startswith("ours") and "skipped" in result]
    missing = [result for result in ours if result.get("failed") or device != "cpu"]
    for result in missing:
        print(f"FAILED {result['case']}: {result['skipped']}", file=sys.stderr, flush=True)
    return 1 if missing else 0


def report(benchmark: str, arguments: list[str] | None, threads: int, device: torch.device) -> dict[str, Any]:
    """The head of every benchmark's JSON: its name, its command (without --json and --jsonl), and the surroundings."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for option in ("--json", "--jsonl"):
        if option in given:
            place = given.index(option)
            del given[place : place + 2]
    kept = (shlex.quote(a) for a in given if not a.startswith(("--json=", "--jsonl=")))

    words = [f"python -m benchmarks.{benchmark}", *kept]
    return {"benchmark": benchmark, "command": " ".join(words)} | surroundings(threads, device)


def write_json(path: Path | None, found: dict[str, Any]) -> None:
    """Write the report to `path`, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def heading(found: dict[str, Any]) -> str:
    """The line above a printed table: machine, versions, commit and load."""
    machine = found["machine"]
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}, "
        f"torch {found['versions']['torch']}, commit {found['commit']}, load {machine['load_average']:.1f}"
    )


def surroundings(threads: int, device: torch.device) -> dict[str, Any]:
    """Everything needed to interpret a number: date, machine, versions, commit."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "instructions": _instructions(),
            "cores": os.cpu_count(),
            "threads": threads,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "load_average": os.getloadavg()[0],
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": _commit(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _instructions() -> str:
    """What the native backend computes with here, and what torch has beyond it."""
    native = BACKENDS["native"]
    usable = native.unavailable_reason is None and native.load_error is None
    chip = native.operators.cpu_chip() if usable else "no native library"
    cpuinfo = Path("/proc/cpuinfo")
    amx = cpuinfo.exists() and " amx_bf16" in cpuinfo.read_text()
    return f"{chip}, AMX" if amx else chip


def has_bf16() -> bool:
    """Whether the machine's CPU has bf16 instructions, as far as Linux says so."""
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or any(name in cpuinfo.read_text() for name in ("avx512_bf16", "amx_bf16", " bf16"))


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # not installed, not listed
    return found


def _commit() -> str:
    """The checkout's commit, with "+changes" if tracked files differ from it; SDPO_COMMIT where there is no git."""
    if given := os.environ.get("SDPO_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def table(headings: list[str], lines: list[list[str]]) -> str:
    """A plain text table: first column aligned left, the others right."""
    widths = [max(len(line[i]) for line in [headings, *lines]) for i in range(len(headings))]

    def row(cells: list[str]) -> str:
        first, *others = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join([first, *others]).rstrip()

    return "\n".join([row(headings), "  ".join("-" * w for w in widths), *(row(line) for line in lines)])
