"""One stage: score the references, check the start, train, and leave a finished folder.

While a stage is in progress everything of it lies in a hidden folder of the run; its finished folder appears in one
rename. Nothing but one model, its optimiser and two cached floats a pair is resident.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from sdpo_kernels.integrations.causal_lm import check_head
from sdpo_kernels.stepwise import ranks
from sdpo_kernels.stepwise.callbacks import MetricsWriter, ProgressShower, StopOnSignal
from sdpo_kernels.stepwise.checkpoints import has_random_states, latest_checkpoint
from sdpo_kernels.stepwise.checks import StartGuard, cache_tolerance
from sdpo_kernels.stepwise.collate import PairDataset
from sdpo_kernels.stepwise.ema_reference import EmaReference
from sdpo_kernels.stepwise.errors import Interrupted, UserError
from sdpo_kernels.stepwise.files import empty_folder, publish_folder, read_json, remove_folder, replace_file
from sdpo_kernels.stepwise.manifest import Record, planned
from sdpo_kernels.stepwise.model_card import model_card
from sdpo_kernels.stepwise.models import ADAPTER, Loaded, add_adapter, merge_adapter, release_memory, weights_hash
from sdpo_kernels.stepwise.multi_scoring import BASE_FILE, MultiReferences
from sdpo_kernels.stepwise.precision import asks_for_fsdp
from sdpo_kernels.stepwise.prepare import made_stage
from sdpo_kernels.stepwise.progress import peak_memory_bytes, reset_peak_memory
from sdpo_kernels.stepwise.reference import read_scores, write_scores
from sdpo_kernels.stepwise.reference_settings import EmaSettings, MultiSettings
from sdpo_kernels.stepwise.scores import EVAL_FILE
from sdpo_kernels.stepwise.sources.context import SourceContext
from sdpo_kernels.stepwise.sources.make import PAIRS_FILE, SOURCE_FOLDER, make_pairs
from sdpo_kernels.stepwise.state import Run, Stage
from sdpo_kernels.stepwise.trainer import StageTrainer
from sdpo_kernels.stepwise.weights import check_way, gathered, prepare_fsdp, require_same

__all__ = ["Run", "Stage", "prepare_trainer", "train_stage"]

RECORD = "stage.json"  # a finished stage's record, inside its folder
REFERENCE_FILE = "reference_logps.safetensors"
MULTI = "references"  # in a stage's working folder: what each of several references scores


def train_stage(stage: Stage) -> None:
    """Bring a stage from wherever it is to its finished folder and its `done` in the manifest."""
    if ranks.on_first((stage.folder / RECORD).exists):  # killed between the rename and the manifest's last write
        _adopt(stage)
        return
    started = time.monotonic()
    reset_peak_memory()
    checkpoint = ranks.on_first(lambda: _opened(stage))
    if checkpoint is not None and stage.run.config.reference != "none" and not (stage.work / REFERENCE_FILE).exists():
        stage.run.reporter.warn(f"stage {stage.name}: its {REFERENCE_FILE} is gone and is made again")
    if stage.data.prompts is not None:
        _make_pairs(stage)
    set_seed(stage.args.seed)
    trainer, ref_logps = prepare_trainer(stage)
    step = None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    stage.run.metrics.rewind(stage.index, step)
    if checkpoint is not None:
        stage.args.eval_on_start = False  # that was before the checkpoint
        stage.run.reporter.say(f"stage {stage.name}: going on at step {step}")
        if not has_random_states(checkpoint):
            stage.run.reporter.warn(
                f"stage {stage.name}: {checkpoint.name} was saved by another number of processes, so the states of "
                "random numbers in it are not taken up; batches keep their order, and dropout is off anyway"
            )
    stopped = _fit(stage, trainer, checkpoint)
    steps = trainer.state.global_step
    record = ranks.on_first(lambda: _record(stage, steps, step, time.monotonic() - started))
    staging = _save(stage, trainer, ref_logps)
    del trainer
    release_memory()
    _finish(stage, staging, record)
    if stopped and stage.index < len(stage.run.manifest.stages):
        raise Interrupted(f"stopped after stage {stage.name}, which is finished; the same command goes on from there")


def _opened(stage: Stage) -> Path | None:
    """The stage's working folder is there; its newest complete checkpoint."""
    stage.work.mkdir(parents=True, exist_ok=True)
    return latest_checkpoint(stage.work)


def _record(stage: Stage, steps: int, resumed: int | None, seconds: float) -> Record:
    """The record of a stage that has been trained."""
    lines = stage.run.metrics.of_stage(stage.index)
    return stage.record | {
        "state": "done",
        "steps": steps,
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "resumed_at_step": resumed,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _make_pairs(stage: Stage) -> None:
    """The pairs of a stage that has prompts: made once, then read like any other data."""
    config, settings = stage.run.config, stage.data.config.source
    assert settings is not None
    assert stage.data.prompts is not None
    stage.update({"state": "training"})
    earlier = [
        stage.run.stage_folder(index) / SOURCE_FOLDER
        for index, other in enumerate(config.stages[: stage.index - 1], 1)
        if other.source is not None and other.source.kind == settings.kind
    ]
    ctx = SourceContext(
        name=stage.name, settings=settings, prompts=stage.data.prompts, policy=stage.model_before("previous"),
        initial=config.model, beta=config.stage_beta(stage.data.config), folder=stage.work / SOURCE_FOLDER,
        before=earlier[-1] if earlier else None, tokenizer=stage.run.tokenizer, scorer=stage.scorer,
        reporter=stage.run.reporter,
    )  # fmt: skip
    path = stage.work / PAIRS_FILE
    ranks.on_first(lambda: make_pairs(ctx, settings.kind, path))
    release_memory()
    stage.data = made_stage(config, stage.data.config, stage.run.tokenizer, path, stage.run.reporter)
    tokens = stage.data.tokens
    made = {"pairs": len(tokens), "dropped": len(tokens.dropped), "pairs_hash": tokens.content_hash()}
    if stage.record.get("pairs_hash") not in (None, made["pairs_hash"]):
        raise UserError(f"{path} has changed since its stage was begun; put it back, or choose another output_dir")
    stage.update(made)


def _adopt(stage: Stage) -> None:
    """Enter a folder that was finished before the manifest could say so."""
    record = read_json(stage.folder / RECORD)
    if planned(record) != planned(stage.record):
        raise UserError(f"{stage.folder} was left by another run; move it away or choose another output_dir")
    stage.update(record)
    remove_folder(stage.work)


def prepare_trainer(stage: Stage) -> tuple[StageTrainer, Tensor]:
    """The trainer at the stage's start, its references scored and its head checked."""
    config = stage.run.config
    if asks_for_fsdp(stage.args) and ranks.launched() == 1:
        raise UserError("trainer.fsdp: needs several processes; start them with torchrun (docs/distributed.md)")
    loaded, ref_logps, found = _references(stage)
    stage.use_cache = getattr(loaded.model.config, "use_cache", True)
    before = stage.record.get("reference_hash")
    if before not in (None, found["reference_hash"]):
        raise UserError(
            f"stage {stage.name}: the weights of its reference have changed since the stage was started; "
            "put them back, or choose another output_dir"
        )
    stage.update({"state": "training", **found})
    if config.lora is not None:
        add_adapter(loaded, config.lora)
    _check_head(stage, loaded)
    return _make_trainer(stage, loaded, ref_logps), ref_logps


def _make_trainer(stage: Stage, loaded: Loaded, ref_logps: Tensor) -> StageTrainer:
    """UserError for what transformers refuses only now that it has a model."""
    config = stage.run.config
    eval_dataset = None
    if stage.run.eval_data is not None and stage.args.eval_strategy != "no":
        eval_dataset = stage.run.eval_data.dataset(_eval_reference(stage))
    try:
        trainer = StageTrainer(
            loss=config.loss_sum,
            beta=config.stage_beta(stage.data.config),
            guard=_start_guard(stage, loaded),
            following=EmaReference(loaded.model, config.ema or EmaSettings()) if config.reference == "ema" else None,
            stage=stage.name,
            before_checkpoint=stage.run.metrics.sync,  # what its steps logged must not be lost to a power cut
            model=loaded.model,
            args=stage.args,
            train_dataset=PairDataset(stage.data.tokens, ref_logps),
            eval_dataset=eval_dataset,
            data_collator=stage.scorer.collator(loaded),
            processing_class=stage.run.tokenizer,
        )
        check_way(trainer)
        prepare_fsdp(trainer)
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # those make theirs of their shards
            trainer.create_optimizer()  # now rather than in train(), for what it refuses: a library that is not there
    except (ValueError, ImportError) as error:
        raise UserError(f"stage {stage.name}: trainer: {(str(error).splitlines() or [''])[0]}") from error
    if len(trainer.get_train_dataloader()) == 0:
        raise UserError(f"stage {stage.name}: trainer.dataloader_drop_last drops its only batch; set it to false")
    return trainer


def _start_guard(stage: Stage, loaded: Loaded) -> StartGuard | None:
    """What the first batch is held to: of several references, that the policy scores as its start, the base, did."""
    start = None
    if stage.run.config.reference == "multi":
        start, _ = read_scores(stage.work / MULTI / BASE_FILE, None, len(stage.data.tokens))
    elif not stage.starts_as_reference:
        return None
    tolerance = cache_tolerance(loaded.by_sequence, stage.scorer.precision.dtype, next(loaded.model.parameters()).dtype)
    return StartGuard(stage.name, stage.data.where, stage.run.config.loss_sum.start_value, tolerance, start)


def _references(stage: Stage) -> tuple[Loaded, Tensor, Record]:
    """The policy's starting model, the reference's log-probs [n, 2] and what the manifest keeps of them."""
    config, tokens = stage.run.config, stage.data.tokens
    policy_path = stage.model_before(config.policy)
    if config.reference == "none":
        none: Record = {"reference_hash": None, "gamma_reference": None, "score_seconds": 0.0}
        return _load_checked(stage, policy_path)[0], torch.zeros(len(tokens), 2), none
    if config.multi is not None:
        return _multi_references(stage, config.multi)
    reference_path = stage.model_before(config.reference)
    loaded, reference_hash = _load_checked(stage, reference_path)
    started = time.monotonic()
    label = f"stage {stage.index} {stage.name}: references"
    scores = stage.scorer.cached(loaded, reference_hash, tokens, label, stage.work / REFERENCE_FILE)
    found = {
        "reference_hash": reference_hash,
        "gamma_reference": float((scores[:, 0] - scores[:, 1]).double().mean()),
        "score_seconds": round(time.monotonic() - started, 3),
    }
    if policy_path != reference_path:
        del loaded
        release_memory()
        loaded = _load_checked(stage, policy_path)[0]
    return loaded, scores, found


def _multi_references(stage: Stage, settings: MultiSettings) -> tuple[Loaded, Tensor, Record]:
    """As `_references`: the further references first, each let go of, then the base, which becomes the policy."""
    started, label = time.monotonic(), f"stage {stage.index} {stage.name}"
    references = MultiReferences(settings, stage.scorer, stage.work / MULTI, stage.run.check_weights)
    tokens, evaluation = stage.data.tokens, stage.run.eval_data if stage.args.eval_strategy != "no" else None
    references.score_others({"pairs": tokens} | ({} if evaluation is None else {"eval": evaluation.tokens}), label)
    loaded, base_hash = _load_checked(stage, stage.model_before("multi"))
    base = stage.scorer.cached(loaded, base_hash, tokens, f"{label}: base", references.folder / BASE_FILE)
    key, scores = references.combined_hash(base_hash), references.combine("pairs", base)
    write_scores(stage.work / REFERENCE_FILE, scores, key)
    if evaluation is not None:
        stored = evaluation.stored(_folder_of(stage, stage.model_before("multi")))
        write_scores(references.folder / EVAL_FILE, references.combine("eval", stored), key)
    ranks.wait()
    return (
        loaded,
        scores,
        {
            "reference_hash": key,
            "reference_hashes": references.named_hashes(base_hash),
            "gamma_reference": float((scores[:, 0] - scores[:, 1]).double().mean()),
            "score_seconds": round(time.monotonic() - started, 3),
        },
    )


def _load_checked(stage: Stage, path: str) -> tuple[Loaded, str]:
    """The model in `path` and the hash of its weights, which must be what this run has seen there before."""
    loaded = stage.scorer.load(path)
    digest = weights_hash(loaded.model)
    stage.run.check_weights(path, digest)
    return loaded, digest


def _check_head(stage: Stage, loaded: Loaded) -> None:
    sequence = stage.data.tokens[0].chosen.ids
    try:
        check_head(loaded.model, torch.from_numpy(sequence.astype("int64")).to(stage.args.device))
    except ValueError as error:
        raise UserError(f"stage {stage.name}: {error}") from error


def _eval_reference(stage: Stage) -> Path | None:
    """Where the evaluation pairs' log-probs under this stage's reference lie; None for no reference."""
    reference = stage.run.config.reference
    if reference == "none":
        return None
    return stage.work / MULTI if reference == "multi" else _folder_of(stage, stage.model_before(reference))


def _folder_of(stage: Stage, model: str) -> Path:
    """Where the evaluation log-probs of the initial model or of a stage's lie."""
    return stage.run.folder if model == stage.run.config.model else Path(model)


def _fit(stage: Stage, trainer: StageTrainer, checkpoint: Path | None) -> bool:
    """Train to the stage's end; whether a signal came at its last step. Before that it raises Interrupted, saved."""
    stop = StopOnSignal()
    trainer.add_callback(stop)
    steps_before = sum(record["steps"] for record in stage.run.manifest.stages[: stage.index - 1])
    trainer.add_callback(MetricsWriter(stage.run.metrics, stage.name, stage.index, steps_before))
    label = f"stage {stage.index} {stage.name}"
    with stage.run.reporter.task(label, trainer.planned_steps()) as task, stop.installed(), ranks.training():
        trainer.add_callback(ProgressShower(task, trainer))
        if checkpoint is None:
            trainer.train()
        else:
            trainer.resume(checkpoint)
    trainer.require_finite()
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} of stage {stage.name}, saved; "
            "the same command goes on from there"
        )
    return stop.requested


def _save(stage: Stage, trainer: StageTrainer, ref_logps: Tensor) -> Path:
    """A hidden folder with everything a finished stage holds but its card and its record."""
    trainer.require_finite_weights()
    require_same(trainer.model)
    weights = gathered(trainer)
    return ranks.on_first(lambda: _write(stage, trainer, weights, ref_logps))


def _write(stage: Stage, trainer: StageTrainer, weights: dict[str, Tensor] | None, ref_logps: Tensor) -> Path:
    staging = empty_folder(stage.work / "finished")
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if stage.run.config.lora is not None:
        model.save_pretrained(staging / ADAPTER, state_dict=weights)
        model, weights = merge_adapter(staging / ADAPTER, stage.run.config), None
    else:
        model.config.use_cache = stage.use_cache  # Trainer switched it off, and generation wants it
    model.save_pretrained(staging, state_dict=weights)
    stage.run.tokenizer.save_pretrained(staging)
    if stage.data.config.source is not None:
        shutil.copyfile(stage.work / PAIRS_FILE, staging / PAIRS_FILE)
        shutil.copytree(stage.work / SOURCE_FOLDER, staging / SOURCE_FOLDER)
    if trainer.following is not None:
        trainer.following.save_average(staging)
    cache = stage.work / REFERENCE_FILE
    if stage.run.config.reference == "none":
        write_scores(staging / REFERENCE_FILE, ref_logps, key="reference: none")
    else:
        shutil.copyfile(cache, staging / REFERENCE_FILE)
    return staging


def _finish(stage: Stage, staging: Path, record: Record) -> None:
    """Evaluate what was saved, publish the folder, and say so in the manifest."""
    if stage.run.eval_data is not None:
        record["eval"] = stage.run.eval_data.evaluate(str(staging), staging, stage.scorer)
    replace_file(staging / "README.md", model_card(stage.run.config, record).encode())
    replace_file(staging / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    remove_folder(stage.folder)
    publish_folder(staging, stage.folder)
    stage.update(record)
    remove_folder(stage.work)
    ranks.wait()
