"""All pieces of a packed row by FlexAttention, on CUDA: for models that cap their attention scores (Gemma 2).

A query sees the keys between its piece's first row and itself, and those of its trunk's shared rows: three borders a
row, in one mask. transformers' own FlexAttention path would split the row at every break in its positions instead, so
that a branch would not see its trunk. Written without access to CUDA and not yet run there: `packed_attention.py`
probes it before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sdpo_kernels.integrations.pieces import Piece


class Borders(NamedTuple):
    """What each row of a packed row may see, [N] int64 each, on the device."""

    begin: Tensor  # first row of its piece
    trunk: Tensor  # first row of its trunk
    end: Tensor  # behind the last row of its trunk that it sees; `trunk` for a sequence
    position: Tensor  # for windows


def serves(query: Tensor, dropout: float, *, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether it computes what FlashAttention does not: a softcap on CUDA, without dropout and sinks."""
    return query.is_cuda and softcap is not None and sinks is None and not dropout


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Sequence[Piece],
    window: int | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """[1, N, heads, D] of query [1, heads, N, D]; key, value: [1, kv_heads, N, D]."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    mask = mask_of(tuple(pieces), window, query.device)
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = _compiled()(query, key, value, score_mod=capped, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


@lru_cache(1)
def _compiled() -> Any:
    """Without compilation all scores of a row would be in memory."""
    # with lengths that vary, softcap and scaling would be symbols, too, read back from the device at each call
    return torch._dynamo.config.patch(specialize_float=True)(torch.compile(flex_attention, dynamic=True))


@lru_cache(8)
@torch.inference_mode(False)  # kept for later calls, which may need gradients
def mask_of(pieces: tuple[Piece, ...], window: int | None, device: torch.device) -> BlockMask:
    """The mask of a row; the layers of a forward ask for the same few."""
    borders = borders_of(pieces, device)
    rows = len(borders.begin)
    # compiled, it never holds a value for each query and key
    create = torch.compile(create_block_mask, dynamic=True) if device.type == "cuda" else create_block_mask
    return create(visible(borders, window), None, None, rows, rows, device=device)


def visible(borders: Borders, window: int | None) -> Callable[..., Tensor]:
    """Whether query row q sees key row k, as FlexAttention asks it."""

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k >= borders.begin[q]) & (k <= q)
        shared = (k >= borders.trunk[q]) & (k < borders.end[q])
        found = own | shared
        if window is not None:
            found = found & (borders.position[q] - borders.position[k] < window)
        return found

    return sees


def borders_of(pieces: Sequence[Piece], device: torch.device) -> Borders:
    """The borders of each row."""
    lengths = np.array([piece.length for piece in pieces])
    begins = np.cumsum(lengths) - lengths
    trunks, trunk = [], 0
    for piece, begin in zip(pieces, begins, strict=True):
        trunk = trunk if piece.shared else int(begin)
        trunks.append(trunk)

    shared = np.array([piece.shared for piece in pieces])
    position = np.arange(lengths.sum()) - np.repeat(begins, lengths) + np.repeat(shared, lengths)
    columns = [np.repeat(column, lengths) for column in (begins, np.array(trunks), np.array(trunks) + shared)]
    return Borders(*(torch.from_numpy(column).to(device, non_blocking=True) for column in (*columns, position)))
