"""A whole training step of the driver against TRL's DPOTrainer, on the same real pairs.

    python -m benchmarks.step [--tasks grammar …] [--threads 1] [--json PATH]     # TRL from `make bench-env`

Tasks: stories260K (260,032 parameters, fp32) on slices of the three compact stages; `llama10m`, a Llama with ten
million random parameters and GPT-2's vocabulary of 50,257 on conversations of the full pack; and `full1` to `full3`,
another of eight layers of width 512, whose body costs more than its head, on all three full stages. Batches have 4
pairs, the reference's log-probs are computed beforehand, and TRL's gradient checkpointing is off. `unshared` is the
driver with `prefix_sharing: off`; "through the model" are the tokens a step that go through it. Each round of a side is
a fresh process, and the sides take turns. All sides train one epoch on the same pairs. Batches differ in length, and so
do their steps, so a side's step time is the mean over a round, from the start of the first step to the end of the last:
collation, logging and Trainer's own work count. Median and spread are those of rounds, and a ratio is the median of
ratios within a round. Tokens are those of both sequences of a pair, with prompts. Memory is the process's peak minus
its memory after the libraries were loaded: model, reference scoring, optimiser and training.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gzip
import importlib
import itertools
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import measure
from benchmarks.problem import DATA

if TYPE_CHECKING:
    from sdpo_kernels.stepwise.prepare import Prepared

BATCH, LEARNING_RATE = 4, 1e-5
NOW = datetime.datetime(2026, 1, 1)  # what chat templates read
LIBRARIES = {
    "ours": ["transformers", "sdpo_kernels.stepwise.stage", "sdpo_kernels.stepwise.run"],
    "unshared": ["transformers", "sdpo_kernels.stepwise.stage", "sdpo_kernels.stepwise.run"],
    "trl": ["transformers", "datasets", "trl.trainer.dpo_trainer"],
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Task:
    """Model and data of a task; both sides truncate sequences over `max_length` in the same way."""

    data: str  # under DATA
    pairs: int
    max_length: int
    model: str = "models/stories260K"  # under DATA, or a name of RANDOM


TASKS = {
    "grammar": Task("compact/stage1_grammar.jsonl", 48, 512),
    "commonsense": Task("compact/stage2_commonsense.jsonl", 48, 512),
    "reasoning": Task("compact/stage3_reasoning.jsonl", 48, 512),
    "llama10m": Task("full/stage2_ultrafeedback.jsonl.gz", 24, 1024, "llama10m"),
    "full1": Task("full/stage1_orca_gsm8k.jsonl.gz", 24, 1024, "llama512"),
    "full2": Task("full/stage2_ultrafeedback.jsonl.gz", 24, 1024, "llama512"),
    "full3": Task("full/stage3_human_chat.jsonl.gz", 24, 1024, "llama512"),
}

# models with random weights, which time does not depend on
RANDOM = {
    "llama10m": {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 6, "num_attention_heads": 5},
    "llama512": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
}


def model_folder(task: Task, folder: Path) -> Path:
    """The folder of the task's model and tokenizer: in the pack, or a random Llama, written to `folder`."""
    if task.model not in RANDOM:
        return DATA / task.model

    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizers/gpt2")
    tokenizer.chat_template = TEMPLATE

    config = LlamaConfig(
        **RANDOM[task.model],
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def task_rows(task: Task, pairs: int) -> list[dict[str, Any]]:
    """The first pairs of the task's file."""
    path = DATA / task.data
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows[:pairs]]


@dataclass(frozen=True)
class Round:
    """The measurements of one round."""

    times: list[float]  # of each step
    tokens_a_step: float | None = None  # counted by the driver; TRL has the same tokens
    through_the_model: float | None = None  # tokens a step, those of shared prompts once


def step_seconds(ends: list[float]) -> list[float]:
    """The duration of each step, from the start of the first and the ends of all."""
    return [b - a for a, b in itertools.pairwise(ends)]


def clock(trainer: Any) -> list[float]:
    """The start of the first optimiser step of `trainer` and the end of each; the list fills as it trains."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    return ends


def driver_round(
    task: Task, rows: list[dict[str, Any]], model: Path, folder: Path, prefix_sharing: str = "auto"
) -> Round:
    """Train one round with the driver's StageTrainer.

    1. Prepare the run, its data and its stage, which scores the reference.
    2. Train, with a clock on the optimiser steps.
    """
    from sdpo_kernels.stepwise.common.progress import Reporter
    from sdpo_kernels.stepwise.data.batches import shared_tokens
    from sdpo_kernels.stepwise.stage import prepare_trainer
    from sdpo_kernels.stepwise.state import Stage, open_run

    prepared = prepare_run(task, rows, model, folder, prefix_sharing)
    reporter = Reporter(quiet=True)
    run = open_run(prepared.config, prepared.tokenizer, prepared.stages, None, folder / "run", reporter, NOW)
    stage = Stage(run, 1, prepared.stages[0])
    stage.work.mkdir()

    trainer, _ = prepare_trainer(stage)
    ends = clock(trainer)
    trainer.train()

    # the last token of each sequence predicts nothing
    tokens = prepared.stages[0].tokens
    total = len(tokens.ids) / len(tokens) * BATCH
    saved = shared_tokens(tokens) / len(tokens) * BATCH if prefix_sharing == "auto" else 0.0
    return Round(step_seconds(ends), total, total - 2 * BATCH - saved)


def prepare_run(
    task: Task, rows: list[dict[str, Any]], model: Path, folder: Path, prefix_sharing: str = "auto"
) -> Prepared:
    """The driver's prepared run of one stage: data and run file are written to `folder`, as a user would."""
    from sdpo_kernels.stepwise.prepare import prepare
    from sdpo_kernels.stepwise.settings.run_file import load_config

    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(model),
        "output_dir": str(folder / "run"),
        "max_length": task.max_length,
        "prefix_sharing": prefix_sharing,
        "stages": [{"name": "slice", "data": str(data)}],
        "trainer": {
            "learning_rate": LEARNING_RATE,
            "per_device_train_batch_size": BATCH,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1000,
        },
    }

    # JSON is YAML
    (folder / "run.yaml").write_text(json.dumps(settings))
    (folder / "run").mkdir()
    return prepare(load_config(folder / "run.yaml"), NOW)


def unshared_round(task: Task, rows: list[dict[str, Any]], model: Path, folder: Path) -> Round:
    """Train one round with the driver, each answer's prompt through the model."""
    return driver_round(task, rows, model, folder, prefix_sharing="off")


def trl_round(task: Task, rows: list[dict[str, Any]], model: Path, folder: Path) -> Round:
    """Train one round with TRL's DPOTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    # the same settings as in driver_round, and what the driver does not have switched off
    args = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        max_length=task.max_length,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        num_train_epochs=1,
        save_strategy="no",
        logging_steps=1000,
        report_to="none",
        disable_tqdm=True,
    )

    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.remove_callback(PrinterCallback)

    ends = clock(trainer)
    trainer.train()
    return Round(step_seconds(ends))


SIDES: dict[str, Callable[[Task, list[dict[str, Any]], Path, Path], Round]] = {
    "ours": driver_round,
    "unshared": unshared_round,
    "trl": trl_round,
}


def measure_side(options: argparse.Namespace) -> dict[str, Any]:
    """One round of one side; runs in a fresh process."""
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)

    # imported before memory is measured
    try:
        for library in LIBRARIES[options.child]:
            importlib.import_module(library)
    except ImportError as error:
        return {"skipped": f"{error} (make bench-env installs the rivals)"}

    task = TASKS[options.tasks[0]]
    rows = task_rows(task, options.pairs or task.pairs)

    # the list takes the result out of the call that measures memory
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as folder:
        model = model_folder(task, Path(made))
        side = SIDES[options.child]
        memory = measure.peak_extra_bytes(
            lambda: rounds.append(side(task, rows, model, Path(folder))), torch.device("cpu")
        )

    found = dataclasses.asdict(rounds[0])
    return {"times_s": found.pop("times"), **found, "peak_extra_bytes": memory}


def measure_task(options: argparse.Namespace, task: str) -> dict[str, Any]:
    """Measure one task in rounds of fresh processes; the sides take turns."""
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}

    # a side that cannot run is tried once
    given = [f"--tasks={task}", f"--threads={options.threads}", f"--pairs={options.pairs}"]
    for _ in range(options.rounds):
        for side, found in answers.items():
            if not (found and "skipped" in found[-1]):
                found.append(measure.run_fresh("benchmarks.step", [f"--child={side}", *given], options.threads))

    # only the driver counts tokens; TRL's speed is computed from the same number
    tokens = next((a["tokens_a_step"] for a in answers["ours"] if "times_s" in a), None)
    sides = {side: summary(found, tokens) for side, found in answers.items()}

    result: dict[str, Any] = {"task": task, "pairs": options.pairs or TASKS[task].pairs, "tokens_a_step": tokens}
    result |= {"max_length": TASKS[task].max_length, "sides": sides}
    for side in ("unshared", "trl"):
        if "median_s" in sides["ours"] and "median_s" in sides[side]:
            rounds = zip(sides[side]["round_means_s"], sides["ours"]["round_means_s"], strict=True)
            ratios = [theirs / ours for theirs, ours in rounds]
            result[f"{side}_over_ours"] = statistics.median(ratios)
            result[f"{side}_over_ours_spread"] = [min(ratios), max(ratios)]

    return result


def summary(answers: list[dict[str, Any]], tokens: float | None) -> dict[str, Any]:
    """One side's results over its rounds."""
    found = measure.summary(answers)
    if "times_s" in found:
        means = [statistics.mean(answer["times_s"]) for answer in answers]
        found |= {
            "round_means_s": means,
            "median_s": statistics.median(means),
            "min_s": min(means),
            "max_s": max(means),
        }
        found["tokens_a_second"] = None if tokens is None else tokens / statistics.mean(found["times_s"])
        found["through_the_model"] = answers[-1]["through_the_model"]
    return found


def show(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines, skipped = [], {}
    for result in report["results"]:
        for side, found in result["sides"].items():
            if "skipped" in found:
                skipped[side] = found["skipped"]
                continue
            memory, speed = found["peak_extra_bytes"], found["tokens_a_second"]
            times = [f"{1e3 * found[key]:.1f}" for key in ("median_s", "min_s", "max_s")]
            through = found.get("through_the_model")
            cells = [
                "" if through is None else f"{through:.0f}",
                "" if speed is None else f"{speed:.0f}",
                "" if memory is None else f"{memory / 2**20:.0f}",
            ]
            lines.append([f"{result['task']} {side}", *times, *cells])
        for side in ("unshared", "trl"):
            if f"{side}_over_ours" in result:
                ratios = [result[f"{side}_over_ours"], *result[f"{side}_over_ours_spread"]]
                lines.append([f"{result['task']} {side}/ours", *(f"{ratio:.2f}" for ratio in ratios), *[""] * 3])

    headings = ["", "median ms", "min ms", "max ms", "through the model", "tokens/s", "extra MiB"]
    table = measure.table(headings, lines)
    return "\n".join([measure.heading(report), "", table, *(f"{s}: not measured, {w}" for s, w in skipped.items())])


def main(arguments: list[str] | None = None) -> int:
    """Measure all tasks; as a child process, one round of one side."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=0, help="pairs per task, in place of its own number")
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per side")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    # nothing is downloaded, and output holds results only
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if options.child:
        print(json.dumps(measure_side(options)))
        return 0

    report = measure.report("step", arguments, options.threads, torch.device("cpu")) | {"batch": BATCH}
    report["results"] = [measure_task(options, task) for task in options.tasks]
    print(show(report))
    measure.write_json(options.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
