"""Log-probs before a head whose rows are spread over processes, one chunk of the vocabulary gathered at a time.

    logps = sharded_linear_logps(hidden, weight_shard, targets, group=group)      # every process of the group calls it

Each process holds its own rows of the batch and its own rows of the head, as FSDP2 cuts a parameter
(`DTensor.to_local()` along its first dimension). Chunk by chunk the owner sends its rows to all; no process ever holds
more of the head than its shard and one chunk. The backward walks the same way and sums each gradient at its owner.
Plain torch, with the arithmetic of the eager backend (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_kernels.backends import precision
from sdpo_kernels.backends.base import KEEP_NOTHING, Saved
from sdpo_kernels.backends.chunk_math import RunningSums, dlogits
from sdpo_kernels.head import Head, product_dtype
from sdpo_kernels.rows import IGNORE_INDEX


def sharded_linear_logps(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_columns: int = 8192,
) -> Tensor:
    """Log-prob of each row's target, [N] float32 (float64 for float64); 0 for rows whose target is −100.

    Args:
        hidden: [N, H] this process's rows; N may differ between processes, and be 0.
        weight_shard: [V_r, H] this process's rows of the head, in the order of the group's ranks; of hidden's dtype.
        targets: [N] int64 in [0, V), V = Σ V_r, or −100.
        group: the processes; None: all. Each calls this with the same options, and each or none wants each gradient.
        chunk_columns: rows of the head that are sent at a time, at least 1.

    The gradient of `weight_shard` is that of all processes' rows, summed: divide it by their number where gradients of
    other parameters are averaged, as FSDP does. An error in one process leaves the others waiting.

    Raises:
        ValueError: naming the argument, what it was and what it should be.
    """
    if hidden.dim() != 2 or weight_shard.dim() != 2 or hidden.shape[1] != weight_shard.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight_shard.shape)}"
        raise ValueError(f"hidden, weight_shard: were of shapes {shapes}, must be [N, H] and [V_r, H]")
    if hidden.dtype != weight_shard.dtype:
        raise ValueError(f"weight_shard: was {weight_shard.dtype}, must be {hidden.dtype} as hidden is")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: was {targets.dtype} of shape {list(targets.shape)}, must be int64 [N]")
    if chunk_columns < 1:
        raise ValueError(f"chunk_columns: was {chunk_columns}, must be at least 1")
    plan = _plan(weight_shard, group, chunk_columns)
    n_columns = plan[-1].stop if plan else 0
    wrong = targets[((targets < 0) & (targets != IGNORE_INDEX)) | (targets >= n_columns)]
    if wrong.numel():
        raise ValueError(f"targets: held {wrong[0].item()}, must be in [0, {n_columns}) or {IGNORE_INDEX} (not scored)")
    index = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    head = Head(logit_scale, softcap, temperature)
    scored = _ShardedLogps.apply(hidden[index], weight_shard, targets[index], head, group, plan)
    return scored.new_zeros(len(targets)).index_copy(0, index, scored)


class _Chunk(NamedTuple):
    owner: int  # its rank in the group
    first: int  # of the owner's rows
    start: int  # of the whole vocabulary's
    stop: int


def _plan(shard: Tensor, group: dist.ProcessGroup | None, chunk_columns: int) -> list[_Chunk]:
    """The chunks of all shards in order, the same in every process."""
    own = torch.tensor([shard.shape[0]], device=shard.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    plan, before = [], 0
    for owner, count in enumerate(int(count) for count in counts):
        for first in range(0, count, chunk_columns):
            plan.append(_Chunk(owner, first, before + first, before + min(first + chunk_columns, count)))
        before += count
    return plan


def _walk(shard: Tensor, group: dist.ProcessGroup | None, plan: list[_Chunk]) -> Iterator[tuple[_Chunk, Tensor]]:
    """Each chunk with its rows of the head [C, H], as products want them."""
    rank = dist.get_rank(group)
    for chunk in plan:
        rows = chunk.stop - chunk.start
        if chunk.owner == rank:
            weight = shard[chunk.first : chunk.first + rows].contiguous()
        else:
            weight = shard.new_empty((rows, shard.shape[1]))
        dist.broadcast(weight, group=group, group_src=chunk.owner)
        yield chunk, _operand(weight)


def _operand(tensor: Tensor) -> Tensor:
    """Tensor cores sum bf16 products in float32; elsewhere they have to be upcast."""
    keeps = tensor.is_cuda and tensor.dtype == torch.bfloat16
    return tensor if keeps else tensor.to(product_dtype(tensor.dtype))


class _ShardedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, shard: Tensor, targets: Tensor, head: Head, group: Any, plan: list[_Chunk]
    ) -> Tensor:
        x = _operand(hidden.detach())
        sums = RunningSums(len(x), x.device, product_dtype(hidden.dtype), ())
        with precision.full(hidden.device):
            for chunk, weight in _walk(shard.detach(), group, plan):
                sums.add(head.logits_(precision.matmul(x, weight.t())), targets - chunk.start)
        found = sums.finish(plan[-1].stop, None)
        ctx.save_for_backward(hidden, shard, targets, found.logps, found.state)
        ctx.head, ctx.group, ctx.plan = head, group, plan
        return found.logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, shard, targets, logps, state = ctx.saved_tensors
        saved = Saved(logps, state, None, None, None, KEEP_NOTHING)
        x, rank = _operand(hidden), dist.get_rank(ctx.group)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dx = torch.zeros_like(x, dtype=product_dtype(hidden.dtype)) if wants_hidden else None
        dw = torch.empty_like(shard) if wants_weight else None
        with precision.full(hidden.device):
            for chunk, weight in _walk(shard, ctx.group, ctx.plan):
                z = ctx.head.logits_(precision.matmul(x, weight.t()))
                grad = dlogits(z, targets - chunk.start, saved, grad_logps.to(logps.dtype), None)
                grad = ctx.head.times_slope_(grad, z).to(weight.dtype)
                if dx is not None:
                    dx += precision.matmul(grad, weight)
                if dw is not None:
                    part = precision.matmul(grad.t(), x)
                    dist.reduce(part, group=ctx.group, group_dst=chunk.owner)  # summed before it is rounded
                    if chunk.owner == rank:
                        dw[chunk.first : chunk.first + len(part)] = part
        return (None if dx is None else dx.to(hidden.dtype)), dw, None, None, None, None
