"""The memory plan of a run: of the stage that takes most, from its own pairs and the order of its batches.

found = plan_run(config, model_config, stages, None, Target(gpus=8, memory=80 * 2**30), shared=True)
found.plan.total
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.data.order import StageData
from sdpo_kernels.stepwise.data.schedule import Schedule
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.memory.batch import Lengths, MicroBatch, largest, largest_scored, longest
from sdpo_kernels.stepwise.memory.plan import Plan
from sdpo_kernels.stepwise.memory.setup import Setup
from sdpo_kernels.stepwise.memory.sizes import Measured
from sdpo_kernels.stepwise.memory.target import Target
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments


class NotPlanned(Exception):
    """Why a run has no plan."""


@dataclass(frozen=True)
class Task:
    """What is trained: all of it stays the same when the setup changes."""

    model: Measured
    lengths: Lengths  # of the pairs that are trained on
    packed: bool
    shared: bool  # prompts go through the model once for both answers
    evaluated: Lengths | None = None  # of eval_data

    def plan(self, setup: Setup, batch: MicroBatch | None = None) -> Plan:
        """The plan with `setup`; without a `batch` the longest pairs come together. NotPlanned if the model fails."""
        lengths = self.lengths.cut(setup.max_length)
        if batch is None:
            batch = longest(lengths, setup.pairs, packed=self.packed, shared=self.shared)
        of_all = [lengths] if self.evaluated is None else [lengths, self.evaluated.cut(setup.max_length)]
        batches = (largest_scored(a, setup.scored_pairs, packed=self.packed, shared=self.shared) for a in of_all)
        try:
            return Plan.of(self.model, batch, max(batches), setup)
        except Exception as error:  # the model's own code runs, and may need values
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise NotPlanned(f"this model's code does not run on tensors without values ({reason})") from error


@dataclass(frozen=True)
class PlannedRun:
    """The plan of the stage that takes most."""

    stage: str
    task: Task
    plan: Plan


def plan_run(
    config: RunConfig,
    model_config: Any,
    stages: Sequence[StageData],
    eval_tokens: TokenizedPairs | None,
    target: Target | None,
    *,
    shared: bool,
) -> PlannedRun:
    """Plan every stage on the target's GPUs, or on this process's device if there is none; the one that takes most.

    Stages with equal settings are planned by their largest micro-batch. A stage that generates its pairs is planned
    with pairs of max_length. If pairs change their stage before training (orders margin and random), the longest of all
    stages are taken together. NotPlanned for DeepSpeed, for another `tp_size` than GPUs, and if the model's code needs
    values.
    """
    if config.trainer.get("deepspeed"):
        raise NotPlanned("DeepSpeed divides weights and states in its own way")
    packed = config.batching == "packed"
    device = "cuda" if target is not None or torch.cuda.is_available() else "cpu"
    goal = _goal(config, target)
    evaluated = None if eval_tokens is None else Lengths.of(eval_tokens)
    model = Measured(model_config, trust_remote_code=config.trust_remote_code)

    # of stages with equal settings the largest micro-batch counts
    found: list[tuple[str, Task, Setup, MicroBatch]] = []
    for stage, lengths in zip(stages, _all_lengths(config, stages), strict=True):
        args = training_arguments(config, stage.config, Path(config.output_dir), Path(config.output_dir))
        setup = Setup.of(config, args, goal.gpus, device, goal.memory)
        task = Task(model, lengths, packed, shared, evaluated)
        schedule = Schedule.of(len(lengths.chosen), args, setup.replicas) if _order_is_known(config, stage) else None
        task, batch = _largest(task, setup, schedule)

        before = next((number for number, other in enumerate(found) if other[2] == setup), None)
        if before is None:
            found.append((stage.config.name, task, setup, batch))
        elif batch.tokens > found[before][3].tokens:
            found[before] = (stage.config.name, task, setup, batch)

    plans = [PlannedRun(name, task, task.plan(setup, batch)) for name, task, setup, batch in found]
    return max(plans, key=lambda planned: planned.plan.total)


def _goal(config: RunConfig, target: Target | None) -> Target:
    """The GPUs to plan for; with `tp_size` that many, as a run needs them. NotPlanned if the target has others."""
    goal = target or Target(ranks.launched())
    if config.tp_size == 1:
        return goal
    if goal.gpus not in (1, config.tp_size):
        raise NotPlanned(f"tp_size: was {config.tp_size} with {goal.gpus} GPUs, must be as many")
    return replace(goal, gpus=config.tp_size)


def _order_is_known(config: RunConfig, stage: StageData) -> bool:
    """Whether the stage's pairs are those that it will train on, in an order that depends on settings alone."""
    return stage.prompts is None and config.order not in ("margin", "random")


def _all_lengths(config: RunConfig, stages: Sequence[StageData]) -> list[Lengths]:
    """The lengths of each stage's pairs; those of all stages for each if pairs change their stage."""
    lengths = [_lengths(config, stage) for stage in stages]
    if config.order not in ("margin", "random"):
        return lengths
    return [functools.reduce(Lengths.joined, lengths)] * len(stages)


def _lengths(config: RunConfig, stage: StageData) -> Lengths:
    if stage.prompts is None:
        return Lengths.of(stage.tokens)
    settings = config.trainer | stage.config.trainer
    return Lengths.longest(config.max_length, int(settings["per_device_train_batch_size"]))


def _largest(task: Task, setup: Setup, schedule: Schedule | None) -> tuple[Task, MicroBatch]:
    """The task with the pairs that the steps train on, and its largest micro-batch; without a schedule the longest."""
    if schedule is None or schedule.batches == 0:
        return task, longest(task.lengths, setup.pairs, packed=task.packed, shared=task.shared)
    batch = largest(task.lengths, schedule, setup.replicas, packed=task.packed, shared=task.shared)
    return replace(task, lengths=task.lengths.take(schedule.used())), batch
