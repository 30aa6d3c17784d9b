"""Log-probs of a head whose rows are sharded over the ranks, one chunk of the vocabulary gathered at a time.

    out = sharded_linear_logps(hidden, weight_shard, targets, group=group)        # every rank of the group calls it
    out.logps                                                                     # of this rank's rows

Each rank has its own rows of the batch and its own rows of the head, sharded as FSDP2 shards a parameter
(`DTensor.to_local()` along its first dimension). No rank ever holds more of the head than its shard and one chunk.
Plain torch, with the arithmetic of the eager backend (docs/architecture.md).

Forward, for each chunk of the vocabulary, in the same order on all ranks:
    1. the chunk's owner broadcasts its rows of the head
    2. every rank computes the logits of its own batch rows and adds them to its running sums

Backward, for the same chunks:
    1. broadcast the rows again and recompute the logits, then dL/dz
    2. every rank adds to its own dX
    3. dW and db of the chunk are summed over the ranks at the chunk's owner
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from sdpo_kernels.backends import precision
from sdpo_kernels.backends.base import EXTRAS, Keep, Needs, Saved
from sdpo_kernels.backends.chunk_math import RunningSums, dlogits
from sdpo_kernels.head import Head, product_dtype
from sdpo_kernels.integrations.lm_head import LMHead
from sdpo_kernels.logps import LinearLogps, check_outputs
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, check_targets


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
        outputs, rows: as in `linear_logps`.
        chunk_columns: rows of the head that are broadcast at a time, at least 1.

    The gradients of `weight_shard` and `bias_shard` are summed over the rows of all ranks: divide them by the number of
    ranks if gradients of other parameters are averaged, as FSDP does. An error on one rank leaves the others waiting.

    Raises:
        ValueError: naming the argument, what it was and what it should be.
    """
    _check(hidden, weight_shard, targets, bias_shard, outputs, chunk_columns)
    if shard_rows is None:
        shard_rows = _gather_shard_rows(weight_shard, group)
    _check_rows(shard_rows, weight_shard, group)

    # only scored rows take part, but every rank walks all chunks, even without any
    n_columns = sum(shard_rows)
    index = (targets != IGNORE_INDEX).nonzero().squeeze(1) if rows is None else rows.index
    scored = targets[index]
    check_targets(scored, n_columns)

    names = tuple(name for name in EXTRAS if name in outputs)
    head, plan = Head(logit_scale, softcap, temperature), _plan(shard_rows, chunk_columns)
    call = _Call(head, _dtype(hidden), group, plan, n_columns, names)
    found = _ShardedLogps.apply(hidden[index], weight_shard, bias_shard, scored, call)
    logps, *extras = (value.new_zeros(len(targets)).index_copy(0, index, value) for value in found)
    return LinearLogps(logps, **dict(zip(names, extras, strict=True)))


def sharded_head_logps(head: LMHead, hidden: Tensor, targets: Tensor, **options: Any) -> LinearLogps:
    """The same for a model's head that FSDP2 has sharded (`head.is_cut`), with gradients averaged as FSDP does.

    Raises:
        ValueError: the head is not sharded by rows over a one-dimensional device mesh.
    """
    weight, bias = head.weight(), head.bias()
    assert isinstance(weight, DTensor)
    if tuple(weight.placements) != (Shard(0),):
        raise ValueError(f"model: its head was placed as {weight.placements}, must be sharded by rows, (Shard(dim=0),)")

    group = weight.device_mesh.get_group()
    count = dist.get_world_size(group)
    each = -(-weight.shape[0] // count)  # DTensor shards as torch.chunk does
    shard_rows = [max(0, min(each, weight.shape[0] - rank * each)) for rank in range(count)]

    return sharded_linear_logps(
        hidden,
        _averaged(weight, count),
        targets,
        bias_shard=None if bias is None else _averaged(bias, count).to(hidden.dtype),  # as FSDP2 gathers it
        group=group,
        shard_rows=shard_rows,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        **options,
    )


def _averaged(weight: Any, count: int) -> Tensor:
    """This rank's rows; a hook divides their gradient by `count`."""
    local = weight.to_local()
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient / count)
    return local


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


def _check_rows(shard_rows: Sequence[int], weight: Tensor, group: dist.ProcessGroup | None) -> None:
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(shard_rows) != count or shard_rows[rank] != weight.shape[0]:
        raise ValueError(
            f"shard_rows: was {list(shard_rows)}, must be a number of rows for each of {count} ranks, "
            f"{weight.shape[0]} for this one ({rank})"
        )


def _dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that operands are rounded to."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


class _Chunk(NamedTuple):
    owner: int  # its rank in the group
    first: int  # the chunk's first row in the owner's shard
    start: int  # its first and last + 1 column in the whole vocabulary
    stop: int


class _Call(NamedTuple):
    head: Head
    dtype: torch.dtype
    group: dist.ProcessGroup | None
    plan: list[_Chunk]
    n_columns: int
    outputs: tuple[str, ...]

    def walk(self, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[_Chunk, Tensor, Tensor | None]]:
        """Each chunk with its rows of the head [C, H], cast for the products, and its part of the bias [C]."""
        for chunk in self.plan:
            rows = self._broadcast(weight, chunk, self.dtype)
            yield chunk, _operand(rows), None if bias is None else self._broadcast(bias, chunk, bias.dtype)

    def _broadcast(self, shard: Tensor, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
        """The chunk's rows of its owner's shard, on every rank."""
        count = chunk.stop - chunk.start
        if chunk.owner == dist.get_rank(self.group):
            part = shard[chunk.first : chunk.first + count].to(dtype).contiguous()
        else:
            part = shard.new_empty((count, *shard.shape[1:]), dtype=dtype)
        dist.broadcast(part, group=self.group, group_src=chunk.owner)
        return part

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The transformed logits [N, C] of a chunk."""
        z = precision.matmul(x, weight.t())
        if bias is not None:
            z += bias.to(z.dtype)
        return self.head.logits_(z)

    def add_up(self, part: Tensor, total: Tensor, chunk: _Chunk) -> None:
        """Write the sum of all ranks' `part` into the owner's rows of `total`, rounded once."""
        dist.reduce(part, group=self.group, group_dst=chunk.owner)
        if chunk.owner == dist.get_rank(self.group):
            total[chunk.first : chunk.first + len(part)] = part


def _gather_shard_rows(shard: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    own = torch.tensor([shard.shape[0]], device=shard.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return [int(count) for count in counts]


def _plan(shard_rows: Sequence[int], chunk_columns: int) -> list[_Chunk]:
    """The chunks of all shards in order, the same on every rank."""
    plan, before = [], 0
    for owner, count in enumerate(shard_rows):
        for first in range(0, count, chunk_columns):
            plan.append(_Chunk(owner, first, before + first, before + min(first + chunk_columns, count)))
        before += count
    return plan


def _operand(tensor: Tensor) -> Tensor:
    """Cast for the products: tensor cores sum bf16 products in float32; elsewhere they have to be upcast."""
    keeps = tensor.is_cuda and tensor.dtype == torch.bfloat16
    return tensor if keeps else tensor.to(product_dtype(tensor.dtype))


class _ShardedLogps(torch.autograd.Function):
    """The walk of the module's docstring. The inputs up to `bias` are in the order of `Needs`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: _Call
    ) -> tuple[Tensor, ...]:
        x = _operand(hidden.detach().to(call.dtype))
        sums = RunningSums(len(x), x.device, product_dtype(call.dtype), call.outputs)
        with precision.full(hidden.device):
            for chunk, rows, row_bias in call.walk(weight.detach(), None if bias is None else bias.detach()):
                sums.add(call.logits(x, rows, row_bias), targets - chunk.start)
        found = sums.finish(call.n_columns, None)

        # no logits are saved: the backward recomputes them chunk by chunk
        ctx.save_for_backward(hidden, weight, bias, targets, found.logps, found.state, found.entropy)
        ctx.call = call
        extras = {name: getattr(found, name) for name in call.outputs}
        ctx.mark_non_differentiable(*(value for name, value in extras.items() if name != "entropy"))
        ctx.set_materialize_grads(False)
        return found.logps, *extras.values()

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, *grad_extras: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logps, state, entropy = ctx.saved_tensors
        call: _Call = ctx.call
        needed = Needs(*ctx.needs_input_grad[:3])
        saved = Saved(logps, state, entropy, None, None, Keep.nothing())
        coefficient = torch.zeros_like(logps) if grad_logps is None else grad_logps.to(logps.dtype)
        grad_entropy = dict(zip(call.outputs, grad_extras, strict=True)).get("entropy")

        # the same condition on all ranks, or a collective would wait for ever
        x = _operand(hidden.to(call.dtype))
        dx = torch.zeros_like(x, dtype=logps.dtype) if needed.hidden else None
        dw = torch.empty_like(weight) if needed.weight else None
        db = torch.empty_like(bias) if needed.bias else None
        with precision.full(hidden.device):
            for chunk, rows, row_bias in call.walk(weight, bias):
                z = call.logits(x, rows, row_bias)
                grad = dlogits(z, targets - chunk.start, saved, coefficient, grad_entropy)
                call.head.times_slope_(grad, z)

                # parameters' gradients are summed over ranks; dX is this rank's own
                if db is not None:
                    call.add_up(grad.sum(0), db, chunk)
                grad = grad.to(rows.dtype)
                if dx is not None:
                    dx += precision.matmul(grad, rows)
                if dw is not None:
                    call.add_up(precision.matmul(grad.t(), x), dw, chunk)
        return (None if dx is None else dx.to(hidden.dtype)), dw, db, None, None
