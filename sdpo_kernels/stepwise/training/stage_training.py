"""The training of one stage: its Trainer, made and checked, and run to the stage's end.

trainer = make_trainer(stage, start)
stopped = train_to_end(stage, trainer, checkpoint)
"""

from __future__ import annotations

from pathlib import Path

import torch

from sdpo_kernels.integrations.causal_lm import check_head
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import Interrupted, UserError
from sdpo_kernels.stepwise.data.batches import PairDataset
from sdpo_kernels.stepwise.models.load import Loaded
from sdpo_kernels.stepwise.models.sharded import check_way, prepare_fsdp
from sdpo_kernels.stepwise.references.ema import EmaReference
from sdpo_kernels.stepwise.references.stage_references import StageStart
from sdpo_kernels.stepwise.settings.reference import EmaSettings
from sdpo_kernels.stepwise.state import Stage
from sdpo_kernels.stepwise.training.callbacks import MetricsWriter, ProgressShower, StopOnSignal
from sdpo_kernels.stepwise.training.checkpoints import has_random_states
from sdpo_kernels.stepwise.training.start_guard import StartGuard, cache_tolerance
from sdpo_kernels.stepwise.training.trainer import StageTrainer


def make_trainer(stage: Stage, start: StageStart) -> StageTrainer:
    """The stage's Trainer. UserError for what transformers refuses only once it has a model."""
    config, loaded = stage.run.config, start.loaded
    _check_head(stage, loaded)

    try:
        trainer = StageTrainer(
            loss=config.loss_sum,
            beta=config.stage_beta(stage.data.config),
            guard=_start_guard(stage, loaded),
            following=EmaReference(loaded.model, config.ema or EmaSettings()) if config.reference == "ema" else None,
            stage=stage.name,
            before_checkpoint=stage.run.metrics.sync,  # a power cut must not lose what the checkpoint's steps logged
            model=loaded.model,
            args=stage.args,
            train_dataset=PairDataset(stage.data.tokens, start.ref_logps),
            eval_dataset=stage.references.eval_dataset(),
            data_collator=stage.scorer.collator(loaded),
            processing_class=stage.run.tokenizer,
        )
        check_way(trainer)
        prepare_fsdp(trainer)

        # Create the optimizer now, so that a missing optimizer library stops the run here and not in train().
        # FSDP and DeepSpeed create theirs from their shards.
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer()
    except (ValueError, ImportError) as error:
        raise UserError(f"stage {stage.name}: trainer: {(str(error).splitlines() or [''])[0]}") from error

    if len(trainer.get_train_dataloader()) == 0:
        raise UserError(f"stage {stage.name}: trainer.dataloader_drop_last drops its only batch; set it to false")
    return trainer


def train_to_end(stage: Stage, trainer: StageTrainer, checkpoint: Path | None) -> bool:
    """Train from `checkpoint`, or from the start, to the stage's last step.

    Returns whether a signal asked to stop at that last step. Interrupted, with everything saved, if one came earlier.
    """
    stop = StopOnSignal()
    trainer.add_callback(stop)
    steps_before = sum(record["steps"] for record in stage.run.manifest.stages[: stage.index - 1])
    trainer.add_callback(MetricsWriter(stage.run.metrics, stage.name, stage.index, steps_before))

    with stage.run.reporter.task(stage.label, trainer.planned_steps()) as task, stop.installed(), ranks.training():
        trainer.add_callback(ProgressShower(task, trainer))
        if checkpoint is None:
            trainer.train()
        else:
            trainer.resume(checkpoint)

    trainer.require_finite()
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} of stage {stage.name}, saved; "
            "run the same command again to resume"
        )
    return stop.requested


def announce_resume(stage: Stage, checkpoint: Path, step: int) -> None:
    """Say that the stage resumes at `step`, and what a checkpoint of another number of processes means."""
    stage.run.reporter.say(f"stage {stage.name}: resuming at step {step}")
    if not has_random_states(checkpoint):
        stage.run.reporter.warn(
            f"stage {stage.name}: {checkpoint.name} was saved by another number of processes, so its RNG states are "
            "ignored; batches keep their order, and dropout is off anyway"
        )


def _start_guard(stage: Stage, loaded: Loaded) -> StartGuard | None:
    """The checks of the first batch; None where the policy does not start as a reference that was scored."""
    start_logps = stage.references.policy_start_logps()
    if start_logps is None and not stage.starts_as_reference:
        return None
    tolerance = cache_tolerance(loaded.by_sequence, stage.scorer.precision.dtype, next(loaded.model.parameters()).dtype)
    return StartGuard(stage.name, stage.data.where, stage.run.config.loss_sum.start_value, tolerance, start_logps)


def _check_head(stage: Stage, loaded: Loaded) -> None:
    """UserError where the fused head does not give the model's own log-probs, tried on one sequence."""
    sequence = stage.data.tokens[0].chosen.ids
    try:
        check_head(loaded.model, torch.from_numpy(sequence.astype("int64")).to(stage.args.device))
    except ValueError as error:
        raise UserError(f"stage {stage.name}: {error}") from error
