"""The custom ops under `linear_logps`: rows gathered and scattered, fake kernels, autograd; only `logps.py` calls them.

Nothing here allocates anything of size N×V but what the caller asked to keep.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.backends import get_backend
from sdpo_kernels.backends.base import EXTRAS, KEEP_DIRECTION, KEEP_NOTHING, HeadCall, Saved
from sdpo_kernels.head import Head, product_dtype
from sdpo_kernels.rows import IGNORE_INDEX

N_INPUTS = 13  # of linear_logps_op

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # logps, state, EXTRAS …, kept, ref


@torch.library.custom_op("sdpo_kernels::linear_logps", mutates_args=())
def linear_logps_op(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    index: Tensor | None,  # [N_scored]; None: found here
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,  # names from EXTRAS, joined by commas
    dtype: torch.dtype,  # what operands are rounded to
    backend: str,
    keep: int,
    ref_hidden: Tensor | None,  # [N, H], scored by the same head without gradient
) -> Outputs:
    """logps [N], state [N, w], the four extras ([N] or [0]), what is kept for the backward, logps of ref_hidden."""
    kept_rows = hidden.shape[0] if index is None else index.shape[0]
    if index is None:
        index = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    head = Head(logit_scale, softcap, temperature)
    call = _scored(hidden, weight, targets, bias, index, head, dtype, outputs, kept_rows, ref_hidden)
    _check_targets(call, index)
    out = get_backend(backend).forward(call, keep)
    ref_logps = out.ref_logps
    if call.ref_hidden is not None and ref_logps is None:
        alone = replace(call, hidden=call.ref_hidden, ref_hidden=None, outputs=(), kept_rows=0)
        ref_logps = get_backend(backend).forward(alone, KEEP_NOTHING).logps
    n_rows = hidden.shape[0]

    def whole(value: Tensor | None, name: str) -> Tensor:
        if value is None:
            return hidden.new_empty(0, dtype=torch.bool if name == "is_top1" else product_dtype(dtype))
        if index.shape[0] == n_rows:
            return value
        return value.new_zeros(n_rows, *value.shape[1:]).index_copy_(0, index, value)

    extras = [whole(getattr(out, name), name) for name in EXTRAS]
    kept = hidden.new_empty((0, 0)) if out.kept is None else out.kept
    return (
        whole(out.logps, "logps"),
        whole(out.state, "state"),
        extras[0],
        extras[1],
        extras[2],
        extras[3],
        kept,
        whole(ref_logps, "ref_logps"),
    )


@linear_logps_op.register_fake
def _(hidden, weight, targets, bias, index, logit_scale, softcap, temperature, outputs, dtype, backend, keep,
      ref_hidden):  # fmt: skip
    n_rows = hidden.shape[0]
    kept_rows = n_rows if index is None else index.shape[0]
    out = product_dtype(dtype)
    extras = [
        hidden.new_empty(n_rows if name in outputs.split(",") else 0, dtype=torch.bool if name == "is_top1" else out)
        for name in EXTRAS
    ]
    chosen = get_backend(backend)
    if keep == 0:
        kept = hidden.new_empty((0, 0))
    elif keep == KEEP_DIRECTION:
        kept = hidden.new_empty((kept_rows, hidden.shape[1]), dtype=out)
    else:
        kept = hidden.new_empty((kept_rows, keep), dtype=chosen.stash_dtype(dtype, hidden.device))
    state = hidden.new_empty((n_rows, chosen.state_columns), dtype=torch.float64)
    ref_logps = hidden.new_empty(0 if ref_hidden is None else n_rows, dtype=out)
    return (hidden.new_empty(n_rows, dtype=out), state, *extras, kept, ref_logps)


@torch.library.custom_op("sdpo_kernels::linear_logps_backward", mutates_args=())
def linear_logps_backward_op(
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    logps: Tensor,
    state: Tensor,
    entropy: Tensor,
    kept: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    dtype: torch.dtype,
    backend: str,
    keep: int,
    needs: list[bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, contiguous; [0]-sized where not needed."""
    if index is None:
        index = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    index, rows = _busy_rows(index, grad_logps, grad_entropy)
    head = Head(logit_scale, softcap, temperature)
    call = _scored(hidden, weight, targets, bias, index, head, dtype, "", 0)

    def scored(vector: Tensor) -> Tensor:
        return vector.index_select(0, index)

    if rows is None and index.shape[0] != kept.shape[0]:
        rows = torch.arange(index.shape[0], device=index.device)  # of a forward that could not know their number
    saved = Saved(scored(logps), scored(state), None if grad_entropy is None else scored(entropy), kept, rows, keep)
    h = None if grad_entropy is None else scored(grad_entropy)
    dx, dw, db = get_backend(backend).backward(call, saved, scored(grad_logps), h, (needs[0], needs[1], needs[2]))
    if dx is not None and index.shape[0] != hidden.shape[0]:
        dx = hidden.new_zeros(hidden.shape).index_copy_(0, index, dx)
    none = hidden.new_empty(0)
    return (
        none if dx is None else dx.contiguous(),
        none.clone() if dw is None else dw,
        none.clone() if db is None else db,
    )


@linear_logps_backward_op.register_fake
def _(grad_logps, grad_entropy, hidden, weight, targets, bias, index, logps, state, entropy, kept, logit_scale, softcap,
      temperature, dtype, backend, keep, needs):  # fmt: skip
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape) if needed and tensor is not None else hidden.new_empty(0)

    return like(hidden, needs[0]), like(weight, needs[1]), like(bias, needs[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    hidden, weight, targets, bias, index, *options = inputs
    logps, state, entropy, *rest = output
    unrequested = () if "entropy" in options[3].split(",") else (entropy,)
    ctx.mark_non_differentiable(state, *rest, *unrequested)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, bias, index, logps, state, entropy, rest[-2])
    ctx.options = options[:7]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, targets, bias, index, logps, state, entropy, kept = ctx.saved_tensors
    logit_scale, softcap, temperature, _, dtype, backend, keep = ctx.options
    grad_logps, grad_entropy = grads[0], grads[2]
    if grad_logps is None and grad_entropy is None:
        return (None,) * N_INPUTS
    if grad_logps is None:
        grad_logps = torch.zeros_like(logps)
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 3)]
    found = linear_logps_backward_op(
        grad_logps, grad_entropy, hidden, weight, targets, bias, index, logps, state, entropy, kept,
        logit_scale, softcap, temperature, dtype, backend, keep, needs,
    )  # fmt: skip
    dx, dw, db = (grad if needed else None for grad, needed in zip(found, needs, strict=True))
    return (dx, dw, None, db) + (None,) * (N_INPUTS - 4)


linear_logps_op.register_autograd(_backward, setup_context=_setup_context)


def _scored(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    index: Tensor,
    head: Head,
    dtype: torch.dtype,
    outputs: str,
    kept_rows: int,
    ref_hidden: Tensor | None = None,
) -> HeadCall:
    """The problem on the scored rows alone."""
    if index.shape[0] != hidden.shape[0]:
        hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
        ref_hidden = None if ref_hidden is None else ref_hidden.index_select(0, index)
    names = tuple(name for name in EXTRAS if name in outputs.split(","))
    return HeadCall(hidden, weight, bias, targets, head, dtype, names, kept_rows, ref_hidden)


def _check_targets(call: HeadCall, index: Tensor) -> None:
    """Targets must lie in [0, V): a ValueError on CPU, a device assert on CUDA, which does not wait for the device."""
    n_columns = call.weight.shape[0]
    right = (call.targets >= 0) & (call.targets < n_columns)
    if call.targets.is_cuda:
        torch._assert_async((index[1:] > index[:-1]).all(), "rows: its index must ascend")
        torch._assert_async(right.all(), f"targets: must be in [0, {n_columns}) or {IGNORE_INDEX}")
    elif not bool(right.all()):
        wrong = call.targets[~right][0].item()
        raise ValueError(f"targets: was {wrong}, must be in [0, {n_columns}) or {IGNORE_INDEX} (not scored)")


def _busy_rows(index: Tensor, grad_logps: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """On CPU, leave out rows whose coefficients are exactly 0: they would cost a GEMM's rows and change nothing.

    Returns what is left of `index`, and which of its entries that is; None: all.
    """
    if index.is_cuda:
        return index, None  # finding them would wait for the device
    busy = grad_logps.index_select(0, index) != 0
    if grad_entropy is not None:
        busy |= grad_entropy.index_select(0, index) != 0
    if bool(busy.all()):
        return index, None
    return index[busy], busy.nonzero().squeeze(1)
