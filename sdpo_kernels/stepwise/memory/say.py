"""What `sdpo check` prints about memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdpo_kernels.stepwise.data.order import StageData
from sdpo_kernels.stepwise.memory.changes import changes
from sdpo_kernels.stepwise.memory.of_run import PlannedRun, plan_run
from sdpo_kernels.stepwise.memory.table import change_lines, line, table
from sdpo_kernels.stepwise.memory.target import Target
from sdpo_kernels.stepwise.settings.run_settings import RunConfig


def memory_lines(
    config: RunConfig, model_config: Any, stages: Sequence[StageData], *, target: Target | None, shared: bool
) -> list[str]:
    """The plan in one line; with a `target` also the table and, if it does not fit, what to change."""
    if config.trainer.get("deepspeed"):
        return ["not planned: DeepSpeed divides weights and states in its own way"]

    # without a target it is this process's device
    device = "cuda" if target is not None or torch.cuda.is_available() else "cpu"
    goal = target or Target()
    try:
        found = plan_run(
            config, model_config, stages, gpus=goal.gpus, memory=goal.memory, shared=shared, device=device
        )
        return _lines(found, target)
    except Exception as error:  # tracing runs the model's own code, which may do what tensors without values cannot
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return [f"not planned: this model's code does not run on tensors without values ({reason})"]


def _lines(found: PlannedRun, target: Target | None) -> list[str]:
    plan = found.plan
    lines = [f"{line(plan)} (stage {found.stage})"]
    if target is None:
        return lines

    lines += ["", *table(plan)]
    if not plan.fits:
        quantises = "quantization" in RunConfig.model_fields
        lines += ["", *change_lines(changes(found.task, plan.setup, quantises=quantises))]
    return lines
