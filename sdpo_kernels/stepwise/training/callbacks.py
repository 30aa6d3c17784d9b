"""What listens to a stage's Trainer: metrics.jsonl, the progress bar, and a clean stop on a signal."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.progress import Task, peak_memory_bytes
from sdpo_kernels.stepwise.common.units import write_bytes
from sdpo_kernels.stepwise.record.manifest import MetricsFile
from sdpo_kernels.stepwise.training.trainer import StageTrainer


class MetricsWriter(TrainerCallback):
    """Writes every logged step to metrics.jsonl."""

    def __init__(self, metrics: MetricsFile, stage: str, index: int, steps_before: int) -> None:
        self.metrics, self.stage, self.index, self.steps_before = metrics, stage, index, steps_before

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """One line a training step or an evaluation; Trainer's closing summary, which is timings, is left out."""
        if not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        head = {
            "stage/name": self.stage,
            "stage/index": self.index,
            "step": state.global_step,
            "stage/global_step": self.steps_before + state.global_step,
        }
        timings = ("runtime", "per_second")
        values = {name: value for name, value in logs.items() if not any(part in name for part in timings)}
        self.metrics.append(head | {name: v if _is_json(v) else str(v) for name, v in values.items()})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last step is logged too, whatever `logging_steps` is."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class ProgressShower(TrainerCallback):
    """Moves a stage's bar."""

    def __init__(self, task: Task, trainer: StageTrainer) -> None:
        self.task, self.trainer = task, trainer
        self.note = ""
        self.clock: float | None = None
        self.rows = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step further; the last one is told by `on_log`, with its figures."""
        if state.global_step < state.max_steps:
            self.task.update(state.global_step, self.note)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Loss, margin, accuracy, speed and memory as last logged."""
        if not logs or "loss" not in logs:
            return
        now, rows = time.monotonic(), self.trainer.rows_seen
        speed = f"  {(rows - self.rows) / (now - self.clock):,.0f} tok/s" if self.clock else ""
        self.clock, self.rows = now, rows
        self.note = (
            f"loss {logs['loss']:.4f}  margin {logs['rewards/margins']:+.3f}  acc {logs['rewards/accuracies']:.2f}"
            f"{speed}  peak {write_bytes(peak_memory_bytes())}"
        )
        self.task.update(state.global_step, self.note)


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save, stop. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False  # here or in another process
        self.signalled = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listen for the signals, in the main thread (others may not)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask Trainer for a checkpoint and an end, where any process has been asked."""
        self.requested = ranks.total(int(self.requested)) > 0
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


def _is_json(value: Any) -> bool:
    return isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
