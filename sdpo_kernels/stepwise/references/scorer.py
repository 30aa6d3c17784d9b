"""Reference log-probs: scored once, two floats a pair, kept in a file that is never believed without its key.

At a stage's start the policy is the reference, so one forward pass without gradient replaces a second resident model.
The cache's key hashes everything a score depends on; anything off (key, count, NaN, a file that cannot be read) means
that it is made again, and said.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainingArguments

from sdpo_kernels.integrations.causal_lm import unwrap
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.batches import Batch, Collator, PairDataset, collate_packed, make_collate_padded
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.models.load import Loaded, load_model, weights_hash
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

logger = logging.getLogger(__name__)

CACHE_VERSION = 1


@dataclass(frozen=True)
class Scorer:
    """Scores pairs on the path that Trainer takes: same batches, same attention, same mixed precision."""

    config: RunConfig
    precision: Precision
    batch_size: int  # pairs
    pad_token_id: int
    reporter: Reporter

    @classmethod
    def of(cls, config: RunConfig, args: TrainingArguments, pad_token_id: int, reporter: Reporter) -> Scorer:
        """A scorer for a stage with these arguments."""
        batch_size = args.per_device_eval_batch_size
        return cls(config, Precision.of(args), batch_size, pad_token_id, reporter)

    @property
    def device(self) -> torch.device:
        """Where it scores."""
        return self.precision.device

    def load(self, path: str) -> Loaded:
        """The model in `path`, ready to score or to train."""
        return load_model(path, self.config, self.precision)

    def collator(self, loaded: Loaded) -> Collator:
        """How the model's batches are made."""
        return collate_packed if loaded.packed else make_collate_padded(self.pad_token_id)

    def score(self, loaded: Loaded, tokens: TokenizedPairs, label: str) -> Tensor:
        """Summed log-probs [n, 2], float32, CPU, of every pair (chosen, rejected); of weighted tokens with ld_dpo.

        Several processes take the batches of one in turn, so every score is the one that a single process gives.
        """
        model, collate, size = loaded.model, self.collator(loaded), self.batch_size
        data = PairDataset(tokens, torch.zeros(len(tokens), 2))
        own: list[tuple[int, Tensor]] = []
        model.eval()
        with self.reporter.task(label, len(tokens)) as task:
            for start in range(ranks.rank() * size, len(tokens), ranks.world_size() * size):
                stop = min(start + size, len(tokens))
                inputs = collate([data[i] for i in range(start, stop)])
                inputs = send_to_device(inputs, self.device)
                with torch.no_grad(), self.precision.computing(model):
                    sums = Batch.of(inputs).logps(model, self.config.loss_sum.ld_alpha)
                own.append((start, sums.float().view(2, -1).T.cpu()))
                if stop < len(tokens):
                    task.update(stop)
            scores = merged([part for parts in ranks.exchange(own) for part in parts], len(tokens))
            task.update(len(tokens))
        return scores

    def cached(self, loaded: Loaded, model_hash: str, tokens: TokenizedPairs, label: str, path: Path) -> Tensor:
        """As `score`, kept in `path` under a key of everything the scores depend on."""
        config, model_config = self.config, cast(Any, unwrap(loaded.model).config)
        only_some: dict[str, Any] = {"rounded_weights": True} if self.precision.whole else {}
        if config.loss_sum.ld_alpha is not None:
            only_some["ld_alpha"] = config.loss_sum.ld_alpha
        key = cache_key(
            model_hash,
            tokens,
            **only_some,
            max_length=config.max_length,
            truncation=config.truncation,
            dtype=config.dtype,
            autocast=self.precision.dtype,
            packed=loaded.packed,
            # attention, positions, the head's scale and softcap, whatever else turns weights into scores
            model=model_config.to_dict() | {"_name_or_path": None},
            attention=model_config._attn_implementation,
        )
        return cached_scores(path, key, len(tokens), lambda: self.score(loaded, tokens, label))

    def score_path(self, path: str, tokens: TokenizedPairs, label: str, cache: Path | None = None) -> Tensor:
        """Load the model in `path`, score, and let it go."""
        loaded = self.load(path)
        if cache is None:
            return self.score(loaded, tokens, label)
        return self.cached(loaded, weights_hash(loaded.model), tokens, label, cache)


def merged(parts: list[tuple[int, Tensor]], count: int) -> Tensor:
    """Scores [count, 2] of pieces (first pair, scores [k, 2]); RuntimeError unless every pair has exactly one."""
    scores, given = torch.empty(count, 2), torch.zeros(count, dtype=torch.int64)
    for start, part in parts:
        scores[start : start + len(part)] = part
        given[start : start + len(part)] += 1
    if bool((given != 1).any()):
        wrong = int((given != 1).nonzero()[0])
        raise RuntimeError(f"scores: pair {wrong + 1} of {count} was scored {int(given[wrong])} times, must be once")
    return scores


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that padding has; what is padded is never scored, so any valid id will do."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def cache_key(reference_hash: str, tokens: TokenizedPairs, **settings: Any) -> str:
    """Hash of all that scores depend on: the reference's weights, the tokens after truncation, and `settings`."""
    parts = {"version": CACHE_VERSION, "reference": reference_hash, "tokens": tokens.content_hash(), **settings}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def cached_scores(path: Path, key: str, count: int, make: Callable[[], Tensor]) -> Tensor:
    """The scores [count, 2] in `path` where they are right in every respect, else those `make` gives, saved there."""
    scores, reason = read_scores(path, key, count)
    found = min(ranks.exchange(scores is not None))  # in all processes: they must not part ways here
    if scores is not None and found:
        return scores
    if reason:
        logger.warning("%s is made again: %s", path.name, reason)
    scores = make()
    bad = ~torch.isfinite(scores).all(1)
    if bool(bad.any()):
        raise UserError(
            f"{path.name}: the model scores {int(bad.sum())} of {count} pairs as NaN or infinite, the first is pair "
            f"{int(bad.nonzero()[0]) + 1}; its weights are broken, or overflow in this precision"
        )
    write_scores(path, scores, key)
    ranks.wait()
    return scores


def write_scores(path: Path, scores: Tensor, key: str) -> None:
    """Save scores [n, 2] with their key, atomically."""
    columns = {"chosen": scores[:, 0].contiguous(), "rejected": scores[:, 1].contiguous()}
    replace_file(path, save(columns, metadata={"key": key}))  # two keys come in any order


def read_scores(path: Path, key: str | None, count: int) -> tuple[Tensor | None, str]:
    """(scores, "") where the file is right; (None, why) otherwise, with no reason where there simply is none.

    `key` None takes any key: for files whose place says what they hold.
    """
    if not path.exists():
        return None, ""
    try:
        with safe_open(str(path), framework="pt") as stored:
            metadata = stored.metadata() or {}
            columns = [stored.get_tensor(name) for name in ("chosen", "rejected")]
    except (SafetensorError, OSError) as error:
        return None, f"it cannot be read ({error})"
    if key is not None and metadata.get("key") != key:
        return None, "its key differs: the reference, the data or a setting has changed since"
    if any(column.shape != (count,) for column in columns):
        return None, f"it holds {columns[0].shape[0]} pairs, not {count}"
    scores = torch.stack(columns, 1)
    if not bool(torch.isfinite(scores).all()):
        return None, "it holds NaN or infinite values"
    return scores, ""
