"""Stages and references over β, accuracy beside the distance from M₀: `python -m benchmarks.stages --betas`.

On three tasks (betas_tasks.py), for every seed and β, seven ways to train on the same pairs with the same number of
updates (but `guiding`, which trains twice):

- `dpo`: all pairs in one stage, the reference is M₀
- `sdpo`: three stages, easiest first; each stage's reference is the model before it
- `reversed`, `random`: the same with the hardest stage first, or with the pairs dealt out to the stages at random
- `initial`: the stages of `sdpo`, but the reference is always M₀
- `ema`: one stage whose reference becomes the policy twice, after each third (TR-DPO's hard update)
- `guiding`: one stage from M₀ again, whose reference is the model that `dpo` gave (Pre-DPO)

Each finished cell is kept as a file in --output and not repeated. benchmarks/results/notes.md has the protocol.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils import logging as transformers_logging

from benchmarks import measure
from benchmarks.betas_statistics import accuracy, conclusions
from benchmarks.betas_tasks import TASKS, Start, Task, judge
from sdpo_kernels.stepwise import run as driver
from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.settings.yaml_file import write_settings
from sdpo_kernels.stepwise.starter.tiny_model import load

METHODS = ("dpo", "sdpo", "reversed", "random", "initial", "ema", "guiding")  # guiding after dpo, whose model it needs
INITIAL = "initial_model"  # M₀ itself, β 0

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Train and judge all cells that are not there yet, and write what they say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stages", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--betas", action="store_true", help="this benchmark")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/betas"))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="small data, short warm-up: checks that all runs work")
    options = parser.parse_args(arguments)
    if not 2 <= len(set(options.seeds)) <= 10:
        parser.error("--seeds: must be two to ten different ones, for intervals over seeds")

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    report = measure.report("stages", arguments, 1, torch.device("cpu")) | {"benchmark": "betas"}

    # seed by seed, so that a sweep that is stopped early has whole seeds
    output = options.output / "quick" if options.quick else options.output
    settings = [Setting(output, task, seed, options.quick) for seed in options.seeds for task in options.tasks]
    rows = []
    for row in cells(settings, options.methods):
        rows.append(row)
        line = f"{row['task']} seed {row['seed']} {row['method']} β {row['beta']:g}: {accuracy(row):.1%}"
        print(f"{line}, KL {row['kl']:.3f} nat a token, {row['seconds']:.0f} s", file=sys.stderr, flush=True)

    report |= {"tasks": {name: TASKS[name].described for name in options.tasks}, "rows": rows}
    report["results"] = conclusions(rows)
    print(measure.heading(report))
    measure.write_json(options.json, report)
    return 0


@dataclass(frozen=True)
class Setting:
    """One task and seed: what its cells have in common."""

    output: Path
    name: str
    seed: int
    quick: bool = False

    @property
    def task(self) -> Task:
        """The task's start, learning rate and β."""
        return TASKS[self.name]

    @property
    def folder(self) -> Path:
        """Where its start and its cells are."""
        return self.output / self.name / f"seed-{self.seed}"

    @cached_property
    def start(self) -> Start:
        """Made once; a second process reads it back."""
        return self.task.start(self.folder / "start", self.seed, self.quick)

    @cached_property
    def initial(self) -> Any:
        """M₀ and its tokenizer."""
        return load(self.start.model)


def cells(settings: Sequence[Setting], methods: Sequence[str]) -> Iterator[Row]:
    """The rows of all cells, trained and judged or read back; of each setting first M₀ itself."""
    for setting in settings:
        yield cell(setting, INITIAL, 0.0)
        # every run collects garbage a dozen times; what is loaded by now is none
        gc.freeze()
        for beta in setting.task.betas:
            for method in methods:
                yield cell(setting, method, beta)


def cell(setting: Setting, method: str, beta: float) -> Row:
    """One row of the results: read if it is there, else trained, judged and kept."""
    kept = setting.folder / f"{method}-{beta:g}.json"
    if kept.exists():
        found: Row = json.loads(kept.read_text(encoding="utf-8"))
        return found

    started, processor = time.monotonic(), time.process_time()
    folder = setting.start.model if method == INITIAL else trained(setting, method, beta)
    model, tokenizer = load(folder)
    row = {"task": setting.name, "seed": setting.seed, "method": method, "beta": beta}
    row |= judge(model, setting.initial[0], tokenizer, setting.start)
    row |= {"seconds": time.monotonic() - started, "processor_seconds": time.process_time() - processor}

    # dpo's model is what guiding is guided by
    if method not in (INITIAL, "dpo"):
        shutil.rmtree(run_folder(setting, method, beta))
    replace_file(kept, (json.dumps(row, indent=1) + "\n").encode())
    return row


def trained(setting: Setting, method: str, beta: float) -> Path:
    """Train the cell with the driver; the folder of its last model."""
    run_file = run_folder(setting, method, beta).with_suffix(".yaml")
    run_file.write_text(write_settings(run_settings(setting, method, beta)), encoding="utf-8")

    # the report's pictures take half of the time of a run this small, and change no result
    with patch.object(driver, "write_report"):
        record = driver.run(load_config(run_file), Reporter(quiet=True))
    return last_model(setting, method, beta, record["stages"])


def run_folder(setting: Setting, method: str, beta: float) -> Path:
    """The driver's folder of a cell."""
    return setting.folder / f"run-{method}-{beta:g}".replace(".", "_")


def last_model(setting: Setting, method: str, beta: float, stages: Sequence[Row]) -> Path:
    """The folder of the last of a run's stages."""
    return run_folder(setting, method, beta) / f"stage-{len(stages)}-{stages[-1]['name']}"


def run_settings(setting: Setting, method: str, beta: float) -> Row:
    """The settings of the cell's run: methods differ in stages, order and reference alone."""
    start, task = setting.start, setting.task
    staged = [{"name": name, "data": [str(path)]} for name, path in start.stages.items()]
    whole = [{"name": "all", "data": [str(path) for path in start.stages.values()]}]
    pairs = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in start.stages.values())

    own: dict[str, Row] = {
        "dpo": {"stages": whole},
        "sdpo": {"stages": staged},
        "reversed": {"stages": staged[::-1]},
        "random": {"stages": staged, "order": "random"},
        "initial": {"stages": staged, "reference": "initial"},
        "ema": {
            "stages": whole,
            "reference": "ema",
            "ema": {"mode": "policy", "sync_steps": -(-pairs // (task.batch * len(staged)))},
        },
        "guiding": {
            "stages": whole,
            "reference": "guiding",
            "guiding": str(last_model(setting, "dpo", beta, whole)),
        },
    }
    trainer = {
        "learning_rate": task.learning_rate,
        "per_device_train_batch_size": task.batch,
        "per_device_eval_batch_size": 64,
        "save_strategy": "no",
        "seed": setting.seed,
        "use_cpu": True,
    }
    return {
        "model": str(start.model),
        "output_dir": str(run_folder(setting, method, beta)),
        "beta": beta,
        "max_length": 512,
        "trainer": trainer,
        **own[method],
    }
