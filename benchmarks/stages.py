"""Does stepwise DPO beat DPO, and DPO its warm start? `python -m benchmarks.stages [--betas] [--json results.json]`

The demo's task (sorting the letters of a word, examples/demo) over seeds, with the functions of
examples/methods/compare.py. Each seed has its own warm start and pairs; from it, DPO trains on all pairs at once and
sDPO in three stages, and all three models are judged on the same held-out words. Differences are paired by seed.
Finished runs in --output are not repeated, so seeds can be added. With --betas: betas.py, which says more.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import betas, measure
from examples.demo.setup import FULL, QUICK, Settings, set_up
from examples.methods.compare import start_folder, summary, table, train_and_judge
from sdpo_kernels.stepwise.common.progress import Reporter

METHODS = ("sft", "dpo", "sdpo")


def main(arguments: list[str] | None = None) -> int:
    """Train and judge every method with every seed."""
    if "--betas" in (sys.argv[1:] if arguments is None else arguments):
        return betas.main(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/stages"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, with one thread each")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="small data, short warm-up: checks that all runs work")
    options = parser.parse_args(arguments)

    # a process per seed, and not per method: its methods share the warm start
    sizes = {seed: replace(QUICK if options.quick else FULL, seed=seed) for seed in options.seeds}
    report = measure.report("stages", arguments, 1, torch.device("cpu"))
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(one_seed, [options.output] * len(sizes), sizes.values()))

    rows = [row for of_seed in found for row in of_seed]
    report |= {"rows": rows, "results": summary(rows), "sdpo_minus_dpo": differences(rows, "sdpo", "dpo")}

    print(measure.heading(report), table(report["results"]), sep="\n\n")
    measure.write_json(options.json, report)
    return 0


def one_seed(output: Path, settings: Settings) -> list[dict[str, Any]]:
    """The results of one seed; runs in a process of its own."""
    torch.set_num_threads(1)
    set_up(start_folder(output, settings.seed), settings, Reporter(quiet=True))
    return [train_and_judge(output, settings.seed, method, settings) for method in METHODS]


def differences(rows: list[dict[str, Any]], one: str, other: str) -> list[float]:
    """Share of held-out words answered exactly right, `one` minus `other`, seed by seed."""
    right = {(row["method"], row["seed"]): row["exactly_right"] for row in rows}
    return [right[one, seed] - right[other, seed] for seed in sorted({row["seed"] for row in rows})]


if __name__ == "__main__":
    raise SystemExit(main())
