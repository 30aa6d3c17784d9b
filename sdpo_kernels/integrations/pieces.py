"""The pieces of a packed row, read from its position ids: sequences, and branches that continue a part of one.

pieces(torch.tensor([[0, 1, 2, 3, 2, 3, 0, 1]]))   # a sequence of 4, a branch off its first 2, a sequence of 2

A run of positions that goes on where the one before it ends is one piece with it. For the only branch of a sequence
that is right: it continues all of it. A second branch must not begin where the first one ends.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor


class Piece(NamedTuple):
    """A run of rising positions in a packed row."""

    length: int
    shared: int  # a branch continues the first `shared` positions of the last sequence before it; 0: a sequence


def pieces(position_ids: Tensor) -> list[Piece]:
    """Sequences and branches of a packed row, whose position_ids are [1, N] (or [B, N], without restarts).

    Raises:
        ValueError: another shape, or a branch at a position that its sequence does not reach.
    """
    if position_ids.dim() != 2:
        raise ValueError(f"position_ids: was of shape {list(position_ids.shape)}, must be [1, N]")
    starts = (position_ids.diff(dim=1) != 1).any(0).nonzero().squeeze(1) + 1
    first = position_ids[0].index_select(0, starts).tolist()
    edges = [0, *starts.tolist(), position_ids.shape[1]]

    # whatever position a row begins at, its first piece is a sequence
    found, trunk = [], 0
    for (begin, end), shared in zip(itertools.pairwise(edges), [0, *first], strict=True):
        if not shared:
            trunk = end - begin
        elif shared > trunk:
            raise ValueError(
                f"position_ids: was {shared} at row {begin}, after a sequence of {trunk} positions; a piece must begin "
                f"at 0, or at most at {trunk}"
            )
        found.append(Piece(end - begin, shared))
    return found
