"""How do time and memory scale? `python -m benchmarks.scaling [--factors vocab …] [--json results.json]`

The head benchmark (`head.py`: fresh processes that take turns) from one base shape, with one factor changed at a time:
N (pairs of a fixed length), T (length at a fixed number of pairs), H and V. gemms and gemms_fp32 are the bare-GEMM
baseline ("floor"), as in `head.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import head, measure
from benchmarks.rivals import RIVALS

BASE = {"pairs": 2, "length": 256, "hidden": 512, "vocab": 32000}
FACTORS = {
    "pairs": [1, 2, 4, 8],
    "length": [128, 256, 512, 1024],
    "hidden": [256, 512, 1024, 2048],
    "vocab": [16000, 32000, 64000, 128000],
}
CASES = ["gemms", "gemms_fp32", "naive", "naive_fp32", "trl_fused_scored", "liger_dpo_eager", "ours"]
QUICK_BASE = {"pairs": 1, "length": 16, "hidden": 32, "vocab": 200}
QUICK_FACTORS = {"vocab": [200, 400]}


def main(arguments: list[str] | None = None) -> int:
    """Measure every point of every factor."""
    options = parse(arguments)

    base, factors = (QUICK_BASE, QUICK_FACTORS) if options.quick else (BASE, FACTORS)
    if not options.quick:
        factors = {name: FACTORS[name] for name in options.factors}

    report = measure.report("scaling", arguments, options.threads, torch.device(options.device))
    # the base shape is a point of every factor, and is measured once
    measured: dict[tuple[int, ...], dict[str, Any]] = {}
    report |= {"base": base, "results": []}
    for factor, values in factors.items():
        for value in values:
            shape = base | {factor: value}
            key = tuple(shape.values())
            if key not in measured:
                measured[key] = head.measure_all(head.parse(head_arguments(options, shape)))
            report["results"].append({"factor": factor, "value": value} | measured[key])

    print(show(report))
    measure.write_json(options.json, report)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--factors", nargs="+", choices=FACTORS, default=list(FACTORS))
    parser.add_argument("--cases", nargs="+", choices=RIVALS, default=CASES, metavar="CASE")
    parser.add_argument("--dtype", choices=head.DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=1, help="fresh processes per case and point")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per process")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help=f"a tiny run: {QUICK_FACTORS}")
    return parser.parse_args(arguments)


def head_arguments(options: argparse.Namespace, shape: dict[str, int]) -> list[str]:
    """The head benchmark's arguments for one point."""
    names = ("dtype", "device", "threads", "rounds", "repeats")
    given = [f"--{name}={getattr(options, name)}" for name in names]
    given += [f"--{name}={value}" for name, value in shape.items()]
    return [*given, "--cases", *options.cases]


def show(report: dict[str, Any]) -> str:
    """One table: milliseconds and extra MiB of each case at each point."""
    cases = [result["case"] for result in report["results"][0]["results"]]
    lines, skipped = [], {}
    for point in report["results"]:
        found = {result["case"]: result for result in point["results"]}
        skipped |= {case: result["skipped"] for case, result in found.items() if "skipped" in result}

        # a case that cannot run keeps its column, with dashes
        cells = [cell(found[case]) for case in cases]
        lines.append([f"{point['factor']} {point['value']}", str(point["shape"]["rows"]), *cells])

    table = measure.table(["point", "rows", *cases], lines)
    reasons = [f"{case}: not measured, {why}" for case, why in skipped.items()]
    legend = 'median ms / extra MiB; gemms, gemms_fp32: the bare-GEMM baseline ("floor")'
    return "\n".join([measure.heading(report), legend, "", table, *reasons])


def cell(result: dict[str, Any]) -> str:
    """Time and memory of one case at one point."""
    if "skipped" in result:
        return "–"
    memory = result["peak_extra_bytes"]
    return f"{1e3 * result['median_s']:.1f} / " + ("–" if memory is None else f"{memory / 2**20:.0f}")


if __name__ == "__main__":
    raise SystemExit(main())
