"""Publishing a trained stage: saved into a hidden folder, evaluated, then renamed to its finished folder.

A kill at any moment leaves either no finished folder or a complete one, with its own record for the manifest in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sdpo_kernels.integrations.cut_weights import is_cut
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import empty_folder, publish_folder, read_json, remove_folder, replace_file
from sdpo_kernels.stepwise.models.cut_saving import save_pieces, weights_of
from sdpo_kernels.stepwise.models.load import ADAPTER
from sdpo_kernels.stepwise.models.merge import merge_adapter, merge_in_pieces
from sdpo_kernels.stepwise.models.saving import copy_beside, say_dtype
from sdpo_kernels.stepwise.models.sharded import gathered, in_pieces, require_same
from sdpo_kernels.stepwise.record.changes import planned
from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.record.model_cards import model_card
from sdpo_kernels.stepwise.record.samples import PAIRS_FILE
from sdpo_kernels.stepwise.references.cache import write_scores
from sdpo_kernels.stepwise.references.stage_references import REFERENCE_FILE
from sdpo_kernels.stepwise.sources.make import SOURCE_FOLDER
from sdpo_kernels.stepwise.state import Stage
from sdpo_kernels.stepwise.training.trainer import StageTrainer

RECORD = "stage.json"  # a finished stage's record, inside its folder


def is_published(stage: Stage) -> bool:
    """Whether the stage's finished folder exists, whatever the manifest says: a crash can come between the two."""
    return ranks.on_first((stage.folder / RECORD).exists)


def record_published(stage: Stage) -> None:
    """Record in the manifest a stage folder that was published just before a crash.

    On every rank: each has the manifest in memory, and later stages read from it; only rank 0 writes files.
    """
    record = read_json(stage.folder / RECORD)
    if planned(record) != planned(stage.record):
        raise UserError(f"{stage.folder} is from another run; move it away or choose another output_dir")
    stage.update(record)
    remove_folder(stage.work)


def save(stage: Stage, trainer: StageTrainer, ref_logps: Tensor) -> Path:
    """Save everything in a finished stage but its model card and its record, into a hidden folder; return that folder.

    UserError if the last step made a weight NaN or infinite, or if something cannot be saved: the last checkpoint has
    the trained weights then. On several ranks only rank 0 writes; shards are sent to it a piece at a time.
    """
    trainer.require_finite_weights()
    require_same(trainer.model)
    weights = gathered(trainer)

    def write() -> Path:
        with _nothing_lost(stage, trainer.last_checkpoint()):
            return _write(stage, trainer, weights, ref_logps)

    staging = ranks.on_first(write)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with _nothing_lost(stage, trainer.last_checkpoint()):
        if in_pieces(model):
            save_pieces(weights_of(model), staging)
        if trainer.following is not None:
            trainer.following.save_average(staging)
    return staging


def publish(stage: Stage, staging: Path, record: Record, checkpoint: Path) -> None:
    """Evaluate the saved model, publish its folder, and record the stage in the manifest.

    1. Evaluate the model in the hidden folder; that its files can be loaded is tested with it.
    2. Add the model card and the record.
    3. Rename the folder to the finished one, then update the manifest. After a crash between the two,
       `record_published` catches up.
    4. Remove the stage's working folder.

    UserError if the folder cannot be completed; `checkpoint` has the trained weights then.
    """
    # what is evaluated is what was written, not what is in memory
    if stage.run.eval_data is not None:
        record["eval"] = stage.run.eval_data.evaluate(str(staging), staging, stage.scorer, stage.label)

    with _nothing_lost(stage, checkpoint):
        replace_file(staging / "README.md", model_card(stage.run.config, record).encode())
        replace_file(staging / RECORD, (json.dumps(record, indent=2) + "\n").encode())

        # the record goes with the folder, so a crash after the rename loses nothing
        remove_folder(stage.folder)
        publish_folder(staging, stage.folder)

    stage.update(record)
    remove_folder(stage.work)
    ranks.wait()


@contextmanager
def _nothing_lost(stage: Stage, checkpoint: Path) -> Iterator[None]:
    """Turn whatever fails within the block into a UserError that says where the trained weights are.

    A process that is gone is none of it: its own message has the cause.
    """
    try:
        with ranks.lost_connections():
            yield
    except ranks.LostProcess:
        raise
    except Exception as error:  # of transformers, PEFT, safetensors, the disk
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"stage {stage.name}: is trained, but could not be saved: {reason}. Its weights are in {checkpoint}; "
            "correct the cause and run the same command again, which saves them without training"
        ) from error


def _write(stage: Stage, trainer: StageTrainer, weights: dict[str, Tensor] | None, ref_logps: Tensor) -> Path:
    staging = empty_folder(stage.work / "finished")

    # with LoRA the adapter, which later stages train further, and perhaps merged weights that anyone can load
    config = stage.run.config
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if config.lora is not None:
        # the embedding is the base's: PEFT would add a copy of it if it or the head has an adapter
        model.save_pretrained(staging / ADAPTER, state_dict=weights, save_embedding_layers=False)
        if config.publishes_merged and not (is_cut(model) and merge_in_pieces(staging / ADAPTER, config, staging)):
            merged: Any = merge_adapter(staging / ADAPTER, config, model)
            merged.save_pretrained(staging)
    else:
        model.config.use_cache = stage.use_cache  # Trainer switched it off; generation needs it
        dtypes = {weight.dtype for weight in (weights or {}).values() if weight.is_floating_point()}
        model.save_pretrained(staging, state_dict=weights)
        if len(dtypes) == 1:
            say_dtype(model.config, dtypes.pop(), staging)
    stage.run.tokenizer.save_pretrained(staging)
    copy_beside(config.model, staging, code=config.trust_remote_code)

    if stage.data.config.source is not None:
        shutil.copyfile(stage.work / PAIRS_FILE, staging / PAIRS_FILE)
        shutil.copytree(stage.work / SOURCE_FOLDER, staging / SOURCE_FOLDER)

    # without a reference the file has zeros, which is what the loss used
    if config.reference == "none":
        write_scores(staging / REFERENCE_FILE, ref_logps, key="reference: none")
    else:
        shutil.copyfile(stage.work / REFERENCE_FILE, staging / REFERENCE_FILE)
    return staging
