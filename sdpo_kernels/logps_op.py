"""The custom ops under `linear_logps`: rows gathered and scattered, fake kernels, autograd; only `logps.py` calls them.

Two pairs of ops have the same code: `linear_logps_op` for rows that are given, and `linear_logps_finding_op`, which
finds the scored rows itself (only in compiled graphs; elsewhere `logps.py` finds them).

Nothing here allocates anything of size N×V except what the caller asked to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdpo_kernels.backends import get_backend
from sdpo_kernels.backends.base import EXTRAS, HeadCall, Keep, Needs, Saved
from sdpo_kernels.backends.grad_tol import words_of
from sdpo_kernels.head import Head, product_dtype
from sdpo_kernels.namespaces import OPERATORS
from sdpo_kernels.rows import IGNORE_INDEX, busy_rows, check_ascending, check_targets


class Inputs(NamedTuple):
    """One entry for each input of `linear_logps_op`: the inputs themselves, whether they need gradients, or gradients.

    The fields are the op's parameters, in order; None is no gradient.
    """

    hidden: Any = None
    weight: Any = None
    targets: Any = None
    bias: Any = None
    index: Any = None
    logit_scale: Any = None
    softcap: Any = None
    temperature: Any = None
    outputs: Any = None
    dtype: Any = None
    backend: Any = None
    keep: Any = None
    ref_hidden: Any = None
    lora_b: Any = None
    grad_tol: Any = None
    grad_tol_relative: Any = None


class Outputs(NamedTuple):
    """What `linear_logps_op` returns; tensors not requested are of size 0."""

    logps: Tensor  # [N]
    state: Tensor  # [N, state_columns] float64
    entropy: Tensor  # [N] each
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    kept: Tensor  # for the backward, see base.Keep
    ref_logps: Tensor  # [N]
    tiles: Tensor  # [kept_rows, words] int64, with grad_tol above 0: which tiles the backward takes


class _SavedTensors(NamedTuple):
    """What the forward saves for the backward."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # in place of tuple.index
    logps: Tensor
    state: Tensor
    entropy: Tensor
    kept: Tensor
    lora_b: Tensor | None
    tiles: Tensor


class _Options(NamedTuple):
    """The inputs that are not tensors, as the backward needs them."""

    logit_scale: float
    softcap: float | None
    temperature: float
    dtype: torch.dtype
    backend: str
    keep: int
    grad_tol: float


def _linear_logps(
    hidden: Tensor,  # [N, H], with lora_b [N, H + r]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    index: Tensor | None,  # [N_scored]; None: found here, which waits for the device
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,  # names from EXTRAS, joined by commas
    dtype: torch.dtype,  # what operands are rounded to
    backend: str,
    keep: int,  # Keep.encode()
    ref_hidden: Tensor | None,  # as hidden, scored by the same head without gradient
    lora_b: Tensor | None,  # [V, r], further columns of the weight
    grad_tol: float,  # what the backward may leave out of dL/dz
    grad_tol_relative: bool,  # whether that is relative to a row's 1 − p
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Outputs`, as a plain tuple.

    1. gather the scored rows
    2. let the backend compute them
    3. score the reference's rows, if the backend has not done it in the same pass
    4. scatter the results to all rows
    """
    n_rows = hidden.shape[0]
    # the fake kernel cannot know how many rows are scored, so what is kept then has all rows
    kept_rows = n_rows if index is None else index.shape[0]
    if index is None:
        index = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    head = Head(logit_scale, softcap, temperature)
    weight = _whole(weight, lora_b)
    call = _scored(hidden, weight, targets, bias, index, head, dtype, outputs, kept_rows, ref_hidden)
    chosen = get_backend(backend)
    if not (hidden.is_cuda and chosen.asserts_inputs):
        check_ascending(index)
        check_targets(call.targets, call.weight.shape[0])

    out = chosen.forward(call, Keep.decode(keep, grad_tol, grad_tol_relative))

    ref_logps = out.ref_logps
    if call.ref_hidden is not None and ref_logps is None:
        alone = replace(call, hidden=call.ref_hidden, ref_hidden=None, outputs=(), kept_rows=0)
        ref_logps = chosen.forward(alone, Keep.nothing()).logps

    # rows that are not scored get 0; if all are scored, nothing is copied
    out_dtype = product_dtype(dtype)

    def whole(value: Tensor | None, empty_dtype: torch.dtype = out_dtype) -> Tensor:
        if value is None:
            return hidden.new_empty(0, dtype=empty_dtype)
        if index.shape[0] == n_rows:
            return value
        return value.new_zeros(n_rows, *value.shape[1:]).index_copy_(0, index, value)

    return Outputs(
        logps=whole(out.logps),
        state=whole(out.state),
        entropy=whole(out.entropy),
        log_sum_sq_probs=whole(out.log_sum_sq_probs),
        mean_logits=whole(out.mean_logits),
        is_top1=whole(out.is_top1, torch.bool),
        kept=hidden.new_empty((0, 0)) if out.kept is None else out.kept,
        ref_logps=whole(ref_logps),
        tiles=hidden.new_empty((0, 0), dtype=torch.int64) if out.tiles is None else out.tiles,
    )[:]  # a slice of a NamedTuple is the plain tuple that an op returns


def _fake_linear_logps(*inputs):
    given = Inputs(*inputs)
    hidden, backend, keep = given.hidden, get_backend(given.backend), Keep.decode(given.keep, given.grad_tol)
    n_rows, names, dtype = hidden.shape[0], given.outputs.split(","), product_dtype(given.dtype)

    # shapes must be those of the op, also where the number of scored rows is unknown
    kept_rows = n_rows if given.index is None else given.index.shape[0]
    if keep.is_direction:
        kept = hidden.new_empty((kept_rows, hidden.shape[1]), dtype=dtype)
    elif keep.n_columns == 0:
        kept = hidden.new_empty((0, 0))
    else:
        kept = hidden.new_empty((kept_rows, keep.n_columns), dtype=backend.stash_dtype(given.dtype, hidden.device))
    tiles = (kept_rows, words_of(given.weight.shape[0])) if keep.grad_tol > 0 else (0, 0)

    def vector(wanted: bool, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(n_rows if wanted else 0, dtype=dtype)

    return Outputs(
        logps=vector(True),
        state=hidden.new_empty((n_rows, backend.state_columns), dtype=torch.float64),
        entropy=vector("entropy" in names),
        log_sum_sq_probs=vector("log_sum_sq_probs" in names),
        mean_logits=vector("mean_logits" in names),
        is_top1=vector("is_top1" in names, torch.bool),
        kept=kept,
        ref_logps=vector(given.ref_hidden is not None),
        tiles=hidden.new_empty(tiles, dtype=torch.int64),
    )[:]


def _linear_logps_backward(
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
    lora_b: Tensor | None,
    tiles: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    dtype: torch.dtype,
    backend: str,
    keep: int,
    grad_tol: float,
    needs: list[bool],  # gradients of hidden, weight, bias and lora_b
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias and lora_b, contiguous; of size 0 if not needed."""
    if index is None:
        index = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    of_entropy = None if grad_entropy is None else grad_entropy.index_select(0, index)
    rows = busy_rows(grad_logps.index_select(0, index), of_entropy)
    if rows is not None:
        index = index[rows]
    elif index.shape[0] != (kept if grad_tol == 0 else tiles).shape[0]:
        # the forward did not know the number of scored rows
        rows = torch.arange(index.shape[0], device=index.device)
    head = Head(logit_scale, softcap, temperature)
    call = _scored(hidden, _whole(weight, lora_b), targets, bias, index, head, dtype, "", 0)

    def scored(vector: Tensor) -> Tensor:
        return vector.index_select(0, index)

    saved = Saved(
        logps=scored(logps),
        state=scored(state),
        entropy=None if grad_entropy is None else scored(entropy),
        kept=kept,
        rows=rows,
        keep=Keep.decode(keep, grad_tol),
        tiles=tiles if grad_tol > 0 else None,
    )
    h = None if grad_entropy is None else scored(grad_entropy)
    of_hidden, of_weight, of_bias, of_lora = needs
    # a LoRA alone: the frozen columns before its own get no product
    wanted = Needs(of_hidden, of_weight or of_lora, of_bias, 0 if of_weight else weight.shape[1] if of_lora else 0)
    dx, dw, db = get_backend(backend).backward(call, saved, scored(grad_logps), h, wanted)

    # rows that were left out get no gradient
    if dx is not None and index.shape[0] != hidden.shape[0]:
        dx = hidden.new_zeros(hidden.shape).index_copy_(0, index, dx)
    d_lora: Tensor | None = None
    if dw is not None and lora_b is not None:
        d_lora, dw = dw[:, -lora_b.shape[1] :], dw[:, : weight.shape[1]] if of_weight else None
        if dw is not None:
            d_lora = d_lora.clone()  # of a head with one row both are contiguous, and would share memory

    def own(gradient: Tensor | None) -> Tensor:
        # an op's outputs may not share memory
        return hidden.new_empty(0) if gradient is None else gradient.contiguous()

    return own(dx), own(dw), own(db), own(d_lora if of_lora else None)


def _fake_linear_logps_backward(
    grad_logps, grad_entropy, hidden, weight, targets, bias, index, logps, state, entropy, kept, lora_b, tiles,
    logit_scale, softcap, temperature, dtype, backend, keep, grad_tol, needs,
):  # fmt: skip
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape) if needed and tensor is not None else hidden.new_empty(0)

    of_hidden, of_weight, of_bias, of_lora = needs
    return like(hidden, of_hidden), like(weight, of_weight), like(bias, of_bias), like(lora_b, of_lora)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, out = Inputs(*inputs), Outputs(*output)
    unrequested = () if "entropy" in given.outputs.split(",") else (out.entropy,)
    ctx.mark_non_differentiable(
        out.state, out.log_sum_sq_probs, out.mean_logits, out.is_top1, out.kept, out.ref_logps, out.tiles,
        *unrequested,
    )  # fmt: skip
    ctx.set_materialize_grads(False)

    # the inputs themselves, [N]-sized vectors, and what `keep` asked for
    saved = _SavedTensors(
        hidden=given.hidden, weight=given.weight, targets=given.targets, bias=given.bias, index=given.index,
        logps=out.logps, state=out.state, entropy=out.entropy, kept=out.kept, lora_b=given.lora_b,
        tiles=out.tiles,
    )  # fmt: skip
    ctx.save_for_backward(*saved)
    ctx.options = _Options(
        given.logit_scale, given.softcap, given.temperature, given.dtype, given.backend, given.keep, given.grad_tol
    )


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, options, grad = _SavedTensors(*ctx.saved_tensors), ctx.options, Outputs(*grads)  # type: ignore[arg-type]
    grad_logps: Tensor | None = grad.logps
    if grad.logps is None and grad.entropy is None:
        return Inputs()[:]
    if grad_logps is None:
        grad_logps = torch.zeros_like(saved.logps)

    # only these four inputs are differentiable
    needed = Inputs(*ctx.needs_input_grad)
    needs = [needed.hidden, needed.weight, needed.bias, needed.lora_b]
    backward_op = linear_logps_backward_op if saved.index is not None else linear_logps_finding_backward_op
    found = backward_op(grad_logps, grad.entropy, *saved, *options, needs)
    dx, dw, db, d_lora = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return Inputs(hidden=dx, weight=dw, bias=db, lora_b=d_lora)[:]


def _define(name: str, function: Any, fake: Any, tags: Sequence[torch.Tag] = ()) -> Any:
    op = torch.library.custom_op(f"{OPERATORS}::{name}", function, mutates_args=(), tags=tags)
    op.register_fake(fake)
    return op


# without an index an op waits for the device to count its rows, so no CUDA graph can hold it
_UNSAFE = (torch.Tag.cudagraph_unsafe,)
linear_logps_op = _define("linear_logps", _linear_logps, _fake_linear_logps)
linear_logps_finding_op = _define("linear_logps_finding", _linear_logps, _fake_linear_logps, _UNSAFE)
linear_logps_backward_op = _define("linear_logps_backward", _linear_logps_backward, _fake_linear_logps_backward)
linear_logps_finding_backward_op = _define(
    "linear_logps_finding_backward", _linear_logps_backward, _fake_linear_logps_backward, _UNSAFE
)
for op in (linear_logps_op, linear_logps_finding_op):
    op.register_autograd(_backward, setup_context=_setup_context)


def _whole(weight: Tensor, lora_b: Tensor | None) -> Tensor:
    """[V, H + r]: for the time of a call only, not until the backward."""
    return weight if lora_b is None else torch.cat([weight, lora_b], 1)


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
    """The problem restricted to the scored rows."""
    if index.shape[0] != hidden.shape[0]:
        hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
        ref_hidden = None if ref_hidden is None else ref_hidden.index_select(0, index)
    names = tuple(name for name in EXTRAS if name in outputs.split(","))
    return HeadCall(hidden, weight, bias, targets, head, dtype, names, kept_rows, ref_hidden, index)
