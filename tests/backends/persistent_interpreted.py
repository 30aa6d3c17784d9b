# ruff: noqa: E402
"""What goes to the persistent kernel and what to Triton's, in Triton's interpreter. Run by test_persistent.py.

The kernel itself has no interpreter: here its formula in plain torch takes its place, with its arguments and borders.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

assert os.environ.get("TRITON_INTERPRET") == "1", "run this file through tests/backends/test_persistent.py"

import pytest
import torch
from torch import Tensor

from sdpo_kernels.backends.base import EXTRAS
from sdpo_kernels.backends.triton import backend as walk
from sdpo_kernels.backends.triton import launch, persistent
from tests.backends.triton_interpreted import ALL, checked, triton_case
from tests.reference import error
from tests.sliced import Sliced

TILE = 24  # columns, fewer than Triton's, as on Hopper
LAUNCHED: list[tuple[int, int, int]] = []  # rows, columns and stored columns of each launch


class InPlainTorch:
    """Takes the place of the compiled kernel of persistent_kernel.py."""

    def __init__(self, has_sums: bool, stores: bool):
        self.has_sums, self.stores = has_sums, stores

    def __call__(
        self, x: Tensor, weight: Tensor, s: Any, c_matrix: Any, epilogue: Any, schedule: Any, *rest: Any
    ) -> None:
        by, c, targets, sums = epilogue
        assert ((sums is not None), (s is not None)) == (self.has_sums, self.stores)
        assert (c_matrix, schedule, rest) == (None, (66, None, 8, None, None, None), (None, None, None))
        assert x.dtype == weight.dtype == torch.bfloat16
        assert c.dtype == targets.dtype == torch.float32

        # what the compiled kernel asks of its arguments
        assert all(persistent.is_aligned(matrix) for matrix in (x, weight, s) if matrix is not None)
        assert c.data_ptr() % 16 == targets.data_ptr() % 16 == 0
        assert weight.shape[0] % TILE == 0
        LAUNCHED.append((x.shape[0], weight.shape[0], 0 if s is None else s.shape[1]))

        a = x.double() @ weight.double().t()
        e = (a.float().double() * by - c.double().unsqueeze(1)).float().exp2()
        e[torch.arange(weight.shape[0]) == targets.unsqueeze(1)] = 0
        if sums is not None:
            assert sums.stride(0) == 1 or sums.shape[0] == 1
            sums.copy_(e.unflatten(1, (-1, TILE)).sum(2))
        if s is not None:
            s[: e.shape[0], : e.shape[1]] = e[: s.shape[0], : s.shape[1]].bfloat16()


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """On request, on a machine that has everything."""
    monkeypatch.setenv("SDPO_QUACK", "1")
    monkeypatch.setattr(persistent, "check_machine", lambda device: None)
    monkeypatch.setattr(persistent, "kernel", InPlainTorch)
    monkeypatch.setattr(persistent, "PERSISTENT_COLUMNS", TILE)
    monkeypatch.setattr(launch, "PERSISTENT_COLUMNS", TILE)
    processors = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: processors)
    LAUNCHED.clear()


def bf16_case(rows: int, width: int, columns: int, **options: Any) -> Any:
    return triton_case(rows, width, columns, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("stash_bytes", [0, 2 * 20 * 64, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("columns", [23, 24, 100])
def test_values_and_gradients(columns, trains, stash_bytes):
    """Columns in whole tiles go to the kernel, the rest to Triton's."""
    case = bf16_case(20, 16, columns, masked=0.2, trains=trains, settings={"stash_bytes": stash_bytes})
    checked(case)
    whole = columns // TILE * TILE
    assert LAUNCHED[:1] == ([(int((case.targets >= 0).sum()), whole, LAUNCHED[0][2])] if whole else [])


@pytest.mark.parametrize("logit_scale", [1.5, -1.5])
def test_scale_and_temperature(logit_scale):
    checked(bf16_case(20, 24, 100, logit_scale=logit_scale, temperature=0.7))


def test_what_is_stored_ends_with_the_stash():
    case = bf16_case(20, 16, 200, settings={"stash_bytes": 2 * 20 * 64})
    checked(case)
    assert LAUNCHED == [(20, 192, 64), (20, 120, 144)]  # the forward; the backward's other columns, 136 of them


@pytest.mark.parametrize("trains", [("hidden", "weight"), ("hidden",)], ids="+".join)
def test_several_chunks(monkeypatch, trains):
    monkeypatch.setattr(walk, "CHUNK_ELEMENTS", 64 * 16)
    case = bf16_case(13, 16, 200, trains=trains, settings={"stash_bytes": 2 * 13 * 64})
    case.weight = case.weight.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = case.ours()
    case.weight = case.weight.bfloat16()
    assert len(LAUNCHED) >= 4

    # W in bfloat16 goes through in one launch
    whole = case.ours()
    assert torch.equal(ours["logps"], whole["logps"])
    for name in (f"d_{trained}" for trained in trains):
        assert error(ours[name], whole[name]) <= 2**-7 * whole[name].abs().max(), name


def test_log_probs_have_the_same_bits_whatever_is_kept():
    case, found = bf16_case(21, 32, 110, scale=3.0), []
    for trains, stash in (((), 0), (("hidden", "weight"), ALL), (("hidden", "weight"), 2800), (("hidden",), 0)):
        case.trains, case.settings["stash_bytes"] = trains, stash
        found.append(case.ours()["logps"])
    assert all(torch.equal(logps, found[0]) for logps in found[1:])


@pytest.mark.parametrize("stash_bytes", [2 * 20 * 64, ALL])
def test_a_references_rows_are_not_stored(stash_bytes):
    case = bf16_case(21, 16, 100, masked=0.2, settings={"stash_bytes": stash_bytes})
    alone = case.ours()
    case.settings["ref_hidden"] = bf16_case(21, 16, 100, seed=1).hidden
    LAUNCHED.clear()
    both = case.ours()
    assert LAUNCHED[0][0] == 2 * int((case.targets >= 0).sum())
    for name, value in alone.items():
        assert value is both[name] or torch.equal(both[name], value), name


def test_slices_of_the_vocabulary():
    case = bf16_case(12, 16, 150, settings={"stash_bytes": 1})
    checked(case, Sliced([0, 40, 100]), roundings=16)
    assert [n for _, n, _ in LAUNCHED[:3]] == [24, 48, 48]


@pytest.mark.parametrize(
    "other",
    [
        {"bias": True}, {"softcap": 5.0}, {"outputs": EXTRAS, "trains": ()}, {"dtype": torch.float32}, {"width": 12},
    ],
    ids=["bias", "softcap", "extras", "float32", "rows that TMA cannot read"],
)  # fmt: skip
def test_other_calls_go_to_triton(other):
    options = {"dtype": torch.bfloat16} | {name: value for name, value in other.items() if name != "width"}
    checked(triton_case(9, other.get("width", 16), 60, **options))
    assert not LAUNCHED


def test_no_tile_is_timed_for_it(monkeypatch):
    monkeypatch.setenv("SDPO_AUTOTUNE", "1")
    monkeypatch.setattr(launch.triton.testing, "do_bench", lambda call: 1 / 0)
    checked(bf16_case(9, 16, 60))
