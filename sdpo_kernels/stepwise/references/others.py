"""Scoring references besides the run's own models: one after another, never two of them in memory.

    references = OtherReferences(config.other_references, scorer, folder, check_weights)
    references.score({"pairs": (tokens, used)}, "stage 1 easy")   # loads, scores, releases each model in turn
    references.scores["pairs"]                                    # of each model [n, 2]
    references.combine("pairs", base_scores, config.multi)        # [n, 2], what the stage trains against

With `guiding` there is one, the reference. With `multi` they are mixed with the base, the model that the policy starts
from. It stays in memory, so the stage itself scores it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sdpo_kernels.integrations.causal_lm import check_head
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.fit import check_fit, check_vocabulary, load_model_config
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.models.load import load_tokenizer
from sdpo_kernels.stepwise.references.mixture import combine
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.settings.reference import MultiSettings
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

Part = tuple[TokenizedPairs, NDArray[np.int64] | None]  # pairs, and the indices of those to score (None: all)

BASE_FILE = "base.safetensors"


class OtherReferences:
    """The references of one stage; their scores are cached in `folder`, each model's under its own key."""

    def __init__(
        self, models: Mapping[str, str], scorer: Scorer, folder: Path, check_weights: Callable[[str, str], None]
    ) -> None:
        """`models` by the settings that name them (`RunConfig.other_references`).

        `check_weights(path, hash)` raises UserError if the weights in `path` have changed during the run.
        """
        self.models, self.folder, self.check_weights = models, folder, check_weights
        # A stage folder of another LoRA run is loaded from its merged weights: its adapter fits only that run's base.
        self.scorer = dataclasses.replace(scorer, config=scorer.config.model_copy(update={"lora": None}))
        self.hashes: list[str] = []
        self.scores: dict[str, list[Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def score(self, wanted: Mapping[str, Part], label: str) -> None:
        """Score every model on each of `wanted`, named sets of pairs, into `scores`."""
        self.scores = {name: [] for name in wanted}
        for number, (setting, path) in enumerate(self.models.items()):
            self._score(number, setting, path, wanted, label)

    def _score(self, number: int, setting: str, path: str, wanted: Mapping[str, Part], label: str) -> None:
        loaded, digest = self.scorer.load_with_hash(path)
        self.check_weights(path, digest)

        # a head the package does not fit would give wrong log-probs, so it is tried on one sequence
        first = next(iter(wanted.values()))[0][0].chosen.ids
        try:
            check_head(loaded.model, torch.from_numpy(first.astype("int64")).to(self.scorer.device))
        except ValueError as error:
            raise UserError(f"{setting}: {path}: {error}") from error

        # scored on everything while it is loaded
        self.hashes.append(digest)
        for name, (tokens, used) in wanted.items():
            cache = self.folder / f"{name}-{number}.safetensors"
            self.scores[name].append(self.scorer.cached(loaded, digest, tokens, f"{label}: {setting}", cache, used))

    def combine(self, name: str, base: Tensor, options: MultiSettings) -> Tensor:
        """log π̃ [n, 2] of the pairs that `score` was given as `name`; `base` [n, 2] are the base's scores.

        A pair that some reference has not scored is NaN.
        """
        parts = torch.stack([base, *self.scores[name]])
        return combine(parts, epsilon=options.epsilon, alpha=options.alpha, convention=options.alpha_convention)

    def combined_hash(self, base_hash: str) -> str:
        """One hash for the weights of all references, the base's first."""
        return hashlib.sha256(" ".join([base_hash, *self.hashes]).encode()).hexdigest()

    def named_hashes(self, base_hash: str) -> dict[str, str]:
        """Each reference's hash, by its path."""
        return {"base": base_hash, **dict(zip(self.models.values(), self.hashes, strict=True))}


def check_others(config: RunConfig, tokenizer: PreTrainedTokenizerBase, parts: list[TokenizedPairs]) -> None:
    """UserError if another reference cannot read the run's tokens. Reads configs and tokenizers only, no weights."""
    vocabulary = tokenizer.get_vocab()
    for setting, path in config.other_references.items():
        theirs = config.model_copy(update={"model": path})
        try:
            check_vocabulary(vocabulary, load_tokenizer(theirs).get_vocab(), "all references must share one vocabulary")
            check_fit(theirs, load_model_config(theirs), parts)
        except UserError as error:
            raise UserError(f"{setting}: {path}: {error}") from error
