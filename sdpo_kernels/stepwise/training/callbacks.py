"""Callbacks of a stage's Trainer: metrics.jsonl, the progress bar, and a clean stop on a signal."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.memory import peak_memory_bytes
from sdpo_kernels.stepwise.common.progress import Task
from sdpo_kernels.stepwise.common.units import write_bytes
from sdpo_kernels.stepwise.record.manifest import MetricsFile
from sdpo_kernels.stepwise.training.trainer import StageTrainer

STOPPED_AT_ONCE = (
    "stopped at once: the steps since the last checkpoint are lost and will be trained again; run the same "
    "command again to resume"
)


class MetricsWriter(TrainerCallback):
    """Writes every logged step to metrics.jsonl."""

    def __init__(self, metrics: MetricsFile, stage: str, index: int, steps_before: int) -> None:
        self.metrics, self.stage, self.index, self.steps_before = metrics, stage, index, steps_before

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Write one line per logged step or evaluation."""
        # Trainer's summary at the end has neither loss: it is timings only
        if not logs or not ("loss" in logs or "eval_loss" in logs):
            return

        head = {
            "stage/name": self.stage,
            "stage/index": self.index,
            "step": state.global_step,
            "stage/global_step": self.steps_before + state.global_step,
        }

        # timings differ between equal runs, and a resumed run must write the same lines
        timings = ("runtime", "per_second")
        values = {name: value for name, value in logs.items() if not any(part in name for part in timings)}
        self.metrics.append(head | {name: v if _is_json(v) else str(v) for name, v in values.items()})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log the last step too, whatever `logging_steps` is."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class ProgressShower(TrainerCallback):
    """Updates a stage's progress bar."""

    def __init__(self, task: Task, trainer: StageTrainer) -> None:
        self.task, self.trainer = task, trainer
        self.note = ""
        self.clock: float | None = None
        self.rows = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance by one step; the last step is left to `on_log`, which has its metrics."""
        if state.global_step < state.max_steps:
            self.task.update(state.global_step, self.note)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show loss, margin, accuracy, speed and peak memory as last logged."""
        if not logs or "loss" not in logs:
            return

        # the first log has no earlier one to measure speed from
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

    def __init__(self, say: Callable[[str], None] = lambda message: None) -> None:
        self.say = say
        self.requested = False  # on any rank
        self.signalled = False  # on this rank

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals within the block. Only the main thread may; in others this does nothing."""
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
            raise KeyboardInterrupt(STOPPED_AT_ONCE)
        self.signalled = self.requested = True
        self.say("stopping after this step, which is saved; Ctrl-C again stops at once, without saving")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make Trainer save a checkpoint and stop if any rank has had a signal."""
        self.requested = ranks.total(int(self.requested)) > 0
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


def _is_json(value: Any) -> bool:
    return isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
