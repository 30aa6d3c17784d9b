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
from typing import Any

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


def cached_scores(
    path: Path, key: str, wanted: NDArray[np.int64], count: int, compute: Callable[[NDArray[np.int64]], Tensor]
) -> Tensor:
    """Scores [count, 2] of at least the pairs `wanted`, NaN for others that have none.

    Those in `path` are taken if the file is valid for `key`. The others are `compute(missing)`, [k, 2], and are saved
    there. UserError if these are NaN or infinite; nothing is saved then. On several ranks all call this and compute;
    rank 0 reads and writes the file.
    """
    # `compute` exchanges scores between ranks, so all of them must miss the same pairs
    scores, reason = ranks.on_first(lambda: read_scores(path, key, count, partial=True))
    if reason and ranks.is_first():
        logger.warning("%s is recomputed: %s", path.name, reason)
    if scores is None:
        missing, scores = wanted, torch.full((count, 2), torch.nan)
    else:
        missing = wanted[scores[wanted, 0].isnan().numpy()]
        if len(missing) and ranks.is_first():
            logger.warning("%s: %s more pairs are scored, the others are there", path.name, f"{len(missing):,}")
    if not len(missing):
        return scores

    # one broken pair would make every loss of its batch NaN
    found = compute(missing)
    bad = ~torch.isfinite(found).all(1)
    if bool(bad.any()):
        raise UserError(
            f"{path.name}: the model scores {int(bad.sum())} of {len(missing)} pairs as NaN or infinite, the first is "
            f"pair {int(missing[int(bad.nonzero()[0])]) + 1}; its weights are broken, or they overflow in this "
            "precision"
        )
    scores[missing] = found
    write_scores(path, scores, key)
    ranks.wait()
    return scores


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
