"""What a trainer's script shares: its arguments, and what it writes down of every step.

options = parse_options(("stock", "adapter"))
recorder = Recorder()
…make the trainer…; recorder.watch(trainer)
recorder.run(trainer.train)
recorder.write(options, ["llamafactory", "transformers"], replaced=["llamafactory.train…CustomDPOTrainer"])
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure


def parse_options(ways: Sequence[str]) -> argparse.Namespace:
    """--way, --steps, --problem, --output (the trainer's own folder) and --answer, of `benchmarks.trainers`."""
    logging.basicConfig(level=logging.INFO)  # what an adapter says must be in the log
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=ways, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--problem", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--answer", type=Path, required=True)
    return parser.parse_args()


class Recorder:
    """Losses and times of the steps, and the peak memory of training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.peak: int | None = None

    def step(self, loss: float) -> None:
        """A step has ended."""
        self.losses.append(float(loss))
        self.ends.append(time.perf_counter())

    def watch(self, trainer: Any) -> None:
        """Record the steps of a transformers Trainer, without gradient accumulation; its own log rounds the losses."""
        from transformers import TrainerCallback

        recorder, training_step = self, trainer.training_step
        losses: list[torch.Tensor] = []

        def step(*args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(training_step(*args, **kwargs))
            return losses[-1]

        class End(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                recorder.step(losses[-1].item())

        trainer.training_step = step
        trainer.add_callback(End())

    def run(self, train: Callable[[], Any]) -> None:
        """Call `train` and keep its peak memory."""
        start = time.perf_counter()
        self.peak = measure.peak_extra_bytes(train, torch.device("cpu"))
        self.ends.insert(0, start)

    def write(self, options: argparse.Namespace, packages: Sequence[str], replaced: Sequence[str] = ()) -> None:
        """Write the answer that `benchmarks.trainers` reads."""
        if len(self.losses) != options.steps:
            raise RuntimeError(f"the trainer took {len(self.losses)} steps, must be {options.steps}")
        answer = {
            "times_s": [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)],
            "losses": self.losses,
            "peak_extra_bytes": self.peak,
            "replaced": list(replaced),
            "versions": {package: metadata.version(package) for package in ("torch", *packages)},
        }
        options.answer.write_text(json.dumps(answer) + "\n", encoding="utf-8")
