"""The head of a model that FSDP2 or tensor parallelism has sharded: its log-probs without gathering it.

They are computed by `sdpo_kernels/sharded.py` and `sdpo_kernels/vocab_parallel.py`.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from sdpo_kernels.integrations.lm_head import LMHead
from sdpo_kernels.logps import LinearLogps
from sdpo_kernels.sharded import sharded_linear_logps
from sdpo_kernels.vocab_parallel import vocab_parallel_linear_logps


def sharded_head_logps(head: LMHead, hidden: Tensor, targets: Tensor, **options: Any) -> LinearLogps:
    """`sharded_linear_logps` of a model's head that is sharded (`head.is_cut`), with gradients averaged as FSDP does.

    Raises:
        ValueError: the head is not sharded by rows over a one-dimensional device mesh.
    """
    weight, bias = head.weight(), head.bias()
    group, shard_rows = _division(weight)
    count = len(shard_rows)
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


def tensor_parallel_head_logps(head: LMHead, hidden: Tensor, targets: Tensor, **options: Any) -> LinearLogps:
    """`vocab_parallel_linear_logps` of the head of a tensor-parallel model, whose ranks all have the same rows.

    Raises:
        ValueError: the head is not sharded by rows.
    """
    weight: Any = head.weight()
    bias: Any = head.bias()
    group, slice_rows = _division(weight)
    return vocab_parallel_linear_logps(
        hidden,
        weight.to_local(),
        targets,
        bias_slice=None if bias is None else bias.to_local(),
        group=group,
        slice_rows=slice_rows,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        **options,
    )


def _division(weight: Tensor) -> tuple[dist.ProcessGroup, list[int]]:
    """The group over which a weight is sharded by rows, and how many rows each of its ranks has."""
    assert isinstance(weight, DTensor)
    if tuple(weight.placements) != (Shard(0),):
        raise ValueError(f"model: its head was placed as {weight.placements}, must be sharded by rows, (Shard(dim=0),)")

    group = weight.device_mesh.get_group()
    count = dist.get_world_size(group)
    each = -(-weight.shape[0] // count)  # DTensor shards as torch.chunk does
    return group, [max(0, min(each, weight.shape[0] - rank * each)) for rank in range(count)]


def _averaged(weight: Any, count: int) -> Tensor:
    """This rank's rows; a hook divides their gradient by `count`."""
    local = weight.to_local()
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient / count)
    return local
