"""The primitive for a head whose rows are sharded over processes that each have rows of the batch of their own (FSDP2).

    out = sharded_linear_logps(hidden, weight_shard, targets, group=group)        # every rank of the group calls it
    out.logps                                                                     # of this rank's rows

Each rank has its own rows of the batch and its own rows of the head (`DTensor.to_local()` along its first dimension).
No rank ever holds more of the head than its shard and two chunks; each chunk is a slice of the vocabulary for the
device's own kernels (`backends/slices.py`).

Forward:
    1. every rank gets its targets' rows of the head from their owners: k, the logit of each target
    2. for each chunk, the same rows of every shard: the ranks exchange them, the next chunk while the present one is
       multiplied, and add the sums of their own batch rows, and stash what fits
    3. log-probs from the sums of all chunks

Backward, for the same chunks:
    1. exchange the rows again, and recompute what is not stashed
    2. every rank adds to its own dX
    3. dW and db of the chunk are summed over the ranks, in float32, at the rows' owners
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_kernels import collectives
from sdpo_kernels.backends import choose_slice_backend, slices
from sdpo_kernels.backends.base import (
    EXTRAS,
    STASH_MULTIPLE,
    Backend,
    HeadCall,
    Keep,
    Needs,
    Request,
    Saved,
    SliceForward,
)
from sdpo_kernels.head import Head, product_dtype
from sdpo_kernels.logps import LinearLogps, check_outputs, check_rows, stash_budget
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, busy_rows, check_ascending, check_targets, segment_sum


def sharded_linear_logps(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    *,
    bias_shard: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    shard_rows: Sequence[int] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    rows: ScoredRows | None = None,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
    chunk_columns: int = 8192,
) -> LinearLogps:
    """Log-prob of each row's target and further outputs, as `linear_logps` returns them, for a head sharded over ranks.

    Args:
        hidden: [N, H] this rank's rows; N may differ between ranks, and be 0.
        weight_shard: [V_r, H] this rank's own rows of the head and no others, in the order of the group's ranks;
            rounded to hidden's dtype (under autocast both to its dtype), chunk by chunk. Its gradient is in its own
            dtype.
        targets: [N] int64 in [0, V), V = Σ V_r, or −100.
        bias_shard: [V_r].
        group: the process group; None: the default one. Every rank calls this with the same options, and each gradient
            is needed on all ranks or on none.
        shard_rows: V_r of every rank; None: gathered from the ranks (a host synchronisation).
        outputs, rows, backend, stash_bytes: as in `linear_logps`; the stash is for this rank's rows and all of V.
        chunk_columns: rows of the head that are exchanged at a time, at least 1.

    The gradients of `weight_shard` and `bias_shard` are summed over the rows of all ranks: divide them by the number of
    ranks if gradients of other parameters are averaged, as FSDP does. An error on one rank leaves the others waiting.
    On CUDA the host waits for the device once a forward: the ranks tell each other how many targets they ask for.

    Raises:
        ValueError: naming the argument, what it was and what it should be.
    """
    _check(hidden, weight_shard, targets, bias_shard, outputs, chunk_columns)
    if rows is not None:
        check_rows(rows, hidden)
    if shard_rows is None:
        shard_rows = _gather_shard_rows(weight_shard, group)
    collectives.check_sizes("shard_rows", shard_rows, len(weight_shard), group)

    # only scored rows take part, but every rank walks all chunks, even without any
    n_columns = sum(shard_rows)
    if n_columns == 0:
        raise ValueError("weight_shard: was empty on every rank, must have at least one row (V >= 1)")
    index = (targets != IGNORE_INDEX).nonzero().squeeze(1) if rows is None else rows.index
    check_ascending(index)
    scored = targets[index]
    check_targets(scored, n_columns)

    names = tuple(name for name in EXTRAS if name in outputs)
    head, dtype = Head(logit_scale, softcap, temperature), _dtype(hidden)
    request = Request(hidden.device, dtype, dtype, head, names)
    chosen = choose_slice_backend(backend, request)

    trains = any(t is not None and t.requires_grad for t in (hidden, weight_shard, bias_shard))
    whole = (n_columns, hidden.shape[1])
    budget = stash_budget(hidden.device, len(index), whole, stash_bytes) if trains and torch.is_grad_enabled() else 0
    call = _Call(chosen, head, dtype, group, tuple(shard_rows), _plan(shard_rows, chunk_columns), names, budget)
    found = _ShardedLogps.apply(hidden[index], weight_shard, bias_shard, scored, call)
    logps, *extras = (value.new_zeros(len(targets)).index_copy(0, index, value) for value in found)
    return LinearLogps(logps, **dict(zip(names, extras, strict=True)))


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    outputs: Sequence[str],
    chunk_columns: int,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden, weight_shard: were of shapes {shapes}, must be [N, H] and [V_r, H]")
    if torch.float64 in (hidden.dtype, weight.dtype) and hidden.dtype != weight.dtype:
        raise ValueError(f"weight_shard: was {weight.dtype}, must be {hidden.dtype} as hidden is")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: was {targets.dtype} of shape {list(targets.shape)}, must be int64 [N]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias_shard: was of shape {list(bias.shape)}, must be {list(weight.shape[:1])}, V_r")
    if chunk_columns < 1:
        raise ValueError(f"chunk_columns: was {chunk_columns}, must be at least 1")
    check_outputs(outputs)


def _dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that operands are rounded to."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _gather_shard_rows(shard: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    own = torch.tensor([shard.shape[0]], device=shard.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return [int(count) for count in counts]


class _Chunk(NamedTuple):
    """The same rows of every shard, or of one alone."""

    first: int  # in the shard
    rows: int  # of a shard
    owner: int | None  # None: of every rank, in their order


def _plan(shard_rows: Sequence[int], chunk_columns: int) -> list[_Chunk]:
    """The chunks of all shards, the same on every rank: equal parts of all as far as they go, then the rest."""
    common, ranks = min(shard_rows), len(shard_rows)
    step = max(1, chunk_columns // ranks)
    if step >= STASH_MULTIPLE:
        step -= step % STASH_MULTIPLE
    plan = [_Chunk(first, min(step, common - first), None) for first in range(0, common, step)]
    for owner, rows in enumerate(shard_rows):
        plan += [_Chunk(first, min(chunk_columns, rows - first), owner) for first in range(common, rows, chunk_columns)]
    return plan


class _Targets(NamedTuple):
    """Where the scored rows' targets are, [N] each."""

    owner: Tensor
    row: Tensor  # of the owner's shard

    @classmethod
    def of(cls, scored: Tensor, shard_rows: Sequence[int]) -> _Targets:
        owner, row, end = torch.zeros_like(scored), scored, 0
        # from the host's own numbers: a tensor of them on the device would have to be waited for
        for rows in shard_rows[:-1]:
            end += rows
            beyond = scored >= end
            owner, row = owner + beyond, row - rows * beyond
        return cls(owner, row)

    def in_chunk(self, chunk: _Chunk) -> Tensor:
        """[N] the targets' columns in the chunk, -1 where it has not got them."""
        column = self.row - chunk.first
        inside = (column >= 0) & (column < chunk.rows)
        if chunk.owner is None:
            return (self.owner * chunk.rows + column).where(inside, -1)
        return column.where(inside & (self.owner == chunk.owner), -1)


class _Call(NamedTuple):
    """What is not a tensor, and the exchanges of the ranks."""

    backend: Backend
    head: Head
    dtype: torch.dtype
    group: dist.ProcessGroup | None
    shard_rows: tuple[int, ...]
    plan: list[_Chunk]
    outputs: tuple[str, ...]
    budget: int  # bytes of the stash

    def walk(self, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Each chunk's place, its rows of the head [C, H], rounded for the products, and its part of the bias [C].

        Let go of them before the next is asked for: a loop's variables, zip and enumerate keep them until then.
        """

        def start(chunk: _Chunk) -> list[tuple[Tensor, Any]]:
            parts = [(weight, self.dtype)] + ([] if bias is None else [(bias, bias.dtype)])
            return [self._start(tensor, chunk, dtype) for tensor, dtype in parts]

        # a chunk is on its way while the one before it is multiplied
        coming = start(self.plan[0])
        for place in range(len(self.plan)):
            here = coming
            if place + 1 < len(self.plan):
                coming = start(self.plan[place + 1])
            rows, *more = (_arrived(*one) for one in here)
            yield place, rows, more[0] if more else None
            del here, rows, more

    def _start(self, shard: Tensor, chunk: _Chunk, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """Start to send the chunk's rows of the shards; they are there after `wait` of the second."""
        part = shard[chunk.first : chunk.first + chunk.rows].to(dtype).contiguous()
        if chunk.owner is None:
            whole = part.new_empty((chunk.rows * len(self.shard_rows), *shard.shape[1:]))
            return whole, collectives.all_gather(whole, part, self.group, async_op=True)
        if chunk.owner != dist.get_rank(self.group):
            part = shard.new_empty((chunk.rows, *shard.shape[1:]), dtype=dtype)
        return part, dist.broadcast(part, group=self.group, group_src=chunk.owner, async_op=True)

    def add_up(self, part: Tensor, chunk: _Chunk, total: Tensor) -> None:
        """Write the sum of all ranks' `part` into the owners' rows of `total`, rounded once."""
        if chunk.owner is None:
            mine = part.new_empty((chunk.rows, *part.shape[1:]))
            collectives.reduce_scatter(mine, part, self.group)
        else:
            mine = part
            dist.reduce(mine, group=self.group, group_dst=chunk.owner)
        if chunk.owner in (None, dist.get_rank(self.group)):
            total[chunk.first : chunk.first + chunk.rows] = mine

    def rows_of_targets(self, shards: Sequence[tuple[Tensor, torch.dtype]], targets: _Targets) -> list[Tensor]:
        """The targets' rows [N, …] of the whole tensors that `shards` are parts of: their owners round and send them.

        The host waits for the device here, once a forward: how many rows go to which rank depends on the targets.
        """
        order = targets.owner.argsort(stable=True)
        asks = segment_sum(torch.ones_like(order), targets.owner, len(self.shard_rows))
        gives = torch.empty_like(asks)
        dist.all_to_all_single(gives, asks, group=self.group)
        n_asks, n_gives = torch.stack([asks, gives]).tolist()

        rows = targets.row.new_empty(sum(n_gives))
        dist.all_to_all_single(rows, targets.row[order], n_gives, n_asks, group=self.group)
        answers = []
        for shard, dtype in shards:
            found = shard.new_empty((len(order), *shard.shape[1:]), dtype=dtype)
            dist.all_to_all_single(found, shard[rows].to(dtype).contiguous(), n_asks, n_gives, group=self.group)
            answers.append(torch.empty_like(found).index_copy_(0, order, found))
        return answers

    def target_logits(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: _Targets) -> Tensor:
        """[N] float64: each row with its own row of the head."""
        shards = [(weight, self.dtype)] + ([] if bias is None else [(bias, bias.dtype)])
        own, *more = self.rows_of_targets(shards, targets)
        own_bias = more[0] if more else None
        columns = torch.arange(len(x), device=x.device)
        if not len(x):
            return x.new_empty(0, dtype=torch.float64)
        return self.backend.target_logits(self.slice_call(x, own, own_bias, columns))

    def slice_call(self, x: Tensor, rows: Tensor, bias: Tensor | None, columns: Tensor) -> HeadCall:
        """The call of a chunk."""
        return HeadCall(x, rows, bias, columns, self.head, self.dtype, self.outputs, len(x), is_slice=True)

    def keeps(self, n_rows: int, device: torch.device) -> list[Keep]:
        """What is stashed of each chunk, in their order, as long as the budget lasts."""
        left, found = self.budget, []
        size = self.backend.stash_dtype(self.dtype, device).itemsize
        for chunk in self.plan:
            columns = chunk.rows * (len(self.shard_rows) if chunk.owner is None else 1)
            padded = -(-columns // STASH_MULTIPLE) * STASH_MULTIPLE
            fits = n_rows * padded * size <= left
            left -= n_rows * padded * size if fits else 0
            found.append(Keep.columns(padded) if fits and n_rows else Keep.nothing())
        return found


def _arrived(part: Tensor, work: Any) -> Tensor:
    work.wait()
    return part


class _ShardedLogps(torch.autograd.Function):
    """The walk of the module's docstring. The inputs up to `bias` are in the order of `Needs`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, scored: Tensor, call: _Call
    ) -> tuple[Tensor, ...]:
        targets = _Targets.of(scored, call.shard_rows)
        own, own_bias = weight.detach(), None if bias is None else bias.detach()
        z = call.target_logits(hidden, own, own_bias, targets)

        parts: list[SliceForward] = []
        keeps = call.keeps(len(hidden), hidden.device)
        for place, rows, row_bias in call.walk(own, own_bias):
            one = call.slice_call(hidden, rows, row_bias, targets.in_chunk(call.plan[place]))
            parts.append(call.backend.slice_forward(one, z, keeps[place]))
            del one, rows, row_bias
        merged = slices.merge(parts, z, sum(call.shard_rows), call.outputs, product_dtype(call.dtype))

        # k of the chunks and their stashes, then what all have in common
        ctx.save_for_backward(
            *(part.k for part in parts), *(part.kept for part in parts),
            hidden, weight, bias, scored, merged.logps, merged.lse, merged.entropy,
        )  # fmt: skip
        ctx.call, ctx.keeps = call, keeps
        extras = {name: getattr(merged, name) for name in call.outputs}
        ctx.mark_non_differentiable(*(value for name, value in extras.items() if name != "entropy"))
        ctx.set_materialize_grads(False)
        return merged.logps, *extras.values()

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, *grad_extras: Tensor | None) -> tuple[Tensor | None, ...]:
        slices.check_first_derivative()
        call: _Call = ctx.call
        count, saved_tensors = len(call.plan), ctx.saved_tensors
        ks, stashes = saved_tensors[:count], saved_tensors[count : 2 * count]
        hidden, weight, bias, scored, logps, lse, entropy = saved_tensors[2 * count :]
        needed = Needs(*ctx.needs_input_grad[:3])
        coefficient = torch.zeros_like(logps) if grad_logps is None else grad_logps
        grad_entropy = dict(zip(call.outputs, grad_extras, strict=True)).get("entropy")

        # rows without a coefficient take no part, though every rank walks all chunks
        busy, n_rows = busy_rows(coefficient, grad_entropy), len(hidden)
        x, scored, logps, lse, entropy, coefficient, grad_entropy = slices.taken(
            busy, hidden, scored, logps, lse, entropy, coefficient, grad_entropy
        )
        # the same condition on all ranks, or a collective would wait for ever
        targets, exact = _Targets.of(scored, call.shard_rows), product_dtype(call.dtype)
        if needed.hidden:
            x = x.to(exact)
        dx = torch.zeros_like(x) if needed.hidden else None
        dw = torch.empty_like(weight) if needed.weight else None
        db = torch.empty_like(bias) if needed.bias else None
        for place, rows, row_bias in call.walk(weight, bias):
            chunk = call.plan[place]
            one = call.slice_call(x, rows, row_bias, targets.in_chunk(chunk))
            # so that their gradients are float32, too: they are added to those of other ranks
            if dw is not None:
                one = replace(one, weight=rows.to(exact))
            if db is not None and row_bias is not None:
                one = replace(one, bias=row_bias.to(exact))
            state = slices.state_of(call.backend, lse, *slices.taken(busy, ks[place]))
            saved = Saved(logps, state, entropy, stashes[place], busy, ctx.keeps[place])
            found = slices.slice_backward(call.backend, one, saved, coefficient, grad_entropy, needed)

            # parameters' gradients are summed over ranks; dX is this rank's own
            if dx is not None and found.hidden is not None:
                dx += found.hidden
            if dw is not None and found.weight is not None:
                call.add_up(found.weight, chunk, dw)
            if db is not None and found.bias is not None:
                call.add_up(found.bias, chunk, db)
            del one, rows, row_bias, found
        return None if dx is None else slices.spread(dx.to(hidden.dtype), busy, n_rows), dw, db, None, None
