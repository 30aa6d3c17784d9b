"""torch's collectives on single tensors (torch 2.13 renamed them and warns of the old names), and their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor


def check_sizes(name: str, sizes: Sequence[int], own: int, group: dist.ProcessGroup | None) -> None:
    """ValueError, which names the argument, unless `sizes` has the rows of each rank, and `own` for this one."""
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(sizes) != count or sizes[rank] != own:
        must = f"a number of rows for each of {count} ranks, {own} for this one ({rank})"
        raise ValueError(f"{name}: was {list(sizes)}, must be {must}")


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup | None, async_op: bool = False) -> Any:
    """Fill `whole` [R·n, …] with the `part` [n, …] of each rank, in their order; with `async_op` returns the work."""
    function: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(whole, part, group=group, async_op=async_op)


def reduce_scatter(mine: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill `mine` [n, …] with this rank's part of the sum of all ranks' `whole` [R·n, …]."""
    function: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(mine, whole, group=group)
