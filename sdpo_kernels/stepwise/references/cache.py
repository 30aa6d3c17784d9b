"""Log-probs [n, 2] of pairs in a file, used only if its key matches.

    key = cache_key(weights_hash(model), tokens, dtype="float32")
    scores = cached_scores(path, key, wanted, len(tokens), lambda missing: score(model, tokens.take(missing)))

The key hashes everything a score depends on. If the key, the count or a value is wrong, or the file cannot be read,
the scores are recomputed and a warning says why.

A file has a row for every pair. Pairs that were never asked for are NaN in both columns; if they are asked for later,
they alone are scored and added.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs

logger = logging.getLogger(__name__)

CACHE_VERSION = 1


def cache_key(reference_hash: str, tokens: TokenizedPairs, **settings: Any) -> str:
    """Hash of everything scores depend on: the reference's weights, the tokens after truncation, and `settings`."""
    parts = {"version": CACHE_VERSION, "reference": reference_hash, "tokens": tokens.content_hash(), **settings}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Shared(Protocol):
    """Scores that other runs may have computed (`shared_cache.py`)."""

    def fill(self, scores: Tensor, missing: NDArray[np.int64]) -> NDArray[np.int64]:
        """Put what there is of the pairs `missing` into scores [n, 2]; returns those that are still missing."""
        ...

    def add(self, scores: Tensor, rows: NDArray[np.int64]) -> None:
        """Keep these rows of scores [n, 2] for other runs."""
        ...


def cached_scores(
    path: Path,
    key: str,
    wanted: NDArray[np.int64],
    count: int,
    compute: Callable[[NDArray[np.int64]], Tensor],
    shared: Callable[[NDArray[np.int64]], Shared] | None = None,
) -> Tensor:
    """Scores [count, 2] of at least the pairs `wanted`, NaN for others that have none.

    1. Those in `path` are taken if the file is valid for `key`.
    2. Of what is missing, that in `shared(missing)` is taken.
    3. The others are `compute(missing)`, [k, 2], and are saved in `path`, then in the shared entry.

    UserError if a computed score is NaN or infinite; nothing is saved then. On several ranks all call this and compute;
    rank 0 reads and writes the files.
    """
    scores, missing = _stored(path, key, wanted, count)
    if not len(missing):
        return scores

    entry = None if shared is None else shared(missing)
    unscored = missing if entry is None else entry.fill(scores, missing)
    if len(unscored):
        if len(unscored) < len(wanted) and ranks.is_first():
            logger.warning("%s: %s more pairs are scored, the others are there", path.name, f"{len(unscored):,}")
        scores[unscored] = _finite(compute(unscored), unscored, path.name)

    # the run's own file first: it must not be lost if the shared folder is full
    write_scores(path, scores, key)
    if entry is not None and len(unscored):
        entry.add(scores, unscored)
    ranks.wait()
    return scores


def _stored(path: Path, key: str, wanted: NDArray[np.int64], count: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Scores [count, 2] in `path`, NaN where it has none, and which of `wanted` it lacks."""
    # `compute` exchanges scores between ranks, so all of them must miss the same pairs
    scores, reason = ranks.on_first(lambda: read_scores(path, key, count, partial=True))
    if reason and ranks.is_first():
        logger.warning("%s is recomputed: %s", path.name, reason)
    if scores is None:
        return torch.full((count, 2), torch.nan), wanted
    return scores, wanted[scores[wanted, 0].isnan().numpy()]


def _finite(found: Tensor, pairs: NDArray[np.int64], name: str) -> Tensor:
    """Scores [k, 2] of `pairs`; UserError if one is not finite: it would make every loss of its batch NaN."""
    bad = ~torch.isfinite(found).all(1)
    if bool(bad.any()):
        raise UserError(
            f"{name}: the model scores {int(bad.sum())} of {len(pairs)} pairs as NaN or infinite, the first is "
            f"pair {int(pairs[int(bad.nonzero()[0])]) + 1}; its weights are broken, or they overflow in this "
            "precision"
        )
    return found


def write_scores(path: Path, scores: Tensor, key: str) -> None:
    """Save scores [n, 2] with their key, atomically."""
    columns = {"chosen": scores[:, 0].contiguous(), "rejected": scores[:, 1].contiguous()}
    # safetensors writes metadata in no fixed order, so a second entry would make the file's bytes differ between runs
    replace_file(path, save(columns, metadata={"key": key}))


def read_scores(path: Path, key: str | None, count: int, *, partial: bool = False) -> tuple[Tensor | None, str]:
    """Scores [count, 2] and "" if the file is valid; otherwise None and why not ("" if there is no file).

    With `key=None` any key is accepted, for files whose location already identifies their content. With `partial` a
    pair may have no scores: NaN in both columns.
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
        return None, "it was made with another model, other data or other settings"
    if any(column.shape != (count,) for column in columns):
        return None, f"it holds {columns[0].shape[0]} pairs, not {count}"
    scores = torch.stack(columns, 1)
    unscored = scores.isnan().all(1) if partial else torch.zeros(count, dtype=torch.bool)
    if not bool(torch.isfinite(scores[~unscored]).all()):
        return None, "it holds NaN or infinite values"
    return scores, ""
