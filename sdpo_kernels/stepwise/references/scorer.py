"""Summed log-probs of pairs under a model, two floats a pair, scored once without gradient.

At a stage's start the policy is the reference, so one forward pass replaces a second resident model.

    scorer = Scorer.of(config, args, pad_token_id(tokenizer), reporter)
    logps = scorer.score_path("runs/x/stage-1-easy", tokens, "stage 1", cache=Path("logps.safetensors"))   # [n, 2]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainingArguments

from sdpo_kernels.integrations.causal_lm import unwrap
from sdpo_kernels.integrations.cut_weights import is_cut, reshard
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.batches import (
    Batch,
    Collator,
    PairDataset,
    collate_packed,
    collate_shared,
    make_collate_padded,
)
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.models.cut import Cut, load_for
from sdpo_kernels.stepwise.models.load import Loaded
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.references.cache import cache_key, cached_scores
from sdpo_kernels.stepwise.references.shared_cache import SharedEntry, made_by
from sdpo_kernels.stepwise.settings.run_settings import RunConfig


@dataclass(frozen=True)
class Scorer:
    """Scores pairs the way Trainer will see them: same batches, same attention, same mixed precision."""

    config: RunConfig
    precision: Precision
    batch_size: int  # pairs
    pad_token_id: int
    reporter: Reporter
    cut: Cut | None = None  # how FSDP2 cuts the models it loads; None: they are whole

    @classmethod
    def of(cls, config: RunConfig, args: TrainingArguments, pad_token_id: int, reporter: Reporter) -> Scorer:
        """A scorer for a stage with these arguments."""
        batch_size = args.per_device_eval_batch_size
        return cls(config, Precision.of(args), batch_size, pad_token_id, reporter, Cut.of(args))

    @property
    def device(self) -> torch.device:
        """The device it scores on."""
        return self.precision.device

    def load(self, path: str) -> Loaded:
        """The model in `path`, ready to score."""
        with self.reporter.waiting(f"loading the model {path}"):
            return load_for(path, self.config, self.precision, self.cut)

    def load_with_hash(self, path: str, *, trains: bool = False) -> tuple[Loaded, str]:
        """The model in `path`, and the hash of its weights; with `trains` it is ready to train, too."""
        with self.reporter.waiting(f"loading the model {path}"):
            loaded = load_for(path, self.config, self.precision, self.cut, trains=trains)
            return loaded, loaded.hash()

    def collator(self, loaded: Loaded) -> Collator:
        """The collator for the model's batches: packed, with shared prompts or not, or padded."""
        if loaded.shared:
            return collate_shared
        return collate_packed if loaded.packed else make_collate_padded(self.pad_token_id)

    def score(self, loaded: Loaded, tokens: TokenizedPairs, label: str) -> Tensor:
        """Summed log-probs [n, 2] of every pair (chosen, rejected), float32, on the CPU; weighted sums with ld_dpo.

        On several ranks the batches are those of a single process, dealt out in turn, so every score is the same to
        the bit; every rank gets all of them.
        """
        model, collate, size = loaded.model, self.collator(loaded), self.batch_size
        data = PairDataset(tokens, torch.zeros(len(tokens), 2))
        own: list[tuple[int, Tensor]] = []  # first pair of a batch, its scores
        model.eval()

        with self.reporter.task(label, len(tokens)) as task:
            for turn in range(0, len(tokens), ranks.data_world_size() * size):
                start = turn + ranks.data_rank() * size
                # each forward of a cut model needs all ranks, so one that has no batch left takes another's
                if start >= len(tokens) and not is_cut(model):
                    break
                first = start if start < len(tokens) else turn
                stop = min(first + size, len(tokens))
                inputs = collate([data[i] for i in range(first, stop)])
                inputs = send_to_device(inputs, self.device)
                with torch.no_grad(), self.precision.computing(model):
                    sums = Batch.of(inputs).logps(model, self.config.loss_sum.ld_alpha)
                if first == start:
                    own.append((start, sums.float().view(2, -1).T.cpu()))

                # the last pair is reported below, once the other ranks have finished theirs
                if stop < len(tokens):
                    task.update(stop)
            reshard(model)

            scores = merged([part for parts in ranks.exchange_parts(own) for part in parts], len(tokens))
            task.update(len(tokens))
        return scores

    def cached(
        self,
        loaded: Loaded,
        model_hash: str,
        tokens: TokenizedPairs,
        label: str,
        path: Path,
        wanted: NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Like `score`, but kept in `path`, and in `reference_cache`, under a key of everything the scores depend on.

        If only the pairs `wanted` are needed, others are NaN unless the file has them.
        """
        key, count = self._key(loaded, model_hash, tokens), len(tokens)
        pairs = np.arange(count) if wanted is None else wanted

        def compute(missing: NDArray[np.int64]) -> Tensor:
            return self.score(loaded, tokens if len(missing) == count else tokens.take(missing), label)

        folder = self.config.reference_cache
        if folder is None:
            return cached_scores(path, key, pairs, count, compute)

        def shared(missing: NDArray[np.int64]) -> SharedEntry:
            batches = [self.batch_size, hashlib.sha256(missing.tobytes()).hexdigest()]
            origin = made_by(loaded, self.config, self.device, batches)
            return SharedEntry.of(Path(folder), key, origin, lambda text: self.reporter.say(f"{label}: {text}"))

        return cached_scores(path, key, pairs, count, compute, shared)

    def _key(self, loaded: Loaded, model_hash: str, tokens: TokenizedPairs) -> str:
        """The key of everything that scores within a run depend on."""
        config, model_config = self.config, cast(Any, unwrap(loaded.model).config)

        # Only in the key if they are used: keys of other runs must stay what they were.
        only_some: dict[str, Any] = {"rounded_weights": True} if self.precision.whole else {}
        if config.loss_sum.ld_alpha is not None:
            only_some["ld_alpha"] = config.loss_sum.ld_alpha

        if config.tp_size > 1:
            only_some["tp_size"] = config.tp_size

        if loaded.shared:
            only_some["prefix_sharing"] = True  # scores differ in their last digits

        return cache_key(
            model_hash,
            tokens,
            **only_some,
            max_length=config.max_length,
            truncation=config.truncation,
            dtype=config.dtype,
            autocast=self.precision.dtype,
            packed=loaded.packed,
            # positions, the head's scale and softcap, and whatever else turns weights into scores
            model=model_config.to_dict() | {"_name_or_path": None},
            attention=model_config._attn_implementation,
        )

    def score_path(self, path: str, tokens: TokenizedPairs, label: str, cache: Path | None = None) -> Tensor:
        """Load the model in `path`, score `tokens` (or read the cache), and release it."""
        if cache is None:
            return self.score(self.load(path), tokens, label)
        loaded, digest = self.load_with_hash(path)
        return self.cached(loaded, digest, tokens, label, cache)


def merged(parts: list[tuple[int, Tensor]], count: int) -> Tensor:
    """Scores [count, 2] of parts (first pair, scores [k, 2]); RuntimeError unless every pair has exactly one."""
    scores, given = torch.empty(count, 2), torch.zeros(count, dtype=torch.int64)
    for start, part in parts:
        scores[start : start + len(part)] = part
        given[start : start + len(part)] += 1

    if bool((given != 1).any()):
        wrong = int((given != 1).nonzero()[0])
        raise RuntimeError(f"scores: pair {wrong + 1} of {count} was scored {int(given[wrong])} times, must be once")
    return scores


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with; padding is never scored, so without a pad token any valid id will do."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
