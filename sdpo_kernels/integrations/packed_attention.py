"""Switch a model to an attention that keeps packed sequences apart, or say why that is impossible.

    reason = use_packed_attention(model)     # None: packed rows are safe now
    model(input_ids=ids, position_ids=positions)   # [1, N]; positions restart at 0 with each sequence; no mask
    reason = use_shared_prefixes(model)      # None: so are rows in which two answers share their prompt

    1. reject models with layers that are known to carry state over a sequence's end (recurrent, convolutional, linear
       attention): they would do so without any error
    2. switch to our own attention (attention_by_sequence.py) and probe it with two short sequences in one row
    3. on CUDA try FlashAttention and FlexAttention, which support restarting positions too, in the same way

An attention is used only if its probe passes. Rows with shared prompts (`shared_prefix.py`) need more: transformers'
own FlashAttention and FlexAttention read their positions wrongly, without an error, so a probe of its own decides.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_flash_attn_2_available

from sdpo_kernels.integrations import branched_flex, varlen_attention
from sdpo_kernels.integrations.attention_by_sequence import PACKED, packed_attention, packed_mask
from sdpo_kernels.integrations.causal_lm import evaluating
from sdpo_kernels.integrations.lm_head import LMHead, find_head, unwrap
from sdpo_kernels.integrations.positions import first_position
from sdpo_kernels.integrations.router_loss import find_router_loss

logger = logging.getLogger(__name__)

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
STATEFUL_CLASS = re.compile(
    r"mamba|rwkv|conv1d|shortconv|deltanet|deltarule|linear_?attention|lightning|recurrent|rglru|xlstm|retention|hyena",
    re.IGNORECASE,
)
PROBE_LENGTHS = (7, 6)
MARK = "_sdpo_shares_prefixes"  # on a model that takes branches


def use_packed_attention(model: nn.Module, *, only: str | None = None) -> str | None:
    """Switch `model` to an attention that keeps the sequences of one packed row apart.

    Call it before DDP or FSDP wrap the model, under the autocast used for training.

    Args:
        model: A causal language model of transformers.
        only: The name of the one attention to use, such as "flash_attention_2"; None: the fastest that is right.

    Returns:
        None if the model was switched; else why it cannot be. In that case the model is unchanged and needs padded
        batches with an attention mask.
    """
    base: Any = unwrap(model)
    reason = _stateful_layer(base)
    if reason is not None:
        return reason

    before = base.config._attn_implementation
    head = find_head(base)
    sequences = _probe_sequences(base)
    with evaluating(base):
        alone = [_hidden(head, [ids]) for ids in sequences]

    if only is not None:
        reason = _try(base, head, only, sequences, alone)
        if reason is not None:
            base.set_attn_implementation(before)
        return reason

    # Our own first, on every device: only with it can the probe see the windows that the layers get.
    reason = _try(base, head, PACKED, sequences, alone)
    if reason is not None:
        base.set_attn_implementation(before)
        return reason

    for name in _faster(next(base.parameters())):
        slower = _try(base, head, name, sequences, alone)
        if slower is None:
            return None
        logger.warning("keeping %s attention, %s", PACKED, slower)
        base.set_attn_implementation(PACKED)
    return None


def use_shared_prefixes(model: nn.Module, *, only: str | None = None) -> str | None:
    """Switch `model` to an attention that takes branches, too, after `use_packed_attention` has returned None.

    Call it under the same circumstances. On CUDA the switch is made only if one call (FlashAttention, or FlexAttention
    with a softcap) serves all branches: otherwise prompts that are not computed twice would cost more than they save.

    Args:
        model, only: as in `use_packed_attention`.

    Returns:
        None if rows of `shared_row` are right now; else why they are not, and the model is unchanged.
    """
    base: Any = unwrap(model)
    kind, before = type(base).__name__, base.config._attn_implementation
    base.__dict__.pop(MARK, None)
    if find_router_loss(base) is not None:
        return f"{kind} has an auxiliary loss of its router, which counts every token once"
    if only not in (None, PACKED):
        return f"{only} attention, which was asked for, takes no branches"

    parameter = next(base.parameters())
    if before != PACKED and not _one_call_serves(base, parameter):
        none = f"no attention on {parameter.device.type} serves branches of a {kind} in one call"
        return none if varlen_attention.is_there() else f"{none}; torch 2.13 has one for most models"

    base.set_attn_implementation(PACKED)
    try:
        with evaluating(base):
            reason = _probe_branch(base)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        reason = f"{kind} fails on a row with a branch: {error}"
    if reason is not None:
        base.set_attn_implementation(before)
        return reason
    setattr(base, MARK, True)
    return None


def shares_prefixes(model: nn.Module) -> bool:
    """Whether `use_shared_prefixes` has switched `model`, and nothing has ruled branches out since."""
    base: Any = unwrap(model)
    switched = MARK in base.__dict__ and base.config._attn_implementation == PACKED
    return switched and find_router_loss(base) is None


def _one_call_serves(base: Any, parameter: Tensor) -> bool:
    """Whether every layer's attention is one call on this device. Written without access to CUDA."""
    text = base.config.get_text_config()
    softcap = getattr(text, "attn_logit_softcapping", None)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    like = torch.empty((1, 1, 1, width), dtype=parameter.dtype, device=parameter.device)
    if any(hasattr(module, "sinks") for module in base.modules()):
        return False
    if softcap is not None:
        return branched_flex.serves(like, 0.0, softcap=softcap, sinks=None)
    return varlen_attention.serves(like, like, 0.0, special=False)


def _probe_branch(base: Any) -> str | None:
    """What goes wrong with a branch between other sequences and branches, under the current attention, or None."""
    kind, head = type(base).__name__, find_head(base)
    whole, own = _probe_sequences(base)
    shared = len(whole) // 2
    trunk, rest = whole.split([shared, len(whole) - shared])

    # a pair before it, whose trunk is another, and a sequence after it; the probed branch's own rows
    before, after = [own, whole[2:], whole], [own, whole[:3]]
    firsts = [0, 2, 0, shared, 0]
    begin = sum(len(ids) for ids in before)
    mine = slice(begin, begin + len(own))

    alone = _hidden(head, [torch.cat([trunk, own])])[shared:]
    row = _hidden(head, [*before, *after], firsts)[mine]
    moved = [own.flip(0), whole[2:].flip(0), torch.cat([trunk, rest.roll(1).flip(0)])]
    other = _hidden(head, [*moved, *after], firsts)[mine]
    eps = torch.finfo(_compute_dtype(base, row)).eps

    leak = _relative(other, row)
    if not leak <= eps**0.5 / 8:
        return f"another first answer changes the second one's hidden states in {kind} by {leak:.1e} (relative)"
    change = _relative(row, alone)
    if not change <= eps**0.5:
        return f"{kind} scores a branch differently: its hidden states change by {change:.1e} (relative)"
    return None


def _faster(parameter: Tensor) -> list[str]:
    """What is preferred to our own on CUDA. Written without access to CUDA and not yet run there."""
    if not parameter.is_cuda:
        return []
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else parameter.dtype
    flash = is_flash_attn_2_available() and dtype in (torch.float16, torch.bfloat16)
    return ["flash_attention_2", "flex_attention"] if flash else ["flex_attention"]


def _stateful_layer(base: Any) -> str | None:
    """Why the model's layers rule out packing, or None."""
    kind = type(base).__name__
    layer_types = getattr(base.config.get_text_config(), "layer_types", None) or []
    if first_position(base):
        return f"{kind} counts positions from {first_position(base)}, and packed sequences are counted from 0"
    others = sorted(set(layer_types) - PACKABLE_LAYERS)
    if others:
        return f"{kind} has layers of type {', '.join(others)}, which cannot tell packed sequences apart"
    for module in base.get_decoder().modules():
        if isinstance(module, Conv1D):  # GPT-2's name for a linear layer
            continue
        if STATEFUL_CLASS.search(type(module).__name__):
            return f"{kind} has a {type(module).__name__}, which carries state from one packed sequence into the next"
    return None


def _try(base: Any, head: LMHead, name: str, sequences: list[Tensor], alone: list[Tensor]) -> str | None:
    """Switch to `name` and probe it; None if it is right, else what is wrong."""
    # some models accept the name and ignore it, so look at the config afterwards
    kind = type(base).__name__
    try:
        base.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        return f"{kind} does not take {name} attention: {error}"
    if base.config.get_text_config()._attn_implementation != name:
        return f"{kind} does not attend through transformers' AttentionInterface"
    try:
        with evaluating(base):
            return _probe(base, head, sequences, alone)
    except (ValueError, RuntimeError, TypeError) as error:  # a model or a GPU kernel that does not support such a row
        return f"{kind} fails on a packed row with {name} attention: {error}"


def _probe(base: Any, head: LMHead, sequences: list[Tensor], alone: list[Tensor]) -> str | None:
    """What goes wrong with both sequences in one row under the current attention, or None."""
    kind = type(base).__name__
    with _windows() as windows:
        together = _hidden(head, sequences)
    first, second = sequences
    other = _hidden(head, [first.roll(1).flip(0), second])
    tail = len(first)
    eps = torch.finfo(_compute_dtype(base, together)).eps

    # Both rows have the same shape: the second sequence can differ only by a leak, or by rounding if experts regroup.
    leak = _relative(other[tail:], together[tail:])
    if not leak <= eps**0.5 / 8:
        moved = f"another neighbour changes hidden states by {leak:.1e} (relative)"
        return f"sequences leak into each other in {kind}: {moved}"

    change = _relative(together, torch.cat(alone))
    if not change <= eps**0.5:
        return f"{kind} scores a packed sequence differently: its hidden states change by {change:.1e} (relative)"

    # A model may build a sliding mask that none of its layers uses.
    slides = "sliding_attention" in (
        getattr(base.config.get_text_config(), "layer_types", None) or ["sliding_attention"]
    )
    told, asked = sorted(windows["attention"]), sorted(windows["mask"] if slides else ())
    if told != asked:
        return f"{kind} requests masks for windows of {asked} but passes its attention layers {told}"
    return None


def _compute_dtype(base: Any, hidden: Tensor) -> torch.dtype:
    """The dtype `hidden` was computed in: under autocast a last norm may return float32 from bfloat16 products.

    So do layers that bitsandbytes has quantised: 4 bits compute in a dtype of their own, 8 bits round to float16. Of
    several it is the coarsest.
    """
    kind = hidden.device.type
    dtypes = [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype]
    quantized: Any = getattr(base.config, "quantization_config", None)
    if getattr(quantized, "load_in_4bit", False):
        dtypes.append(quantized.bnb_4bit_compute_dtype)
    elif getattr(quantized, "load_in_8bit", False):
        dtypes.append(torch.float16)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _relative(a: Tensor, b: Tensor) -> float:
    """The largest difference between two hidden states of a token, in units of the root mean square token."""
    difference = (a.float() - b.float()).norm(dim=1)  # [tokens]
    return float(difference.max() / b.float().norm(dim=1).square().mean().sqrt())


def _hidden(head: LMHead, sequences: list[Tensor], firsts: list[int] | None = None) -> Tensor:
    """Hidden states [N, H] of the sequences, end to end in one row; `firsts` are their first positions, if not 0."""
    begins = firsts or [0] * len(sequences)
    positions = torch.cat(
        [torch.arange(n, n + len(ids), device=ids.device) for n, ids in zip(begins, sequences, strict=True)]
    )
    row = torch.cat(sequences)
    return head.hidden(input_ids=row[None], position_ids=positions[None], use_cache=False)[0]


def _probe_sequences(base: Any) -> list[Tensor]:
    """Two random sequences of ordinary tokens, always the same ones."""
    config = base.config.get_text_config()
    special = {v for n, v in vars(config).items() if n.endswith(("token_id", "token_index")) and isinstance(v, int)}
    ordinary = [i for i in range(min(config.vocab_size, 4096)) if i not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    device = next(base.parameters()).device
    tokens = torch.tensor(ordinary)
    return [tokens[torch.randint(len(tokens), (n,), generator=generator)].to(device) for n in PROBE_LENGTHS]


@contextmanager
def _windows() -> Iterator[dict[str, set[int]]]:
    """Record, for our own attention, the window of each requested mask and the one that each layer gets.

    A layer that gets its window only through a mask would attend to everything here, and a short probe cannot notice.
    """
    seen: dict[str, set[int]] = {"mask": set(), "attention": set()}

    def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
        if local_size is not None:
            seen["mask"].add(local_size)
        return packed_mask(*args, local_size=local_size, **kwargs)

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if kwargs.get("sliding_window") is not None:
            seen["attention"].add(kwargs["sliding_window"])
        return packed_attention(*args, **kwargs)

    # the same name now records; models look it up at every call
    AttentionInterface.register(PACKED, attention)
    AttentionMaskInterface.register(PACKED, mask)
    try:
        yield seen
    finally:
        AttentionInterface.register(PACKED, packed_attention)
        AttentionMaskInterface.register(PACKED, packed_mask)
