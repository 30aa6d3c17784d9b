"""The check at a stage's end: the saved model, loaded afresh, scores a few pairs as the trained one in memory did.

    trained = score_trained(stage, trainer)     # before the trained model is released
    check_saved(stage, folder, trained)         # before the folder is published

It loads what is published: the full weights with their own config, in a LoRA run too, or the adapter if a stage has
nothing else. So it finds a wrong merge, tying or sharding and weights that were not saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AutoConfig

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.batches import Batch, Collator, PairDataset
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.models.load import Loaded
from sdpo_kernels.stepwise.models.precision import asks_for_fsdp
from sdpo_kernels.stepwise.models.saving import is_tied, says_tied
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.state import Stage
from sdpo_kernels.stepwise.training.start_guard import cache_tolerance
from sdpo_kernels.stepwise.training.trainer import StageTrainer

PAIRS = 4  # scored at a stage's end: its first ones

# relative deviations that are allowed; those a test finds are in docs/running.md
SAME = 1e-5  # the same sums of the same weights
OTHER_ORDER = 1e-4  # the same sums in another order, in float32: a merged adapter, a sharded head, compiled code
LOW_PRECISION = 5e-2  # the same in bfloat16, float16 or TF32, where each order is rounded differently


@dataclass(frozen=True)
class TrainedScores:
    """Log-probs of a stage's first pairs under the trained model, and the trained weights' checkpoint."""

    pairs: TokenizedPairs
    logps: Tensor  # [k, 2] (chosen, rejected)
    checkpoint: Path


def score_trained(stage: Stage, trainer: StageTrainer) -> TrainedScores:
    """Score the stage's first pairs with the trained model, as Trainer wraps it: sharded weights are gathered.

    Every rank scores the same pairs, because each forward of a sharded model needs all ranks.
    """
    pairs = stage.data.tokens.take(np.arange(min(PAIRS, len(stage.data.tokens))))
    model, collate = trainer.model_wrapped, cast(Collator, trainer.data_collator)
    logps = _scores(stage, model, pairs, collate, trainer.compute_loss_context_manager)
    return TrainedScores(pairs, logps, trainer.last_checkpoint())


def check_saved(stage: Stage, folder: Path, trained: TrainedScores) -> None:
    """Load the saved model in `folder` and compare its scores with the trained model's; on rank 0 if it is whole.

    UserError if they differ or it cannot be loaded: nothing may be published then. It says where the trained weights
    are.
    """
    # of a model that is cut or tensor-parallel no rank may hold the whole
    if ranks.tp_size() > 1 or stage.scorer.cut is not None:
        _check(stage, folder, trained)
    else:
        ranks.on_first(lambda: _check(stage, folder, trained))


def _check(stage: Stage, folder: Path, trained: TrainedScores) -> None:
    # without `lora` the scorer loads the full weights of the folder, not the base with the adapter
    config = stage.run.config
    scorer = replace(stage.scorer, config=config.of_full_weights) if config.publishes_merged else stage.scorer
    try:
        loaded = scorer.load(str(folder))
    except UserError as error:
        raise UserError(
            f"stage {stage.name}: what was saved is not what was trained: {error}; {kept(trained)}"
        ) from error

    def computing() -> AbstractContextManager[Any]:
        return scorer.precision.computing(loaded.model)

    # with ranks that hold a part each, none may publish what another one finds wrong
    logps = _scores(stage, loaded.model, trained.pairs, scorer.collator(loaded), computing)
    ranks.agree(lambda: _require_same(stage, folder, trained, loaded, logps))


def _require_same(stage: Stage, folder: Path, trained: TrainedScores, loaded: Loaded, logps: Tensor) -> None:
    """UserError unless the saved model's scores `logps` [k, 2] are the trained one's, and its config fits it."""
    # transformers would load such a folder rightly, but other software goes by the config
    config = stage.run.config
    if config.publishes_merged and _says_tied(folder, config) and not is_tied(loaded.model):
        raise UserError(
            f"stage {stage.name}: what was saved is not what was trained: its config.json says that the head is the "
            f"embedding (tie_word_embeddings), its weights have a head of their own. {kept(trained)}"
        )

    # relative, but absolute below 1 nat, as at the start of a stage
    tolerance = end_tolerance(stage, loaded.by_sequence)
    a, b = trained.logps.double(), logps.double()
    off = torch.nan_to_num((a - b).abs() / a.abs().clamp(min=1.0), nan=math.inf)
    pair, side = divmod(int(off.argmax()), 2)
    if float(off[pair, side]) <= tolerance:
        return
    raise UserError(
        f"stage {stage.name}: what was saved is not what was trained: log-prob of the {('chosen', 'rejected')[side]} "
        f"answer of pair {stage.data.where[pair]}: the trained model gives {float(a[pair, side]):.6f}, the saved one "
        f"{float(b[pair, side]):.6f}; they may differ by {tolerance:g} (relative). Usual causes: an adapter that was "
        "merged wrongly, a head that is tied in the saved config but not in the model (or the reverse), weights that "
        f"were not saved. {kept(trained)}"
    )


def _says_tied(folder: Path, config: RunConfig) -> bool:
    return says_tied(AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code))


def kept(trained: TrainedScores) -> str:
    """The sentence of an error that says where the trained weights are."""
    return (
        f"Nothing was published; the trained weights are in {trained.checkpoint}, and running the same command again "
        "saves them again without training"
    )


def end_tolerance(stage: Stage, by_sequence: bool) -> float:
    """How far a saved model's score may be from the trained one's, relative: nearly 0 where both do the same sums."""
    config, args, dtype = stage.run.config, stage.args, stage.scorer.precision.dtype
    low = dtype is not None or config.is_low_precision or bool(args.tf32)
    merged = config.lora is not None and config.publishes_merged
    if merged or args.torch_compile or asks_for_fsdp(args):
        return LOW_PRECISION if low else OTHER_ORDER

    # padded batches are the same both times too, but not every GPU kernel promises the same bits
    if by_sequence or args.device.type == "cpu":
        return SAME
    return cache_tolerance(by_sequence, dtype, torch.bfloat16 if config.is_low_precision else torch.float32)


def _scores(
    stage: Stage,
    model: nn.Module,
    pairs: TokenizedPairs,
    collate: Collator,
    computing: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """Summed log-probs [k, 2] under `model`, in the batches of an evaluation, float32 on the CPU."""
    data = PairDataset(pairs, torch.zeros(len(pairs), 2))
    size = stage.args.per_device_eval_batch_size
    model.eval()

    parts = []
    for start in range(0, len(pairs), size):
        examples = [data[i] for i in range(start, min(start + size, len(pairs)))]
        batch = Batch.of(send_to_device(collate(examples), stage.args.device))
        with torch.no_grad(), computing():
            sums = batch.logps(model)
        parts.append(sums.float().view(2, -1).T.cpu())
    return torch.cat(parts)
