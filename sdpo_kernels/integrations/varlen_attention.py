"""All pieces of a packed row in one call of FlashAttention (`torch.nn.attention.varlen`), on CUDA in half precision.

A branch has more keys than queries: its trunk's first positions, gathered by index, then its own. FlashAttention aligns
the causal mask to the last query and the last key, which is right for both kinds of piece. Written without access to
CUDA and not yet run there: `packed_attention.py` probes it before it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdpo_kernels.integrations.pieces import Piece

LARGEST_WIDTH = 256  # of a head, for FlashAttention


class Layout(NamedTuple):
    """Where the keys of each piece lie; all on the device."""

    keys: Tensor | None  # [M] rows of the keys of all pieces, one after another; None: the rows as they are
    cu_seq_q: Tensor  # [pieces + 1] int32
    cu_seq_k: Tensor
    max_q: int
    max_k: int


def serves(query: Tensor, value: Tensor, dropout: float, *, special: bool) -> bool:
    """Whether FlashAttention computes it: CUDA from Ampere on, half precision (its own or autocast's), no dropout,
    softcap or sinks, heads of one width that 8 divides."""
    width = query.shape[3]
    return (
        query.is_cuda
        and not special
        and not dropout
        and dtype_of(query) in (torch.float16, torch.bfloat16)
        and width == value.shape[3] <= LARGEST_WIDTH
        and width % 8 == 0
        and _is_recent(query.device)
        and is_there()
    )


def is_there() -> bool:
    """Whether this torch has it: since 2.13 with windows and grouped heads."""
    return _kernel() is not None


def dtype_of(query: Tensor) -> torch.dtype:
    """The dtype it is computed in: under autocast rotary embeddings leave float32 queries beside bfloat16 values."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


@lru_cache
def _is_recent(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(1)
def _kernel() -> Any:
    """torch's function, or None where this torch has none that knows windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "scale", "enable_gqa"} <= set(known) else None


def attend(
    query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], window: int | None, scaling: float | None
) -> Tensor:
    """[1, N, heads, D] of query [1, heads, N, D]; key, value: [1, kv_heads, N, D]."""
    layout = layout_of(tuple(pieces), query.device)
    dtype = dtype_of(query)
    q, k, v = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))  # [N, heads, D]
    if layout.keys is not None:
        k, v = k.index_select(0, layout.keys), v.index_select(0, layout.keys)

    # FlashAttention counts the positions before a query's own
    before = -1 if window is None else window - 1
    out: Tensor = _kernel()(
        q.contiguous(), k.contiguous(), v.contiguous(), layout.cu_seq_q, layout.cu_seq_k, layout.max_q, layout.max_k,
        scale=scaling, window_size=(before, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[None].to(value.dtype)


@lru_cache(4)
@torch.inference_mode(False)  # kept for later calls, which may need gradients
def layout_of(pieces: tuple[Piece, ...], device: torch.device) -> Layout:
    """The layout of a row; the layers of a forward ask for the same one."""
    rows: list[np.ndarray] = []
    begin = trunk = 0
    for piece in pieces:
        if piece.shared:
            rows.append(np.arange(trunk, trunk + piece.shared))
        else:
            trunk = begin
        rows.append(np.arange(begin, begin + piece.length))
        begin += piece.length

    queries = [piece.length for piece in pieces]
    keys = [piece.length + piece.shared for piece in pieces]

    def borders(lengths: list[int]) -> Tensor:
        return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32).to(device, non_blocking=True)

    branches = any(piece.shared for piece in pieces)
    index = torch.from_numpy(np.concatenate(rows)).to(device, non_blocking=True) if branches else None
    return Layout(index, borders(queries), borders(keys), max(queries), max(keys))
