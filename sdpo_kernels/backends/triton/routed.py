"""A backward with `grad_tol`: products of what the rows keep, in the walk's chunks of the vocabulary.

    1. rows in the order of how many tiles they keep, most first: neighbours then keep about the same
    2. of each tile of a chunk the rows that keep it; of each block of rows the tiles that any of them keeps
    3. S of the listed rows, from the stash or recomputed: a product of gathered rows of X
    4. dW of a tile: a product of its listed rows, one program for BH columns of H
    5. S·W of a block of rows, over the tiles that it lists
    6. dX = r ⊙ (S·W) + the targets' terms, as in an exact backward

Shapes alone decide what is launched and how much memory it takes: nothing waits for the device, and a CUDA graph can
hold it. Lists have room for the worst case, and what is not listed is neither read nor written. There are no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sdpo_kernels.backends import precision
from sdpo_kernels.backends.base import Gradients, HeadCall, Needs, Saved
from sdpo_kernels.backends.grad_tol import TILE
from sdpo_kernels.backends.triton import routed_kernels as kernels
from sdpo_kernels.backends.triton.backend import chunk_columns, chunks, stashed_columns
from sdpo_kernels.backends.triton.gradients import Factors, factors_of, finish
from sdpo_kernels.backends.triton.launch import COMPILED, Rows, head_numbers
from sdpo_kernels.backends.triton.targets import SortedRows

SPANS = 2  # parts of a chunk, each with its own sum: a block that keeps much is the work of several programs
PARTS = 8  # programs that share the listed rows of a tile when S is recomputed
LISTED_AT_ONCE = 1024  # rows that lists_kernel looks at together


class Shape(NamedTuple):
    """Sizes of the three products: rows, columns or depth of a tile, warps and stages."""

    rows: int  # of kept_logits_kernel and hidden_kernel
    depth: int  # of kept_logits_kernel along H, of weight_kernel along the listed rows
    width: int  # of H, in weight_kernel and hidden_kernel
    warps: int
    stages: int
    targets: int = 32  # rows whose targets' terms are added at once


BF16, FLOAT32, INTERPRETED = Shape(128, 64, 128, 8, 5), Shape(64, 32, 64, 8, 2), Shape(16, 16, 32, 1, 1, 16)


def shape_of(x: Tensor) -> Shape:
    """By the operands' dtype; on the CPU the interpreter's."""
    if not x.is_cuda:
        return INTERPRETED
    return BF16 if x.dtype == torch.bfloat16 else FLOAT32


@dataclass
class Kept:
    """Which tiles the rows keep."""

    words: Tensor  # [words, N] int64, a bit for every tile and row; rows in the order of `order`
    order: Tensor  # [N] int64
    shape: Shape

    @classmethod
    def of(cls, saved: Saved, rows: Rows, shape: Shape) -> Kept:
        """Sort the rows."""
        assert saved.tiles is not None
        n_rows = rows.x.shape[0]
        words = saved.tiles[:n_rows] if saved.rows is None else saved.tiles.index_select(0, saved.rows)
        counts = torch.empty(n_rows, dtype=torch.int32, device=words.device)
        block = triton.next_power_of_2(words.shape[1])
        at_once = max(1, 4096 // block)
        kernels.counts_kernel[(triton.cdiv(n_rows, at_once),)](
            words, counts, n_rows, words.shape[1], ROWS=at_once, WORDS=block, **COMPILED
        )
        order = counts.sort(descending=True, stable=True).indices
        return cls(words.index_select(0, order).t().contiguous(), order, shape)

    def lists(self, first_tile: int, n_tiles: int) -> tuple[Tensor, Tensor]:
        """The rows of each tile of a chunk [tiles, N] int32, and how many they are [tiles]."""
        n_rows = len(self.order)
        rows = self.order.new_empty((n_tiles, n_rows), dtype=torch.int32)
        counts = rows.new_empty(n_tiles)
        kernels.lists_kernel[(n_tiles,)](
            self.words, self.order, rows, counts, n_rows, first_tile, BLOCK=LISTED_AT_ONCE, **COMPILED
        )
        return rows, counts

    def unions(self, first_tile: int, n_tiles: int) -> tuple[Tensor, Tensor]:
        """The tiles that each block of rows keeps in a chunk [blocks, SPANS, span] int32, and how many."""
        blocks, span = triton.cdiv(len(self.order), self.shape.rows), triton.cdiv(n_tiles, SPANS)
        tiles = self.order.new_empty((blocks, SPANS, span), dtype=torch.int32)
        counts = tiles.new_empty((blocks, SPANS))
        kernels.unions_kernel[(blocks, SPANS)](
            self.words, tiles, counts, len(self.order), first_tile, n_tiles, span,
            BM=self.shape.rows, SPANS=SPANS, **COMPILED,
        )  # fmt: skip
        return tiles, counts


class Chunk(NamedTuple):
    """S of some columns: row i of their tile t begins at t·tile_step + i·row_step."""

    s: Tensor
    tile_step: int
    row_step: int
    start: int
    weight: Tensor  # [C, H], the columns' rows of it in the call's dtype
    lists: tuple[Tensor, Tensor]


def backward(call: HeadCall, saved: Saved, grad_logps: Tensor, needs: Needs) -> Gradients:
    """See `base.Backend.backward`; what `saved.tiles` leaves out of dL/dz counts as 0."""
    with precision.full(call.hidden.device):
        rows = Rows.of(call, forward=False)
        trained_x = rows.x[:, needs.from_column :]
        by = factors_of(call, saved, grad_logps, trained_x if needs.weight else None)
        if rows.x.shape[0] == 0:
            return _of_no_rows(call, needs)
        return _backward(rows, saved, by, trained_x, needs)


def _of_no_rows(call: HeadCall, needs: Needs) -> Gradients:
    """Zeros."""
    dw = call.weight.new_zeros((call.weight.shape[0], call.weight.shape[1] - needs.from_column))
    db = None if call.bias is None or not needs.bias else torch.zeros_like(call.bias)
    return Gradients(torch.zeros_like(call.hidden) if needs.hidden else None, dw if needs.weight else None, db)


def _backward(rows: Rows, saved: Saved, by: Factors, trained_x: Tensor, needs: Needs) -> Gradients:
    call, shape = rows.call, shape_of(rows.x)
    n_columns = call.weight.shape[0]
    kept = Kept.of(saved, rows, shape)
    products = by.r.new_zeros((SPANS, *rows.x.shape)) if needs.hidden else None
    dw = call.weight.new_empty((n_columns, trained_x.shape[1])) if needs.weight else None
    db = by.r.new_empty(n_columns) if needs.bias else None
    by_target = SortedRows.of(rows.targets, n_columns, by.t) if needs.weight or needs.bias else None

    stashed, step = min(saved.keep.n_columns, n_columns), chunk_columns(call, TILE)
    for start, stop in chunks(call, stashed, step, step):
        chunk = _chunk(rows, saved, by, kept, start, stop, stop <= stashed)
        if by_target is not None:
            _weight(chunk, rows, by, trained_x, by_target, dw, db, shape)
        if products is not None:
            _hidden(chunk, rows, kept, products)
        del chunk  # before there is memory for the next one

    dx = None
    if products is not None:
        total = products[0].add_(products[1])  # [N, H] may be large; `+=` would copy it onto itself, too
        dx = finish(call, total, by, out=rows.x.new_empty(rows.x.shape, dtype=call.hidden.dtype))
    if db is not None:
        assert by_target is not None
        by_target.add_to(db.unsqueeze(1), torch.ones_like(by.t).unsqueeze(1), 0)
    return Gradients(dx, dw, None if db is None or call.bias is None else db.to(call.bias.dtype))


def _chunk(rows: Rows, saved: Saved, by: Factors, kept: Kept, start: int, stop: int, is_stashed: bool) -> Chunk:
    """The lists of a chunk, and S: in the stash, or recomputed for the listed rows with the same k."""
    call, shape, n_rows = rows.call, kept.shape, rows.x.shape[0]
    n_tiles = triton.cdiv(stop - start, TILE)
    lists = kept.lists(start // TILE, n_tiles)
    weight = rows.weight[start:stop].to(call.dtype)
    if is_stashed:
        s = stashed_columns(saved, start, start + n_tiles * TILE)  # whole tiles: past V the stash is 0
        return Chunk(s, TILE, s.stride(0), start, weight, lists)

    before, factor, capped = head_numbers(call)
    s = rows.x.new_empty((n_tiles, n_rows, TILE))
    bias = None if rows.bias is None else rows.bias[start:stop]
    kernels.kept_logits_kernel[(n_tiles * PARTS,)](
        rows.x, weight, bias, rows.targets, by.k, *lists, s,
        n_rows, stop - start, rows.x.shape[1], rows.x.stride(0), weight.stride(0), start, before, factor,
        BM=shape.rows, BK=shape.depth, PARTS=PARTS, CAPPED=capped, HAS_BIAS=bias is not None,
        UPCAST=not rows.x.is_cuda, num_warps=shape.warps, num_stages=shape.stages, **COMPILED,
    )  # fmt: skip
    return Chunk(s, n_rows * TILE, TILE, start, weight, lists)


def _weight(
    chunk: Chunk, rows: Rows, by: Factors, x: Tensor, by_target: SortedRows, dw: Tensor | None, db: Tensor | None,
    shape: Shape,
) -> None:  # fmt: skip
    """The chunk's rows of dW and db; the targets' terms of db are missing."""
    n_columns, width = chunk.weight.shape[0], x.shape[1]
    across = 1 if dw is None else triton.cdiv(width, shape.width)
    kernels.weight_kernel[(len(chunk.lists[1]) * across,)](
        chunk.s, by.scaled_x, x, by.r, *chunk.lists, by_target.order, by_target.first, by.t, rows.targets,
        None if dw is None else dw[chunk.start :], None if db is None else db[chunk.start :],
        rows.x.shape[0], n_columns, width, x.stride(0), width, chunk.start, chunk.tile_step, chunk.row_step,
        BK=shape.depth, BT=shape.targets, BH=shape.width, PIECES=3 if x.dtype == torch.bfloat16 else 1,
        HAS_DW=dw is not None, HAS_DB=db is not None, UPCAST=not x.is_cuda, num_warps=shape.warps,
        num_stages=shape.stages, **COMPILED,
    )  # fmt: skip


def _hidden(chunk: Chunk, rows: Rows, kept: Kept, products: Tensor) -> None:
    """Add the chunk's S·W to `products` [SPANS, N, H]."""
    shape, width = kept.shape, rows.x.shape[1]
    n_tiles = len(chunk.lists[1])
    tiles, counts = kept.unions(chunk.start // TILE, n_tiles)
    kernels.hidden_kernel[(counts.numel() * triton.cdiv(width, shape.width),)](
        chunk.s, chunk.weight, kept.words, kept.order, tiles, counts, products,
        rows.x.shape[0], chunk.weight.shape[0], width, chunk.weight.stride(0), chunk.start // TILE, tiles.shape[2],
        chunk.tile_step, chunk.row_step,
        BM=shape.rows, BN=shape.width, SPANS=SPANS, UPCAST=not rows.x.is_cuda, num_warps=shape.warps,
        num_stages=shape.stages, **COMPILED,
    )  # fmt: skip
