"""Which tiles of 64 columns a backward with `grad_tol` takes: the rule of `grad_tol.py`, on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo_kernels.backends import grad_tol
from sdpo_kernels.backends.base import Keep
from sdpo_kernels.backends.triton.kernels import SHIFT
from sdpo_kernels.backends.triton.launch import COMPILED, Finished, Rows, Sums

ELEMENTS = 8192  # probabilities that a program holds in registers
WARPS = 8
BINS = tl.constexpr(1024)  # quarters of an octave of float32
BIN_SHIFT = tl.constexpr(21)
MOST_LISTED = tl.constexpr(grad_tol.MOST_LISTED)


def choose(rows: Rows, sums: Sums, found: Finished, keep: Keep) -> Tensor:
    """[kept_rows, words] int64 for the call's own rows, not the reference's; rows out of range take all tiles."""
    call = rows.call
    n_tiles, words = triton.cdiv(call.weight.shape[0], grad_tol.TILE), grad_tol.words_of(call.weight.shape[0])
    n_rows = call.hidden.shape[0]
    out = rows.x.new_empty((call.kept_rows, words), dtype=torch.int64)
    out[n_rows:].zero_()
    if n_rows == 0:
        return out

    assert sums.by_tile is not None
    block = grad_tol.WORD * triton.next_power_of_2(words)
    at_once = max(1, ELEMENTS // block)
    choose_kernel[(triton.cdiv(n_rows, at_once),)](
        sums.by_tile, found.state, rows.targets, found.redo, out, n_rows, rows.x.shape[0], n_tiles, words,
        sums.by_tile.shape[0], keep.grad_tol * (1 - grad_tol.MARGIN),
        ROWS=at_once, TILES=block, PER=grad_tol.TILE // sums.part_columns, RELATIVE=keep.grad_tol_relative,
        num_warps=WARPS, **COMPILED,
    )  # fmt: skip
    return out


# otherwise every kind of batch size is compiled separately
@triton.jit(do_not_specialize=["n_rows", "all_rows", "n_tiles", "n_words", "n_parts"])
def choose_kernel(
    sums, state, targets, redo, words,  # [n_parts, all_rows], [N, 2] float64, [N], [N] int8 → [N, n_words] int64
    n_rows, all_rows, n_tiles, n_words, n_parts, tolerance,
    ROWS: tl.constexpr, TILES: tl.constexpr, PER: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """All tiles of ROWS rows per program. `sums` holds Σ E of every part of a tile, PER of them."""
    rows, tiles = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TILES)
    there, inside = rows < n_rows, tiles < n_tiles
    total = tl.zeros([ROWS, TILES], tl.float32)
    for part in tl.static_range(PER):
        parts = tiles * PER + part
        at = parts.to(tl.int64)[None, :] * all_rows + rows[:, None]
        total += tl.load(sums + at, there[:, None] & (parts < n_parts)[None, :], other=0.0)

    # probabilities among all columns, or among those without the target
    if RELATIVE:
        total = total / tl.sum(total, 1)[:, None]
    else:
        lse, k = tl.load(state + 2 * rows, there, other=0.0), tl.load(state + 2 * rows + 1, there, other=0.0)
        total *= tl.exp(k - lse + SHIFT).to(tl.float32)[:, None]

    # the target's own tile does not count
    of_target = tl.load(targets + rows, there, other=0)[:, None] // 64 == tiles[None, :]
    mass = tl.where(of_target, 0.0, total)
    bins = (mass.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> BIN_SHIFT

    # how many of the lowest bins are within the tolerance, bit by bit: each sum has a fixed order, and grows with them
    within = tl.zeros([ROWS], tl.int32)
    for bit in tl.static_range(10):
        more = within + (BINS // 2 >> bit)
        left_out = tl.sum(tl.where(bins < more[:, None], mass, 0.0), 1)
        within = tl.where(left_out <= tolerance, more, within)

    # all tiles of rows out of range, and of those that would take most
    taken = tl.sum((((bins >= within[:, None]) | of_target) & inside[None, :]).to(tl.int32), 1)
    whole = (tl.load(redo + rows, there, other=0) != 0) | (taken > MOST_LISTED * n_tiles)
    within = tl.where(whole, 0, within)

    kept = ((bins >= within[:, None]) | of_target) & inside[None, :]
    places = tl.arange(0, 64).to(tl.int64)[None, None, :]
    packed = tl.sum(tl.reshape(kept.to(tl.int64), [ROWS, TILES // 64, 64]) << places, 2)
    word = tl.arange(0, TILES // 64)
    tl.store(words + rows[:, None] * n_words + word[None, :], packed, there[:, None] & (word < n_words)[None, :])
