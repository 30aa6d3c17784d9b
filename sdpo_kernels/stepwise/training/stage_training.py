"""Training one stage: make and check its Trainer, then run it to the stage's end.

    trainer = make_trainer(stage, start)
    stopped = train_to_end(stage, trainer, checkpoint)

Saving and publishing the result is in `publish`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from sdpo_kernels.integrations.causal_lm import check_head
from sdpo_kernels.integrations.cut_weights import reshard
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
    """The stage's Trainer, checked as far as possible without a training step.

    1. Try the fused head on one sequence.
    2. Make the Trainer, with the guard for its first batch and, with `reference: ema`, the moving reference.
    3. Check the distributed setup and configure FSDP2.
    4. Create the optimizer.

    UserError if the head is wrong, or if transformers refuses a setting or lacks a library.
    """
    config, loaded = stage.run.config, start.loaded
    ranks.agree(lambda: _check_head(stage, loaded))
    reshard(loaded.model)  # training and checkpoints need the shards

    try:
        trainer = StageTrainer(
            loss=config.loss_sum,
            beta=config.stage_beta(stage.data.config),
            guard=_start_guard(stage, loaded),
            following=EmaReference(loaded.model, config.ema or EmaSettings()) if config.reference == "ema" else None,
            stage=stage.name,
            where=stage.data.where,
            schedule=stage.schedule,
            before_checkpoint=partial(_keep_record, stage),
            model=loaded.model,
            args=stage.args,
            train_dataset=PairDataset(stage.data.tokens, start.ref_logps),
            eval_dataset=stage.references.eval_dataset(),
            data_collator=stage.scorer.collator(loaded),
            processing_class=stage.run.tokenizer,
        )
        check_way(trainer)
        prepare_fsdp(trainer)

        # Create the optimizer here, so that a missing library is reported before training starts.
        # FSDP and DeepSpeed create theirs from the shards, in train().
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer()
    except (ValueError, ImportError) as error:
        raise UserError(f"stage {stage.name}: trainer: {(str(error).splitlines() or [''])[0]}") from error
    return trainer


def _keep_record(stage: Stage) -> None:
    """Write what belongs to a checkpoint's steps: a power cut must not lose their metrics, nor the time they took."""
    stage.run.metrics.sync()
    stage.keep_spent()


def train_to_end(stage: Stage, trainer: StageTrainer, checkpoint: Path | None, step: int) -> bool:
    """Train from `checkpoint`, which has `step` steps, or from the start, to the stage's last step.

    Returns whether a signal came during that last step. If one came earlier, a checkpoint is saved and Interrupted
    raised. A signal on one rank stops all.
    """
    stop = StopOnSignal(stage.run.reporter.say)
    trainer.add_callback(stop)

    # metrics count steps over the whole run too
    steps_before = sum(record["steps"] for record in stage.run.manifest.stages[: stage.index - 1])
    trainer.add_callback(MetricsWriter(stage.run.metrics, stage.name, stage.index, steps_before))

    # within ranks.training() an error on one rank ends it at once: the others are waiting for its gradients
    shown = stage.run.reporter.task(stage.label, stage.schedule.steps, step, stage=stage.index)
    with shown as task, stop.installed(), ranks.training():
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
    """Say that the stage resumes at `step`; warn if the checkpoint is from another number of processes."""
    stage.run.reporter.say(f"{stage.label}: resuming at step {step}")
    if not has_random_states(checkpoint):
        stage.run.reporter.warn(
            f"{stage.label}: {checkpoint.name} was saved with another number of processes, so its RNG states are "
            "ignored; batches keep their order, and dropout is off anyway"
        )


def _start_guard(stage: Stage, loaded: Loaded) -> StartGuard | None:
    """The checks of the first batch; None if there are no scores of the policy's start to compare with."""
    start_logps = stage.references.policy_start_logps()
    if start_logps is None and not stage.starts_as_reference:
        return None

    config = stage.run.config
    weights = torch.bfloat16 if config.is_low_precision else torch.float32
    tolerance = cache_tolerance(loaded.by_sequence, stage.scorer.precision.dtype, weights)
    return StartGuard(stage.name, stage.data.where, config.loss_sum.start_value, tolerance, start_logps)


def _check_head(stage: Stage, loaded: Loaded) -> None:
    """UserError if the fused head does not give the model's own log-probs on the stage's first sequence."""
    sequence = stage.data.tokens[0].chosen.ids
    try:
        check_head(loaded.model, torch.from_numpy(sequence.astype("int64")).to(stage.args.device))
    except ValueError as error:
        raise UserError(f"stage {stage.name}: {error}") from error
