"""Positions of a causal language model: how many it has, and the position ids of a padded batch.

    position_limit(model)                            # 2048 for OPT, whose table has 2050 rows; None: no limit
    padded_positions(model, attention_mask)          # [B, T] for `model(position_ids=...)`

Many models count positions from the left edge of the batch unless they are given: with padding on the left, learned
positions are then shifted. Ids from the mask give the same log-probs whichever side is padded.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import Tensor, nn

from sdpo_kernels.integrations.lm_head import find_head, unwrap

_TABLE = re.compile(r"(^|\.)(wpe|[^.]*position[^.]*|pos_encoding)(\.|$)")  # position_embeddings, embed_positions …


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence that the language model has positions for; None if it computes them (rotary, ALiBi).

    Towers for images or sound do not count, and neither do rows of a table that no position uses. `model` may be on the
    meta device.
    """
    limits = [len(table.weight) - _first_row(table) for table in _tables(model)]
    for _, module in _text_modules(model):
        # GPT-J, CodeGen and CTRL have a fixed table that is not trained
        buffers = module.named_buffers(recurse=False)
        limits += [len(buffer) for name, buffer in buffers if _TABLE.search(name) and buffer.dim() == 2 and
                   buffer.is_floating_point()]  # fmt: skip

        # MPT's ALiBi is computed for this many positions
        if type(module).__name__ == "MptAttention":
            limits.append(int(module.max_seq_length))  # type: ignore[arg-type]
    return min(limits, default=None)


def padded_positions(model: nn.Module, attention_mask: Tensor | None) -> Tensor | None:
    """Position ids [B, T] of sequences padded on either side, or None if the model takes none or nothing is padded.

    Raises:
        ValueError: padding on the left, and the model neither takes position ids nor finds positions by the mask.
    """
    if attention_mask is None:
        return None
    if "position_ids" in inspect.signature(type(find_head(model).body).forward).parameters:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0) + first_position(model)

    # ALiBi (Bloom, MPT) and recurrent models need no ids
    if _tables(model) and bool((attention_mask[:, 0] == 0).any()):
        name = type(unwrap(model)).__name__
        raise ValueError(f"attention_mask: was padded on the left, must be on the right: {name} takes no position_ids")
    return None


def first_position(model: nn.Module) -> int:
    """The position id of a sequence's first token: 0, or padding_idx + 1 in RoBERTa and its relatives."""
    return max((_padding_rows(table) for table in _tables(model)), default=0)


def _tables(model: nn.Module) -> list[nn.Embedding]:
    """Learned position embeddings of the language model."""
    named = _text_modules(model)
    return [module for name, module in named if isinstance(module, nn.Embedding) and _TABLE.search(name)]


def _text_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    base: Any = unwrap(model)
    return list(base.get_decoder().named_modules())


def _first_row(table: nn.Embedding) -> int:
    """The row of a sequence's first token. OPT's and BART's tables add an offset to the position ids themselves."""
    return int(getattr(table, "offset", 0)) or _padding_rows(table)


def _padding_rows(table: nn.Embedding) -> int:
    return 0 if table.padding_idx is None else table.padding_idx + 1
