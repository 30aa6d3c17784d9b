"""One stage's `transformers.Trainer`: the fused loss on pairs, TRL's metric names, whole checkpoints, a clean stop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdpo_kernels.dpo import DPOOutput, pair_output
from sdpo_kernels.stepwise.checkpoints import AtomicCheckpoints
from sdpo_kernels.stepwise.checks import StartGuard
from sdpo_kernels.stepwise.collate import Batch
from sdpo_kernels.stepwise.errors import UserError
from sdpo_kernels.stepwise.manifest import MetricsFile
from sdpo_kernels.stepwise.progress import Task, gigabytes, peak_memory_bytes


class StageTrainer(AtomicCheckpoints, Trainer):
    """Trains one stage. `loss` holds pair_output's options: loss_type, beta and the loss's own."""

    def __init__(self, *, loss: dict[str, Any], guard: StartGuard | None, stage: str, **trainer: Any) -> None:
        super().__init__(**trainer)
        self.remove_callback(PrinterCallback)
        self.loss_settings = loss
        self.guard = guard
        self.stage = stage
        self._metrics: dict[str, dict[str, list[Tensor]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._all_finite: Tensor | None = None
        self.rows_seen = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The stage's loss, mean over the pairs of the batch."""
        batch = Batch.of(inputs)
        guard, self.guard = (self.guard, None) if model.training else (None, self.guard)
        fresh = None if guard is None else self._score_afresh(model, batch)
        sums = batch.logps(model)
        out = pair_output(sums, batch.ref_logps, batch.rows.counts, **self.loss_settings)
        if guard is not None and fresh is not None:
            guard.check(batch.pair_index, sums, fresh, batch.ref_logps, float(out.loss.detach()))
        self._remember(out, model.training)
        if model.training:
            self.rows_seen += batch.model_inputs["input_ids"].numel()
        return (out.loss, {"logps": sums}) if return_outputs else out.loss

    def _score_afresh(self, model: nn.Module, batch: Batch) -> Tensor:
        model.eval()
        with torch.no_grad():
            fresh = batch.logps(model)
        model.train()
        return fresh

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Evaluation needs the loss alone; the metrics are collected beside it."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _remember(self, out: DPOOutput, training: bool) -> None:
        """Keep the batch's metrics as tensors: reading them here would wait for the device at every step."""
        metrics = self._metrics["train" if training else "eval"]
        metrics["rewards/chosen"].append(out.chosen_rewards.mean())
        metrics["rewards/rejected"].append(out.rejected_rewards.mean())
        metrics["rewards/accuracies"].append(out.accuracy.mean())
        metrics["rewards/margins"].append(out.margins.mean())
        metrics["logps/chosen"].append(out.chosen_logps.mean())
        metrics["logps/rejected"].append(out.rejected_logps.mean())
        if training:
            finite = torch.isfinite(out.loss.detach())
            self._all_finite = finite if self._all_finite is None else self._all_finite & finite

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with the pair metrics, averaged over what was seen since the last one."""
        self.require_finite()
        kind = "train" if "loss" in logs else "eval" if "eval_loss" in logs else None
        if kind is not None:
            prefix = "" if kind == "train" else "eval_"
            for name, values in self._metrics[kind].items():
                logs[prefix + name] = torch.stack(values).mean().item()
            self._metrics[kind].clear()
        super().log(logs, start_time)

    def planned_steps(self) -> int:
        """How many optimiser steps the stage will take."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        steps = -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
        return math.ceil(steps * self.args.num_train_epochs)

    def require_finite(self) -> None:
        """UserError where a loss was NaN or infinite: the weights would turn NaN at the next step, or have."""
        if self._all_finite is not None and not bool(self._all_finite):
            raise UserError(
                f"stage {self.stage}: the loss became NaN or infinite at step {self.state.global_step} or shortly "
                "before; the last complete checkpoint is kept. Usual causes: a learning rate too high, fp16 without "
                "range (use bf16), or weights that were broken before"
            )
        self._all_finite = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite()
        super()._save_checkpoint(model, trial)


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

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What the checkpoint's steps logged must not be lost to a power cut after it."""
        self.metrics.sync()


class ProgressShower(TrainerCallback):
    """Moves a stage's bar."""

    def __init__(self, task: Task, trainer: StageTrainer) -> None:
        self.task, self.trainer = task, trainer
        self.note = ""
        self.clock: float | None = None
        self.rows = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step further."""
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
            f"{speed}  peak {gigabytes(peak_memory_bytes())}"
        )


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, save, stop. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False

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
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask Trainer for a checkpoint and an end."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


def _is_json(value: Any) -> bool:
    return isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
