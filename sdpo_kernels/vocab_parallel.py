"""The primitive over a group of processes, each with all rows and a slice of the vocabulary (tensor parallelism).

    out = vocab_parallel_linear_logps(hidden, weight_slice, targets, group=group)     # every rank of the group calls it
    out.logps                                                                         # [N], the same on every rank

    1. the rank that has a row's target computes its logit, and all ranks learn it          all-reduce  8·N bytes
    2. each rank's sums over its own columns, by the device's own kernels                   all-gather 16·N a rank
    3. log-probs from the sums, added in the order of the ranks (`backends/slices.py`)
    4. backward: each rank's rows of dW, which stay where they are; dX is the sum of the
       ranks' parts, in float32                                                             all-reduce  4·N·H

N counts scored rows. Each extra adds up to 16·N bytes a rank to step 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_kernels import collectives
from sdpo_kernels.backends import choose_slice_backend, slices
from sdpo_kernels.backends.base import (
    EXTRAS,
    Backend,
    Gradients,
    HeadCall,
    Keep,
    Needs,
    Request,
    Saved,
    SliceForward,
)
from sdpo_kernels.head import Head, product_dtype
from sdpo_kernels.logps import LinearLogps, check_inputs, check_stash_bytes, columns_to_keep
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, busy_rows, check_ascending, check_targets


def vocab_parallel_linear_logps(
    hidden: Tensor,
    weight_slice: Tensor,
    targets: Tensor,
    *,
    bias_slice: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    slice_rows: Sequence[int] | None = None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = (),
    rows: ScoredRows | None = None,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
) -> LinearLogps:
    """`linear_logps` for a head whose rows are divided over the ranks of `group`, each of which has all of the batch.

    Args:
        hidden: [N, H], the same on every rank; its gradient is summed over the ranks, so that it is the same, too. With
            `sequence_parallel` this rank's [N / R, H] of the R ranks' rows: they are gathered here, and the gradient is
            reduce-scattered.
        weight_slice: [V_r, H] this rank's rows of the head, in the order of the group's ranks; V_r may be 0. Its
            gradient is complete: do not sum it over the group.
        targets: [N] int64 in [0, V), V = Σ V_r, or −100; the same on every rank.
        bias_slice: [V_r].
        group: the process group; None: the default one. Every rank calls this with the same options, and each gradient
            is needed on all ranks or on none.
        slice_rows: V_r of every rank. None: the ranks tell each other, and compare their arguments, so that a mistake
            on one of them is an error on all (a host synchronisation); otherwise the others wait for a failed rank.
        stash_bytes: of this rank.
        temperature, logit_scale, softcap, outputs, rows, backend: as in `linear_logps`.

    Returns:
        `LinearLogps`, the same on every rank. On the CPU (native) log-probs are bit for bit those of any other number
        of ranks if every slice begins at a multiple of 64 columns, up to float64's own rounding of the sums.

    Raises:
        ValueError: naming the argument, what it was and what it should be.
    """
    names = tuple(name for name in EXTRAS if name in outputs)
    count = dist.get_world_size(group)
    try:
        check_stash_bytes(stash_bytes)
        head = Head(logit_scale, softcap, temperature)
        dtype = _check(hidden, weight_slice, targets, bias_slice, outputs, rows, count if sequence_parallel else 1)
        index = (targets != IGNORE_INDEX).nonzero().squeeze(1) if rows is None else rows.index
        chosen = choose_slice_backend(backend, Request(hidden.device, dtype, weight_slice.dtype, head, names))
        problem = None
    except (RuntimeError, ValueError) as error:
        if slice_rows is not None:
            raise
        problem = error

    if slice_rows is None:
        options = (temperature, logit_scale, softcap, names, sequence_parallel)
        slice_rows = _agree(hidden, weight_slice, bias_slice, targets, rows, options, group, problem)
    collectives.check_sizes("slice_rows", slice_rows, len(weight_slice), group)

    check_ascending(index)
    scored = targets.index_select(0, index)
    check_targets(scored, sum(slice_rows))

    trains = any(t is not None and t.requires_grad for t in (hidden, weight_slice, bias_slice))
    keep = Keep.nothing()
    if trains and torch.is_grad_enabled() and len(weight_slice):
        keep = columns_to_keep(chosen, hidden, weight_slice, len(index), dtype, stash_bytes)

    call = _Call(chosen, head, dtype, names, keep, group, tuple(slice_rows), sequence_parallel)
    found = _VocabParallelLogps.apply(hidden, weight_slice, bias_slice, scored, index, call)
    if len(index) != len(targets):
        found = [value.new_zeros(len(targets)).index_copy(0, index, value) for value in found]
    return LinearLogps(found[0], **dict(zip(names, found[1:], strict=True)))


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, outputs: Sequence[str],
    rows: ScoredRows | None, ranks: int,
) -> torch.dtype:  # fmt: skip
    """The dtype of operands; ValueError as in `linear_logps`, but a slice may be empty."""
    if ranks > 1 and hidden.dim() == 2:
        if len(hidden) * ranks != len(targets):
            raise ValueError(
                f"hidden: was of {len(hidden)} rows, must be {len(targets)} / {ranks} with sequence_parallel"
            )
        hidden = hidden[:1].expand(len(targets), -1) if len(hidden) else hidden
    if weight.dim() == 2 and len(weight) == 0:
        weight = weight.new_empty((1, weight.shape[1]))
        bias = None if bias is None else bias.new_empty(1)
    try:
        return check_inputs(hidden, weight, targets, bias, outputs, rows, None)
    except ValueError as error:
        # named as the arguments are here
        raise ValueError(re.sub(r"^(weight|bias):", r"\1_slice:", str(error))) from None


def _agree(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: ScoredRows | None,
    options: tuple[object, ...],
    group: dist.ProcessGroup | None,
    problem: RuntimeError | ValueError | None,
) -> list[int]:
    """V_r of every rank, after comparing what must be the same on all of them; raises on all ranks or on none."""
    kept = (targets != IGNORE_INDEX).nonzero().squeeze(1) if rows is None else rows.index
    mine: dict[str, Any] = {
        "hidden": (list(hidden.shape), str(hidden.dtype)),
        "weight_slice": (list(weight.shape[1:]), str(weight.dtype)),
        "targets": targets.index_select(0, kept).tolist() if problem is None else None,
        "bias_slice": None if bias is None else str(bias.dtype),
        "options": options,
        "gradients": [hidden.requires_grad, weight.requires_grad, torch.is_grad_enabled()],
        "rows": len(weight) if weight.dim() else 0,
        "problem": None if problem is None else str(problem),
    }
    mine["targets"] = hash(tuple(mine["targets"] or ()))  # of ints: the same in every process
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)

    if problem is not None:
        raise problem
    for rank, theirs in enumerate(everyone):
        if theirs["problem"] is not None:
            raise ValueError(f"rank {rank} of the group: {theirs['problem']}")
    for name in ("hidden", "weight_slice", "bias_slice", "targets", "options", "gradients"):
        for rank, theirs in enumerate(everyone):
            if theirs[name] != everyone[0][name]:
                was = "other ones" if name == "targets" else theirs[name]
                must = "the same" if name == "targets" else everyone[0][name]
                raise ValueError(f"{name}: was {was} on rank {rank} of the group, must be {must} as on rank 0")
    return [theirs["rows"] for theirs in everyone]


class _Call(NamedTuple):
    """What is not a tensor."""

    backend: Backend
    head: Head
    dtype: torch.dtype
    outputs: tuple[str, ...]
    keep: Keep
    group: dist.ProcessGroup | None
    slice_rows: tuple[int, ...]
    sequence_parallel: bool

    def head_call(self, x: Tensor, weight: Tensor, bias: Tensor | None, scored: Tensor) -> HeadCall:
        """This rank's slice of the problem."""
        start = sum(self.slice_rows[: dist.get_rank(self.group)])
        own = scored - start
        own = own.where((own >= 0) & (own < len(weight)), -1)
        return HeadCall(x, weight, bias, own, self.head, self.dtype, self.outputs, len(x), is_slice=True)

    def rows_of(self, hidden: Tensor, index: Tensor) -> Tensor:
        """The scored rows [N_scored, H]; with sequence parallelism those of all ranks."""
        if self.sequence_parallel:
            hidden = hidden.to(self.dtype)  # as the products round it: under autocast half the bytes to send
            whole = hidden.new_empty((len(hidden) * len(self.slice_rows), hidden.shape[1]))
            collectives.all_gather(whole, hidden.contiguous(), self.group)
            hidden = whole
        return hidden if len(index) == len(hidden) else hidden.index_select(0, index)

    def hidden_gradient(self, part: Tensor, hidden: Tensor, index: Tensor) -> Tensor:
        """The gradient of `hidden` from this rank's part [N_scored, H], summed over the ranks before it is rounded."""
        if not self.sequence_parallel:
            dist.all_reduce(part, group=self.group)
            part = part.to(hidden.dtype)
            return part if len(part) == len(hidden) else hidden.new_zeros(hidden.shape).index_copy_(0, index, part)

        whole = part.new_zeros((len(hidden) * len(self.slice_rows), part.shape[1])).index_copy_(0, index, part)
        mine = part.new_empty(hidden.shape)
        collectives.reduce_scatter(mine, whole, self.group)
        return mine.to(hidden.dtype)

    def exchange(self, part: SliceForward) -> list[SliceForward]:
        """The sums of all ranks, in order."""
        # a backend may answer more than was asked for, and a rank without columns does not
        names = ["total", "k", *(field for output in self.outputs for field in slices.FIELDS[output])]
        mine = torch.stack([getattr(part, name) for name in names])
        everyone = [torch.empty_like(mine) for _ in self.slice_rows]
        dist.all_gather(everyone, mine, group=self.group)
        return [SliceForward(kept=None, **dict(zip(names, one, strict=True))) for one in everyone]


class _VocabParallelLogps(torch.autograd.Function):
    """The steps of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, scored: Tensor, index: Tensor, call: _Call
    ) -> tuple[Tensor, ...]:
        own = call.head_call(call.rows_of(hidden, index), weight, bias, scored)
        n_rows, dtype = len(scored), product_dtype(call.dtype)
        zeros = hidden.new_zeros(n_rows, dtype=torch.float64)

        # a rank without columns takes part in every exchange
        target_logits = call.backend.target_logits(own) if len(weight) else zeros.clone()
        dist.all_reduce(target_logits, group=call.group)
        part = _empty(zeros, call.outputs)
        if len(weight):
            part = call.backend.slice_forward(own, target_logits, call.keep)
        merged = slices.merge(call.exchange(part), target_logits, sum(call.slice_rows), call.outputs, dtype)

        ctx.save_for_backward(hidden, weight, bias, scored, index, merged.logps, merged.lse, merged.entropy, *part[1:3])
        ctx.call = call
        extras = {name: getattr(merged, name) for name in call.outputs}
        ctx.mark_non_differentiable(*(value for name, value in extras.items() if name != "entropy"))
        ctx.set_materialize_grads(False)
        return merged.logps, *extras.values()

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, *grad_extras: Tensor | None) -> tuple[Tensor | None, ...]:
        slices.check_first_derivative()
        hidden, weight, bias, scored, index, logps, lse, entropy, k, kept = ctx.saved_tensors
        call: _Call = ctx.call
        needs = Needs(*ctx.needs_input_grad[:3])
        grad_entropy = dict(zip(call.outputs, grad_extras, strict=True)).get("entropy")
        if grad_logps is None and grad_entropy is None:
            return (None,) * 6

        coefficient = torch.zeros_like(logps) if grad_logps is None else grad_logps
        busy = busy_rows(coefficient, grad_entropy)
        # hidden's rows are gathered again rather than kept, also by a rank without columns
        x = call.rows_of(hidden, *slices.taken(busy, index))

        found = Gradients(None, None, None)
        if len(weight):
            state = slices.state_of(call.backend, lse, k)
            scored, state, logps, entropy, coefficient, grad_entropy = slices.taken(
                busy, scored, state, logps, entropy, coefficient, grad_entropy
            )
            own, saved = call.head_call(x, weight, bias, scored), Saved(logps, state, entropy, kept, busy, call.keep)
            found = slices.slice_backward(call.backend, own, saved, coefficient, grad_entropy, needs)

        dx, dw, db = found
        if needs.hidden:
            part = x.new_zeros(x.shape, dtype=product_dtype(call.dtype)) if dx is None else dx
            dx = call.hidden_gradient(slices.spread(part, busy, len(index)), hidden, index)
        if needs.weight and dw is None:
            dw = torch.zeros_like(weight)
        if needs.bias and db is None and bias is not None:
            db = torch.zeros_like(bias)
        return dx, dw, db, None, None, None


def _empty(zeros: Tensor, outputs: Sequence[str]) -> SliceForward:
    """What a slice without columns answers."""
    extras = {field: zeros for output in outputs for field in slices.FIELDS[output]}
    if "is_top1" in outputs:
        extras["max_rest"] = torch.full_like(zeros, -torch.inf)
    return SliceForward(zeros, zeros, None, **extras)
