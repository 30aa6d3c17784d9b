"""Which tiles of 64 columns a backward may leave out: the rule of `grad_tol`, in plain torch.

    tiles = kept_tiles(masses, targets // TILE, grad_tol)      # [N, tiles] bool
    words = packed(tiles, kept_rows)                           # [kept_rows, words] int64

A row's dL/dz is -g·p_j outside its target, so leaving out columns of probability m changes it by m·|g| (L1 norm). Of
each row the tiles of least probability are left out while their sum stays within grad_tol:

    1. a tile's probability is rounded to float32; its exponent and the first 2 bits after it are its bin, a quarter of
       an octave
    2. whole bins are left out, from the lowest one on, while the sum of what is in them stays within the tolerance
    3. the target's tile is kept, and does not count; so is every tile of a row with a NaN
    4. a row that would take more than three quarters of its tiles takes all: listing them costs more than it saves

The choice depends on a row's probabilities alone, not on g, so the forward makes it. csrc/cpu/tiles.h has the same
rule.

With `grad_tol_relative` a probability is that among the columns without the target, p_j/(1 − p): what a row leaves out
is then within grad_tol·(1 − p), relative to what its gradient has. It comes from sums without the target, not
from a difference, so that it is exact as p → 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 64
WORD = 64  # bits
MARGIN = 2.0**-10  # of the tolerance, for the rounding of logits and sums
MOST_LISTED = 0.75  # of a row's tiles; where it would take more it takes all
_BIN_SHIFT, _BINS = 21, 1024  # 8 bits of exponent, 2 of mantissa
_ROWS_AT_ONCE = 1024


def words_of(n_columns: int) -> int:
    """How many int64 have a bit for every tile of `n_columns` columns."""
    return -(-n_columns // (TILE * WORD))


def kept_tiles(masses: Tensor, target_tile: Tensor, grad_tol: float) -> Tensor:
    """Which tiles [N, T] a backward takes, bool, from their probabilities `masses` [N, T] and the target's tile [N].

    The target's own probability is in none of them.
    """
    parts = zip(masses.split(_ROWS_AT_ONCE), target_tile.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([_kept(mass, tile.unsqueeze(1), grad_tol) for mass, tile in parts])


def _kept(masses: Tensor, target_tile: Tensor, grad_tol: float) -> Tensor:
    rounded = masses.float().scatter(1, target_tile, 0.0)
    bins = (rounded.view(torch.int32) & 0x7FFFFFFF).long() >> _BIN_SHIFT

    # index_put_ adds in a fixed order, on CUDA, too; scatter_add_ does not
    rows = torch.arange(len(masses), device=masses.device).unsqueeze(1).expand_as(bins)
    of_bin = rounded.new_zeros((len(masses), _BINS), dtype=torch.float64)
    of_bin.index_put_((rows, bins), rounded.double(), accumulate=True)

    # a NaN's bin is the highest, and nothing is within a sum that is NaN
    within = of_bin.cumsum(1) <= grad_tol * (1 - MARGIN)
    kept = bins >= within.sum(1, keepdim=True)
    kept.scatter_(1, target_tile, True)
    return kept | (kept.sum(1, keepdim=True) > MOST_LISTED * kept.shape[1])


def packed(kept: Tensor, rows: int) -> Tensor:
    """[rows, words] int64 of `kept` [N, T]: bit b of word w is tile 64·w + b; rows past N are 0."""
    n_rows, n_tiles = kept.shape
    words = words_of(n_tiles * TILE)
    bits = kept.new_zeros((n_rows, words * WORD), dtype=torch.int64)
    bits[:, :n_tiles] = kept
    out = bits.new_zeros((rows, words))
    out[:n_rows] = (bits.view(n_rows, words, WORD) << _places(kept)).sum(2)
    return out


def unpacked(words: Tensor, n_tiles: int) -> Tensor:
    """The inverse of `packed`, of the rows given."""
    bits = (words.unsqueeze(2) >> _places(words)) & 1
    return bits.reshape(len(words), words.shape[1] * WORD)[:, :n_tiles].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(WORD, device=like.device)
