"""One stage: generate its pairs if it has prompts, score its references, train, and publish a finished folder.

While a stage is in progress, all its files are in a hidden folder of the run; its finished folder appears in one
rename. Only one model, its optimizer and two cached floats a pair are resident.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import set_seed

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import Interrupted, UserError
from sdpo_kernels.stepwise.common.memory import reset_peak_memory
from sdpo_kernels.stepwise.models.load import add_adapter, release_memory
from sdpo_kernels.stepwise.models.sharded import check_checkpoint
from sdpo_kernels.stepwise.prepare import generated_stage
from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.record.samples import PAIRS_FILE
from sdpo_kernels.stepwise.references.stage_references import REFERENCE_FILE
from sdpo_kernels.stepwise.sources.generation import generated_by
from sdpo_kernels.stepwise.sources.make import SOURCE_FOLDER, make_pairs, stage_context
from sdpo_kernels.stepwise.state import Stage
from sdpo_kernels.stepwise.training import publish
from sdpo_kernels.stepwise.training.checkpoints import latest_checkpoint
from sdpo_kernels.stepwise.training.end_guard import check_saved, score_trained
from sdpo_kernels.stepwise.training.stage_training import announce_resume, make_trainer, train_to_end
from sdpo_kernels.stepwise.training.trainer import StageTrainer


def train_stage(stage: Stage) -> None:
    """Train a stage from wherever it stopped to its finished folder.

    1. A folder that was published just before a crash only needs its record in the manifest.
    2. Find the newest complete checkpoint, if the stage was stopped before.
    3. If the stage has prompts, generate its pairs, unless they are there.
    4. Score the references, or read them from the cache, and make the Trainer.
    5. Drop metrics past the checkpoint, then train from there, or from the start.
    6. Make sure there is a checkpoint of the last step, and score a few pairs with the trained model.
    7. Save the stage, and check that what was saved scores these pairs alike.
    8. Evaluate and publish the stage, and record it in the manifest.

    On several ranks all train; only rank 0 writes and logs.

    Raises:
        UserError: what the user can fix; everything complete so far is kept.
        Interrupted: after Ctrl-C or SIGTERM, with everything saved.
    """
    if publish.is_published(stage):
        publish.record_published(stage)
        if stage.run.reporter.overall is not None:
            stage.run.reporter.overall.stages[stage.index - 1] = stage.plan
        return
    reset_peak_memory()
    try:
        _train(stage)
    except (Exception, KeyboardInterrupt):
        # what is spent so far counts when the stage resumes; a full disk must not hide the first error
        if stage.record["state"] == "training":
            with suppress(UserError):
                stage.keep_spent()
        raise


def _train(stage: Stage) -> None:
    """Steps 2 to 8 of `train_stage`."""

    # only rank 0 looks, so that all ranks resume from the same checkpoint
    checkpoint = ranks.on_first(lambda: _newest_checkpoint(stage))
    if checkpoint is not None:
        ranks.agree(partial(check_checkpoint, checkpoint, stage.args))  # before anything is scored
    step = None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    if checkpoint is not None and stage.run.config.reference != "none" and not (stage.work / REFERENCE_FILE).exists():
        stage.run.reporter.warn(f"{stage.label}: its {REFERENCE_FILE} is missing and is recomputed")

    # the seed after the pairs: generating them may draw random numbers, and a resumed stage does not
    if stage.data.prompts is not None:
        _generate_pairs(stage)
    set_seed(stage.args.seed)
    trainer, ref_logps = prepare_trainer(stage)

    # Metrics past the checkpoint belong to steps that are trained again.
    stage.run.metrics.rewind(stage.index, step)
    if checkpoint is not None and step is not None:
        stage.args.eval_on_start = False  # that evaluation was before the checkpoint
        announce_resume(stage, checkpoint, step)
    stopped = train_to_end(stage, trainer, checkpoint, step or 0)

    # from here on nothing that fails loses what was trained
    trainer.keep_last_step()
    trained = score_trained(stage, trainer)

    steps = trainer.state.global_step
    record = ranks.on_first(lambda: _record(stage, steps, step))
    with stage.run.reporter.waiting(f"{stage.label}: saving"):
        staging = publish.save(stage, trainer, ref_logps)
    del trainer  # what follows loads the model that was saved
    release_memory()
    check_saved(stage, staging, trained)
    publish.publish(stage, staging, record, trained.checkpoint)

    # a signal in the last step: the stage is done, the run is not
    if stopped and stage.index < len(stage.run.manifest.stages):
        raise Interrupted(f"stopped after stage {stage.name}, which is finished; run the same command again to resume")


def prepare_trainer(stage: Stage) -> tuple[StageTrainer, Tensor]:
    """The Trainer at the stage's start, and the reference's log-probs [n, 2] that its pairs are compared with.

    1. Score the references of the pairs that are trained on, or read them from the cache if the stage resumes.
    2. Check that they are those the stage started with.
    3. With LoRA, add an adapter to the policy.
    4. Make the Trainer, and record in the manifest that the stage has started.

    UserError if a model cannot be loaded or has changed, if there is no batch, or if transformers refuses a setting.
    """
    config = stage.run.config
    if stage.schedule.batches == 0:
        raise UserError(f"stage {stage.name}: trainer.dataloader_drop_last drops its only batch; set it to false")
    start = stage.references.score()

    # Trainer switches it off; the saved config gets it back
    stage.use_cache = getattr(start.loaded.model.config, "use_cache", True)

    # A resumed stage must continue with the reference it started with.
    before = stage.record.get("reference_hash")
    if before not in (None, start.record["reference_hash"]):
        raise UserError(
            f"stage {stage.name}: the weights of its reference have changed since the stage started; "
            "put them back, or choose another output_dir"
        )

    if config.lora is not None:
        add_adapter(start.loaded, config.lora)
    trainer = make_trainer(stage, start)
    # only now: of a stage that has started, a setting that Trainer refuses could not be corrected
    stage.update({"state": "training", **start.record})
    return trainer, start.ref_logps


def _newest_checkpoint(stage: Stage) -> Path | None:
    stage.work.mkdir(parents=True, exist_ok=True)
    return latest_checkpoint(stage.work)


def _generate_pairs(stage: Stage) -> None:
    """Generate the pairs of a stage that has prompts, unless they are there, and read them like any other data."""
    settings = stage.data.config.source
    assert settings is not None
    stage.update({"state": "training"})
    path = stage.work / PAIRS_FILE
    ranks.on_first(lambda: make_pairs(stage_context(stage), settings.kind, path))
    release_memory()
    if answered := ranks.on_first(lambda: generated_by(stage.work / SOURCE_FOLDER)):
        stage.update({"generation": answered})

    # pairs that a stopped stage has generated are not generated again, so they must be the same
    run, skipped = stage.run, stage.data.skipped
    stage.data = generated_stage(run.config, stage.data.config, run.tokenizer, path, run.reporter, run.template_time)
    if run.reporter.overall is not None:
        run.reporter.overall.stages[stage.index - 1] = stage.plan
    tokens = stage.data.tokens
    counts = {
        "pairs": len(tokens),
        "dropped": len(tokens.dropped),
        "skipped": skipped + stage.data.skipped,  # of the prompts' files and of the generated pairs
        "cut_pairs": tokens.cut_pairs,
        "lost_tokens": tokens.lost_tokens,
        "pairs_hash": tokens.content_hash(),
    }
    if stage.record.get("pairs_hash") not in (None, counts["pairs_hash"]):
        raise UserError(f"{path} has changed since its stage started; put it back, or choose another output_dir")
    stage.update(counts)
    if note := stage.schedule.note(stage.name):
        run.reporter.say(note)


def _record(stage: Stage, steps: int, resumed: int | None) -> Record:
    """The manifest record of a trained stage."""
    lines = stage.run.metrics.of_stage(stage.index)
    return stage.record | {
        "state": "done",
        "steps": steps,
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "resumed_at_step": resumed,
        "weights": "full" if stage.run.config.publishes_merged else "adapter",
        **stage.spent(),
    }
