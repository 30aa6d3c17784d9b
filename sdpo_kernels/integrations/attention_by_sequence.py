"""Attention over packed sequences, end to end in one row, without a mask: `attn_implementation="sdpo_packed"`.

Importing this file registers the attention and its mask function with transformers; `packed_attention.py` switches
models to it. `position_ids` [1, N] alone say what belongs together: a piece that begins at 0 is a sequence, and a piece
that begins at s > 0 is a branch, which continues the first s positions of the last sequence (its trunk). Every piece
gets a scaled-dot-product attention of its own: no padding is computed, there is no [N, N] mask, and the scores of a
sequence do not depend on what it is packed with. Anything else (padded batches, generation with a cache) gets the usual
mask and attention.

For each layer:
    1. a mask, a cache or a bidirectional layer: ordinary attention
    2. else split the row into its pieces, attend within each, and concatenate the results; the keys of a branch are
       those of its trunk's first positions, then its own
    3. within a piece: torch's fused attention, or blocks of queries where those are faster or the fused one cannot
       do it (softcap, sinks). On CUDA one call serves all pieces of a row with branches: FlashAttention
       (`varlen_attention.py`), or FlexAttention with a softcap (`branched_flex.py`)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sdpo_kernels.integrations import branched_flex, varlen_attention
from sdpo_kernels.integrations.pieces import Piece, pieces

BLOCK = 64  # queries per block in _attend_in_blocks

# In bfloat16 on CPU, blocks of float32 products beat torch's fused attention on the chip measured (AMD, AVX-512-BF16):
# stories260K under autocast, mean lengths 35 to 256. In float32 the fused kernel wins.
# Blocks keep their probabilities for the backward, so above this length the fused kernel's lower memory matters more.
BLOCKS_UP_TO = 512

# Queries of a branch at a time in torch's fused attention: each gets only the keys it can see. Faster than one masked
# call, and than a square call whose other rows are thrown away (`python -m benchmarks.body`).
BRANCH_QUERIES = 256

PACKED = "sdpo_packed"  # models that switch SDPA off (Gemma 2) refuse a name that contains "sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function; it ignores kwargs that only other implementations read.

    Args:
        query: [B, heads, N, D]; key, value: [B, kv_heads, M, D].
        attention_mask: None, or [B, 1, N, M] bool (True: attend) if `packed_mask` found that one is needed.
        sliding_window: a position attends to the last `sliding_window` positions, including itself.
        softcap: scores become softcap·tanh(score/softcap). s_aux: [heads], one more score per row, without a value.
        position_ids: [1, N] or [B, N]; a piece begins where a position is not the previous one plus 1 (see above).

    Returns:
        [B, N, heads, D] and None.
    """
    if position_bias is not None:
        raise ValueError(f"position_bias: was given to {PACKED} attention, must be None")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "sinks": s_aux}

    # not a packed row: ordinary attention
    if attention_mask is not None or not causal or query.shape[2] != key.shape[2]:
        return _attend_masked(query, key, value, attention_mask, **options).transpose(1, 2).contiguous(), None

    found = _pieces(position_ids, query)
    branches = any(piece.shared for piece in found)
    if branches and varlen_attention.serves(query, value, dropout, special=_is_special(softcap, s_aux)):
        return varlen_attention.attend(query, key, value, found, sliding_window, scaling), None
    if branches and softcap is not None and branched_flex.serves(query, dropout, softcap=softcap, sinks=s_aux):
        return branched_flex.attend(query, key, value, found, sliding_window, scaling, softcap), None

    # split and cat: with slices, the backward would build a gradient of the whole row for every sequence
    lengths = [piece.length for piece in found]
    parts, trunk = [], (key, value)
    for piece, q, k, v in zip(found, *(t.split(lengths, 2) for t in (query, key, value)), strict=True):
        if piece.shared:
            k, v = (torch.cat([whole[:, :, : piece.shared], own], 2) for whole, own in zip(trunk, (k, v), strict=True))
        else:
            trunk = (k, v)
        parts.append(_attend_causal(q, k, v, sliding_window, **options))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return out.transpose(1, 2).contiguous(), None


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """None for a row without padding; sdpa's mask for padding, a cache (M != N) or a model's own overlay (use_vmap)."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and not use_vmap and q_length == kv_length:
        return None
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)


def _pieces(position_ids: Tensor | None, query: Tensor) -> list[Piece]:
    """The pieces of the row, read once for all layers: on CUDA that waits for the device."""
    if position_ids is None:
        raise ValueError(f"position_ids: did not reach the attention layer, {PACKED} attention needs them")

    # kept on the tensor itself, which every layer gets; an inference tensor does not say whether it was changed since
    version = None if position_ids.is_inference() else position_ids._version
    kept: tuple[int, list[Piece]] | None = getattr(position_ids, "_sdpo_pieces", None)
    if kept is not None and kept[0] == version:
        found = kept[1]
    else:
        found = pieces(position_ids)
        if version is not None:
            position_ids._sdpo_pieces = (version, found)  # type: ignore[attr-defined]
    if query.shape[0] > 1 and len(found) > 1:
        raise ValueError(f"input_ids: was of {query.shape[0]} rows with restarting position_ids, must be one row")
    return found


def _attend_causal(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, *, dropout: float, scaling: float | None, **special: Any
) -> Tensor:
    """[1, heads, L, D] of one piece: its L queries are the last of the M positions that the keys are of."""
    length, lead = k.shape[2], k.shape[2] - q.shape[2]
    if window is not None and window >= length:
        window = None
    half = q.dtype.itemsize == 2 or torch.is_autocast_enabled(q.device.type)
    blocks_pay = q.device.type == "cpu" and half and length <= BLOCKS_UP_TO
    if blocks_pay or _is_special(**special):
        return _attend_in_blocks(q, k, v, window, dropout=dropout, scaling=scaling, **special)

    # torch's fused kernels take a causal flag, or a mask, but know no window, and no branch
    grouped = q.shape[1] != k.shape[1]
    if window is None and not lead:
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scaling, enable_gqa=grouped)
    out, begin = [], lead
    for part in q.split(BRANCH_QUERIES if lead else length, 2):
        end = begin + part.shape[2]
        start = 0 if window is None else max(0, begin - window + 1)
        distance = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(start, end, device=q.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        out.append(
            F.scaled_dot_product_attention(
                part, k[:, :, start:end], v[:, :, start:end], mask, dropout, scale=scaling, enable_gqa=grouped
            )
        )
        begin = end
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int | None, **options: Any) -> Tensor:
    """Causal attention [1, heads, L, D], 64 queries at a time, each block with only the keys that it can see."""
    out, begin = [], k.shape[2] - q.shape[2]
    for block in q.split(BLOCK, 2):
        end = begin + block.shape[2]
        start = 0 if window is None else max(0, begin - window + 1)

        # −inf above the diagonal, and for keys that have left the window
        shape, lead = (end - begin, end - start), begin - start
        bias = torch.full(shape, float("-inf"), device=q.device).triu_(lead + 1)
        if window is not None:
            bias += torch.full(shape, float("-inf"), device=q.device).tril_(lead - window)

        out.append(_explicit(block, k[:, :, start:end], v[:, :, start:end], bias, **options))
        begin = end
    return torch.cat(out, 2)


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float, scaling: float | None, **special: Any
) -> Tensor:
    """[B, heads, N, D] of a batch with a mask [B, 1, N, M], or of queries that see every key."""
    if not _is_special(**special):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling, enable_gqa=grouped)
    bias = torch.zeros((), device=q.device)
    if mask is not None:
        lowest = torch.finfo(torch.float32).min  # not -inf: padding rows see no key at all
        bias = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, lowest).unsqueeze(2)
    return _explicit(q, k, v, bias, dropout=dropout, scaling=scaling, **special)


def _is_special(softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether torch's fused attention cannot compute it."""
    return softcap is not None or sinks is not None


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[B, heads, N, D] by plain products, in float32 or wider.

    bias is added to the scores [B, kv_heads, heads / kv_heads, N, M].
    """
    (batch, heads, length, width), kv_heads = q.shape, k.shape[1]
    dtype, out_dtype = torch.promote_types(q.dtype, torch.float32), v.dtype
    # scores are float32 or wider, whatever the session's autocast
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        q = q * (width**-0.5 if scaling is None else scaling)

        # query heads that share a key head are additional rows of one product
        scores = q.reshape(batch, kv_heads, -1, width) @ k.transpose(2, 3)
        scores = scores.view(batch, kv_heads, heads // kv_heads, length, k.shape[2])
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + bias
        if sinks is not None:
            column = sinks.to(dtype).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, column], -1)

        probs = F.dropout(scores.softmax(-1)[..., : k.shape[2]], dropout)
        out = probs.reshape(batch, kv_heads, -1, k.shape[2]) @ v
    return out.view(batch, heads, length, v.shape[3]).to(out_dtype)
