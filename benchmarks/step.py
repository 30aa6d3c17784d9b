"""A whole training step of the driver against TRL's DPOTrainer, on real pairs, timed in turn in one process.

    python -m benchmarks.step [--threads 1] [--pairs 48] [--rounds 5] [--json PATH]     # TRL from `make bench-env`

Both train stories260K (260,032 parameters, fp32) at 4 pairs a batch on the same slices of the three compact stages,
with the reference's log-probs computed beforehand and TRL's gradient checkpointing off. A step is the time between the
ends of two optimiser steps, so collation, logging and Trainer's own work count; the first of a round is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import surroundings

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
STAGES = {
    "grammar": "stage1_grammar.jsonl",
    "commonsense": "stage2_commonsense.jsonl",
    "reasoning": "stage3_reasoning.jsonl",
}
MODEL = DATA / "models" / "stories260K"
BATCH, MAX_LENGTH, LEARNING_RATE = 4, 512, 1e-5


def clock(trainer: Any) -> list[float]:
    """Let a transformers Trainer write down when each optimiser step ends."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    return ends


def driver_round(rows: list[dict[str, Any]], folder: Path) -> list[float]:
    """Train one round with the driver's StageTrainer; seconds of each step but the first."""
    from sdpo_kernels.stepwise.config import load_config
    from sdpo_kernels.stepwise.prepare import prepare
    from sdpo_kernels.stepwise.progress import Reporter
    from sdpo_kernels.stepwise.run import open_run
    from sdpo_kernels.stepwise.stage import Stage, prepare_trainer

    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(MODEL),
        "output_dir": str(folder / "run"),
        "max_length": MAX_LENGTH,
        "stages": [{"name": "slice", "data": str(data)}],
        "trainer": {
            "learning_rate": LEARNING_RATE,
            "per_device_train_batch_size": BATCH,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1000,
        },
    }
    (folder / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (folder / "run").mkdir()
    prepared = prepare(load_config(folder / "run.yaml"))
    run = open_run(prepared, folder / "run", Reporter(quiet=True))
    stage = Stage(run, 1, prepared.stages[0])
    stage.work.mkdir()
    trainer, _ = prepare_trainer(stage)
    ends = clock(trainer)
    trainer.train()
    return [b - a for a, b in itertools.pairwise(ends)]


def trl_round(rows: list[dict[str, Any]], folder: Path) -> list[float]:
    """Train one round with TRL's DPOTrainer; seconds of each step but the first."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        max_length=MAX_LENGTH,
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
    columns = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(columns),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
    )
    trainer.remove_callback(PrinterCallback)
    ends = clock(trainer)
    trainer.train()
    return [b - a for a, b in itertools.pairwise(ends)]


def main() -> None:
    """Print a table of medians; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=48, help="pairs of each stage")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    logging.disable(logging.WARNING)
    sides: dict[str, Callable[[list[dict[str, Any]], Path], list[float]]] = {"ours": driver_round, "trl": trl_round}
    results = []
    for stage, file in STAGES.items():
        lines = (DATA / "compact" / file).read_text().splitlines()[: options.pairs]
        rows = [json.loads(line) for line in lines]
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, side in sides.items():
                with tempfile.TemporaryDirectory() as folder:
                    seconds[name] += side(rows, Path(folder))
        medians = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
        results.append({"stage": stage, "median_ms": medians, "trl_over_ours": medians["trl"] / medians["ours"]})
        print(
            f"{stage:12} ours {medians['ours']:7.1f} ms   TRL {medians['trl']:7.1f} ms   "
            f"TRL/ours {results[-1]['trl_over_ours']:.2f}",
            flush=True,
        )
    if options.json:
        record = {
            "question": "step",
            "machine": surroundings(options.threads, torch.device("cpu")),
            "options": {"pairs": options.pairs, "rounds": options.rounds, "batch": BATCH, "max_length": MAX_LENGTH},
        }
        options.json.write_text(json.dumps(record | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
