"""Weights that FSDP2 has cut into shards: the part of this rank, and the whole weight a piece at a time.

    model = fully_shard(model)
    is_cut(model), own(weight)                    # each rank holds only its rows of every weight
    for piece in pieces(weight): ...              # on every rank, in the order of the rows; never the whole weight
    reshard(model)                                # after forwards without a backward, before weights are changed

FSDP2 cuts a weight along its first dimension as `torch.chunk` does, so the last ranks may hold fewer rows, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import linear

from sdpo_kernels.integrations.lm_head import THROUGH_ROOT, LMHead, find_head

PIECE = 1 << 22  # elements that are sent, read or written at a time


def is_cut(model: nn.Module) -> bool:
    """Whether FSDP2 has cut the model, so that each rank holds only shards of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def own(weight: Tensor) -> Tensor:
    """The part of a weight that this rank holds."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that a forward has left behind.

    FSDP2 keeps some groups gathered until a backward. They would be stale once their shards change, and their modules
    have whole weights in place of shards until then.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_rows(weight: DTensor) -> list[tuple[int, int]]:
    """First row and last + 1 of each rank's shard.

    Raises:
        ValueError: it is not cut by rows over a one-dimensional device mesh.
    """
    if tuple(weight.placements) != (Shard(0),):
        raise ValueError(f"weight: was placed as {weight.placements}, must be cut by rows, (Shard(dim=0),)")
    rows, count = weight.shape[0], weight.device_mesh.size()
    each = -(-rows // count)
    return [(min(rank * each, rows), min((rank + 1) * each, rows)) for rank in range(count)]


def pieces(weight: Tensor, elements: int = PIECE) -> Iterator[Tensor]:
    """The whole weight in pieces [k, …] of at most `elements` elements (at least one row), in order, on its device.

    Collective for a cut weight: its owner broadcasts each piece, so every rank has to take all pieces of the same
    weights. A weight that is not cut is yielded from where it is.
    """
    weight = weight.detach()
    width = max(1, weight[:1].numel()) if weight.dim() else 1
    step = max(1, elements // width)
    if not isinstance(weight, DTensor):
        yield from weight.split(step) if weight.dim() else [weight]
        return

    group, local = weight.device_mesh.get_group(), own(weight)
    rank = dist.get_rank(group)
    for owner, (first, stop) in enumerate(shard_rows(weight)):
        for begin in range(first, stop, step):
            count = min(step, stop - begin)
            if owner == rank:
                piece = local[begin - first : begin - first + count].contiguous()
            else:
                piece = local.new_empty((count, *weight.shape[1:]))
            dist.broadcast(piece, group=group, group_src=owner)
            yield piece


def call_body_through(root: nn.Module) -> None:
    """Let `LMHead.hidden` call the body within a forward of `root`, the outermost module that FSDP2 has cut.

    Only there are the weights gathered that belong to no group of their own, such as a table of positions.
    """
    body: Any = find_head(root).body
    name = "_sdpo_body"
    setattr(root, name, MethodType(lambda _self, **inputs: body(**inputs), root))
    register_fsdp_forward_method(root, name)
    setattr(body, THROUGH_ROOT, getattr(root, name))


class _InPieces(nn.Module):
    """A cut linear layer that computes all its outputs from one piece of its weight after another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.cut = (module,)  # in a tuple, so that it is not registered a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], in hidden's dtype. Collective."""
        module: Any = self.cut[0]
        parts = [linear(hidden, piece.to(hidden.dtype)) for piece in pieces(module.weight)]
        out = torch.cat(parts, -1)
        if module.bias is not None:
            out = out + torch.cat(list(pieces(module.bias))).to(out.dtype)
        return out


@contextmanager
def head_in_pieces(base: nn.Module, head: LMHead) -> Iterator[nn.Module]:
    """Within the block the model's own forward computes its logits without gathering a cut head; yields what does it.

    A head that is not cut, or has an adapter, stays as it is.
    """
    if not head.is_cut or not isinstance(head.module, nn.Linear) or not isinstance(head.module, FSDPModule):
        yield head.module
        return

    name = next(name for name, module in base.named_modules() if module is head.module)
    parent, _, leaf = name.rpartition(".")
    holder = base.get_submodule(parent)
    stand_in = _InPieces(head.module)
    setattr(holder, leaf, stand_in)
    try:
        yield stand_in
    finally:
        setattr(holder, leaf, head.module)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The weights of `module`'s own group are whole within the block, if FSDP2 has cut it. Collective."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
