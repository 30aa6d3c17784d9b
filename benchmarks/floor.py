"""How close to bare GEMMs is a DPO step at the head? `python -m benchmarks.floor [--json out.json]`

The bare-GEMM baseline ("floor") is torch's four matrix products on the scored rows, in bf16 or in float32, whichever is
faster (float32 on a CPU without bf16 instructions). It and our step, one call with reference forward, policy forward
and backward, run in one process and take turns, round after round. Medians, for shapes and dtypes around the reference
problem (816 scored rows, H 1024, V 32000). With `--profile`, the time of one step by operator instead.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.head import DTYPES
from benchmarks.problem import Problem
from benchmarks.records import FLOORS
from benchmarks.rivals import gemms, gemms_fp32, ours, ours_without_stash
from sdpo_kernels.backends import BACKENDS

# pairs, length, hidden, vocab; 40 % of the positions are scored: N = 816, 64 and 4096 rows
SHAPES = {
    "reference problem": (4, 256, 1024, 32000),
    "H 256": (4, 256, 256, 32000),
    "H 4096": (4, 256, 4096, 32000),
    "N 64": (4, 20, 1024, 32000),
    "N 4096": (4, 1280, 1024, 32000),
}
QUICK = {"tiny": (1, 16, 32, 200)}
CASES = {"gemms": gemms, "gemms_fp32": gemms_fp32, "ours": ours, "without stash": ours_without_stash}


def main(arguments: list[str] | None = None) -> int:
    """Measure all shapes and dtypes, or profile one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument(
        "--chip", choices=("avx512bf16", "avx512", "avx2", "base"), help="run the native kernels for another chip"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help=f"a tiny run: {QUICK}")
    parser.add_argument(
        "--profile", action="store_true", help="torch's profiler over one step of the reference problem"
    )
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    if options.chip:
        use_chip(options.chip)
    if options.profile:
        print(profile(options.dtypes[0]))
        return 0

    device = torch.device("cpu")
    report: dict[str, Any] = measure.report("floor", arguments, options.threads, device) | {"chip": options.chip}
    report["results"] = [
        measured(name, shape, dtype, options.rounds, device)
        for dtype in options.dtypes
        for name, shape in (QUICK if options.quick else {name: SHAPES[name] for name in options.shapes}).items()
    ]

    print(show(report))
    measure.write_json(options.json, report)
    return 0


def use_chip(name: str) -> None:
    """Make the native backend run as on a chip with fewer instructions than this machine's."""
    native = BACKENDS["native"]
    torch.ops.sdpo_native.use_cpu_chip(name)
    native.bf16_products = name == "avx512bf16"  # type: ignore[attr-defined]


def measured(
    name: str, shape: tuple[int, int, int, int], dtype: str, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Medians in seconds of every case on one problem; the cases take turns."""
    problem = Problem.random(*shape, 0.4, DTYPES[dtype], str(device))
    # in float32 both floors are one; without bf16 instructions torch's bf16 products take far longer
    left_out = "gemms_fp32" if dtype == "fp32" else None if measure.has_bf16() else "gemms"
    wanted = {case: prepare for case, prepare in CASES.items() if case != left_out}
    steps: dict[str, Callable[[], Any]] = {case: prepare(problem) for case, prepare in wanted.items()}
    times: dict[str, list[float]] = {case: [] for case in steps}

    # in turn, so that other load on the machine affects all cases alike
    for number in range(rounds + 1):
        for case, step in steps.items():
            problem.zero_grad()
            seconds = measure.seconds(step, device)
            if number:  # the first round warms up
                times[case].append(seconds)

    medians = {case: statistics.median(found) for case, found in times.items()}
    rows = int((problem.labels != -100).sum())
    floor = min(medians[case] for case in FLOORS if case in medians)
    return {"shape": name, "rows": rows, "hidden": shape[2], "vocab": shape[3], "dtype": dtype, "median_s": medians} | {
        "spread_s": {case: [min(found), max(found)] for case, found in times.items()},
        "ratio": {case: medians[case] / floor for case in medians if case not in FLOORS},
    }


def profile(dtype: str) -> str:
    """The time of one step by operator."""
    problem = Problem.random(*SHAPES["reference problem"], 0.4, DTYPES[dtype], "cpu")
    step = ours(problem)
    step()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=45)


def show(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines = []
    for result in report["results"]:
        times = [f"{1e3 * result['median_s'][case]:.1f}" if case in result["median_s"] else "–" for case in CASES]
        ratios = [f"{ratio:.2f}" for ratio in result["ratio"].values()]
        lines.append([f"{result['dtype']} {result['shape']}", str(result["rows"]), *times, *ratios])
    headings = ["", "rows", *(f"{case} ms" for case in CASES), "ours ÷ floor", "no stash ÷ floor"]
    legend = 'gemms, gemms_fp32: the bare-GEMM baseline ("floor"); the ratio is to the faster one'
    return "\n".join([measure.heading(report), legend, "", measure.table(headings, lines)])


if __name__ == "__main__":
    raise SystemExit(main())
