"""The rule of `grad_tol`: which tiles of a row a backward takes, and that choice as bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdpo_kernels.backends.grad_tol import TILE, kept_tiles, packed, unpacked
from tests.backends.test_grad_tol import real_like, tiles_of
from tests.reference import Case


def test_the_least_tiles_are_left_out_in_whole_quarters_of_an_octave():
    """Bins begin at 1, 1.25, 1.5 and 1.75 times a power of two."""
    unit = 2.0**-12
    masses = unit * torch.tensor([[1.0, 1.2, 2.0, 2.3, 2.5, 3000.0, 0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([5])

    def kept(tolerance: float) -> list[int]:
        return kept_tiles(masses, target, unit * tolerance)[0].nonzero().squeeze(1).tolist()

    assert kept(0.5) == [0, 1, 2, 3, 4, 5]  # a tile of probability 0 costs nothing
    assert kept(2.1) == [0, 1, 2, 3, 4, 5]  # 1.0 alone would fit, its whole bin does not
    assert kept(2.3) == [2, 3, 4, 5]
    assert kept(6.4) == [2, 3, 4, 5]
    assert kept(6.6) == [4, 5]
    assert kept(9.1) == [5]  # the target's tile stays, whatever its probability
    assert kept_tiles(masses, torch.tensor([0]), unit * 2.3)[0].nonzero().squeeze(1).tolist() == [0, 2, 3, 4, 5]


def test_a_row_that_would_take_more_than_three_quarters_takes_all():
    masses = torch.full((2, 8), 0.1, dtype=torch.float64)
    masses[0, :2], masses[1, :1] = 1e-9, 1e-9
    target = torch.tensor([7, 7])
    assert kept_tiles(masses, target, 0.01)[0].tolist() == [False] * 2 + [True] * 6
    assert kept_tiles(masses, target, 0.01)[1].all()
    assert kept_tiles(masses[:1], torch.tensor([0]), 0.01).all()  # a target's tile counts


def by_sorting(case: Case, tolerance: float, relative: bool) -> tuple[Tensor, Tensor]:
    """The rule in float64, row by row: kept tiles [N, T], and which rows no rounding can change; bool.

    `case.hidden` are the logits.
    """
    y, n_tiles = case.targets.unsqueeze(1), -(-len(case.weight) // TILE)
    z = case.hidden.double()
    others = z.scatter(1, y, -torch.inf)
    q = (others - (others if relative else z).logsumexp(1, keepdim=True)).exp()
    masses = torch.nn.functional.pad(q, (0, n_tiles * TILE - q.shape[1])).view(len(q), n_tiles, TILE).sum(2)
    kept, sure = torch.ones(len(q), n_tiles, dtype=torch.bool), torch.ones(len(q), dtype=torch.bool)
    within = tolerance * (1 - 2**-10)
    for row, own in enumerate((case.targets // TILE).tolist()):
        bins: dict[tuple[int, int], list[int]] = {}
        for tile, mass in enumerate(masses[row].tolist()):
            fraction, octave = math.frexp(mass)
            if tile != own:
                bins.setdefault((octave, int(fraction * 8)), []).append(tile)
            sure[row] &= abs(fraction * 8 - round(fraction * 8)) > 1e-4

        total = 0.0
        for _, tiles in sorted(bins.items()):
            total += float(masses[row, tiles].sum())
            sure[row] &= abs(total / within - 1) > 1e-4
            if total > within:
                break
            kept[row, tiles] = False
        if 4 * int(kept[row].sum()) > 3 * n_tiles:
            kept[row] = True
    return kept, sure


@pytest.mark.parametrize("relative", [False, True])
def test_choices_are_those_of_sorting_in_float64(relative, backend):
    n_sure = n_whole = n_rows = 0
    for seed, tolerance in enumerate((2**-8, 2**-6, 2**-4, 0.3)):
        case = real_like(seed + 20)
        kept, sure = by_sorting(case, tolerance, relative)
        assert torch.equal(tiles_of(case, backend, tolerance, relative=relative)[sure], kept[sure])
        n_sure, n_whole, n_rows = n_sure + int(sure.sum()), n_whole + int(kept.all(1).sum()), n_rows + len(kept)
    assert n_sure > 0.9 * n_rows
    assert 0.1 * n_rows < n_whole < 0.9 * n_rows


def test_rows_with_a_nan_are_kept_whole():
    masses = torch.full((2, 3), torch.nan, dtype=torch.float64)
    masses[1] = torch.tensor([1e-9, 1e-9, 1.0])
    assert kept_tiles(masses, torch.tensor([0, 2]), 0.1).tolist() == [[True] * 3, [False, False, True]]


@pytest.mark.parametrize("n_tiles", [1, 63, 64, 65, 130])
def test_bits_and_back(n_tiles):
    kept = torch.rand(5, n_tiles, generator=torch.Generator().manual_seed(n_tiles)) < 0.5
    kept[0] = True
    words = packed(kept, rows=7)
    assert torch.equal(unpacked(words[:5], n_tiles), kept)
    assert not words[5:].any()
