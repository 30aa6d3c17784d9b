"""The references of one stage, scored once before it trains, so that only one model is ever resident.

    start = stage.references.score()
    start.loaded.model, start.ref_logps      # the policy as the stage starts, and the reference's log-probs [n, 2]

Evaluations while the stage trains are compared with the same reference (`eval_dataset`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.data.batches import PairDataset
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.models.load import Loaded, release_memory
from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.references.cache import read_scores, write_scores
from sdpo_kernels.stepwise.references.evaluation import EVAL_FILE, EvalData
from sdpo_kernels.stepwise.references.others import BASE_FILE, OtherReferences, Part
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.settings.reference import MultiSettings

REFERENCE_FILE = "reference_logps.safetensors"  # in a stage's folder
OTHERS = "references"  # in a stage's working folder: the log-probs of each reference of `multi` or `guiding`


@dataclass(frozen=True)
class StageStart:
    """What a stage starts from."""

    loaded: Loaded  # the policy
    ref_logps: Tensor  # [n, 2] summed log-probs of the reference (chosen, rejected), float32, CPU; NaN if not scored
    record: Record  # of the scoring, for the manifest


@dataclass(frozen=True)
class StageReferences:
    """Scores the pairs a stage trains on under its reference, whatever `reference` is set to."""

    scorer: Scorer
    tokens: TokenizedPairs
    used: NDArray[np.int64]  # sorted indices of the pairs that are trained on; only these are scored
    policy: str  # the model the stage starts from, a folder or hub name
    reference: str  # the model it is compared with; with `multi` the base, with `none` unused
    folder: Path  # the stage's working folder
    label: str  # for progress bars
    check_weights: Callable[[str, str], None]  # UserError if the weights in a folder have changed during the run
    evaluation: EvalData | None  # the evaluation pairs, if the stage is evaluated while it trains

    def score(self) -> StageStart:
        """Score the reference, or read its cache, and return the scores with the policy's starting model.

        1. With `none` nothing is scored; with `multi` every reference is scored and their log-probs are mixed; with
           `guiding` the one model is scored and released before the policy is loaded.
        2. Otherwise load the one reference and score it.
        3. It is also the policy's starting model, unless `policy` names another one: then load that in its place.

        UserError if a model cannot be loaded, or its weights have changed since the run started. On several ranks each
        loads the model, scores its share of the batches, and gets all scores.
        """
        config = self.scorer.config
        if config.reference == "none":
            none = {"pairs_used": len(self.used), "reference_hash": None, "gamma_reference": None, "score_seconds": 0.0}
            return StageStart(self._load(self.policy)[0], torch.zeros(len(self.tokens), 2), none)
        if config.multi is not None:
            return self._score_multi(config.multi)
        if config.guiding is not None:
            return self._score_guiding()

        loaded, reference_hash = self._load(self.reference)
        started = time.monotonic()
        scores = self.scorer.cached(
            loaded, reference_hash, self.tokens, f"{self.label}: references", self.folder / REFERENCE_FILE, self.used
        )
        record = self._record(reference_hash, scores, started)

        if self.policy != self.reference:
            # the reference goes first: there may be memory for one model only
            del loaded
            release_memory()
            loaded = self._load(self.policy)[0]
        return StageStart(loaded, scores, record)

    def policy_start_logps(self) -> Tensor | None:
        """With `multi`, the log-probs [n, 2] of the policy's start, which are not the reference's; otherwise None."""
        if self.scorer.config.reference != "multi":
            return None
        return read_scores(self.folder / OTHERS / BASE_FILE, None, len(self.tokens), partial=True)[0]

    def eval_dataset(self) -> PairDataset | None:
        """The evaluation pairs with this reference's log-probs; None if the stage is not evaluated while it trains."""
        if self.evaluation is None:
            return None
        reference = self.scorer.config.reference
        if reference == "none":
            return self.evaluation.dataset(None)
        is_other = reference in ("multi", "guiding")
        return self.evaluation.dataset(self.folder / OTHERS if is_other else self.evaluation.folder_of(self.reference))

    def _score_others(self) -> OtherReferences:
        """Load, score and release the references of `multi` (but the base) or `guiding`, one at a time."""
        models = self.scorer.config.other_references
        references = OtherReferences(models, self.scorer, self.folder / OTHERS, self.check_weights)
        parts: dict[str, Part] = {"pairs": (self.tokens, self.used)}
        if self.evaluation is not None:
            parts["eval"] = (self.evaluation.tokens, None)
        references.score(parts, self.label)
        return references

    def _score_guiding(self) -> StageStart:
        """`guiding`: the one other model is the reference."""
        started = time.monotonic()
        references = self._score_others()
        (key,), (scores,) = references.hashes, references.scores["pairs"]
        write_scores(self.folder / REFERENCE_FILE, scores, key)
        if self.evaluation is not None:
            write_scores(references.folder / EVAL_FILE, references.scores["eval"][0], key)
        ranks.wait()
        return StageStart(self._load(self.policy)[0], scores, self._record(key, scores, started))

    def _score_multi(self, settings: MultiSettings) -> StageStart:
        """`multi`: score the further references one at a time, then the base, which stays loaded as the policy."""
        started = time.monotonic()
        references = self._score_others()

        # last, so that the base is the one model that stays
        loaded, base_hash = self._load(self.reference)
        base = self.scorer.cached(
            loaded, base_hash, self.tokens, f"{self.label}: base", references.folder / BASE_FILE, self.used
        )

        # the mixture is stored like any other reference; its key is the hash of all its references
        key, scores = references.combined_hash(base_hash), references.combine("pairs", base, settings)
        write_scores(self.folder / REFERENCE_FILE, scores, key)
        if self.evaluation is not None:
            stored = self.evaluation.stored(self.evaluation.folder_of(self.reference))
            write_scores(references.folder / EVAL_FILE, references.combine("eval", stored, settings), key)
        ranks.wait()

        record = self._record(key, scores, started) | {"reference_hashes": references.named_hashes(base_hash)}
        return StageStart(loaded, scores, record)

    def _load(self, path: str) -> tuple[Loaded, str]:
        """The model in `path` and the hash of its weights; UserError if they have changed during the run."""
        loaded, digest = self.scorer.load_with_hash(path, trains=path == self.policy)
        self.check_weights(path, digest)
        return loaded, digest

    def _record(self, reference_hash: str, scores: Tensor, started: float) -> Record:
        # of the pairs that are used, also if an earlier version has scored all
        margins = (scores[:, 0] - scores[:, 1])[self.used]
        return {
            "pairs_used": len(self.used),
            "reference_hash": reference_hash,
            "gamma_reference": float(margins.double().mean()),
            "score_seconds": round(time.monotonic() - started, 3),
        }
