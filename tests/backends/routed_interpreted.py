"""`grad_tol` with the Triton kernels, in Triton's interpreter. Run by test_routed.py with TRITON_INTERPRET=1 set."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sdpo_kernels import linear_logps
from sdpo_kernels.backends.base import HeadCall, Keep
from sdpo_kernels.backends.grad_tol import TILE
from sdpo_kernels.backends.triton import routed
from sdpo_kernels.backends.triton import tiles as tile_choice
from sdpo_kernels.backends.triton.tiles import INTERPRETED
from sdpo_kernels.head import Head
from sdpo_kernels.stepwise.memory.head import HeadCase, HeadMemory
from tests.backends.test_grad_tol import kept_gradients, real_like, tiles_of
from tests.backends.test_grad_tol_relative import rest_of, sure
from tests.backends.triton_interpreted import ALL, TRITON, checked, triton_case, walk
from tests.exact import check_exact, coefficients, exact_case
from tests.lora_cases import check_lora
from tests.reference import Case, allocations, error

HEADS = {
    "plain": {},
    "bias and scale": {"bias": True, "logit_scale": 1.5},
    "softcap": {"bias": True, "softcap": 20.0, "temperature": 0.6},
    "ignored rows": {"masked": 0.4},
}


def peaked(n_rows: int = 19, width: int = 17, n_columns: int = 230, scale: float = 4.0, **options) -> Case:
    """A case of which a tolerance of 0.05 leaves tiles out."""
    settings = {"stash_bytes": 0} | options.pop("settings", {})
    return triton_case(n_rows, width, n_columns, scale=scale, seed=3, settings=settings, **options)


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """What torch.empty returns holds NaN, so that a number that nobody wrote is seen wherever it is read."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def check_kept(case: Case, tolerance: float, relative: bool = False) -> Tensor:
    """Log-probs have the bits of an exact call, gradients are those of the tiles kept; returns these [N, T]."""
    case.settings.pop("grad_tol", None)
    exact, truth = case.ours(), case.truth()
    tiles = tiles_of(case, "triton", tolerance, relative=relative)
    assert torch.equal(tiles, tiles_of(case, "eager", tolerance, relative=relative))

    case.settings |= {"grad_tol": tolerance, "grad_tol_relative": relative}
    ours, wanted = case.ours(), kept_gradients(case, tiles, case.hidden.dtype)
    assert torch.equal(ours["logps"], exact["logps"])
    slack = 2**-20 if case.hidden.dtype == torch.float32 else 2**-9
    for name, right in wanted.items():
        if ours.get(name) is not None:
            allowed = 2 * error(exact[name], truth[name]) + slack * right.abs().max()
            assert error(ours[name], right) <= allowed, name
    return tiles


@pytest.mark.parametrize(
    ("head", "stash_bytes", "dtype"),
    [
        ("plain", 0, torch.bfloat16),
        ("plain", ALL, torch.bfloat16),
        ("plain", 4 * 19 * 100, torch.float32),
        ("bias and scale", 0, torch.float32),
        ("softcap", 4 * 19 * 100, torch.bfloat16),
        ("softcap", 0, torch.float32),
        ("ignored rows", 0, torch.bfloat16),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_tiles_that_are_kept(head, stash_bytes, dtype):
    case = peaked(dtype=dtype, settings={"stash_bytes": stash_bytes}, **HEADS[head])
    case.grad[5:9] = 0.0
    tiles = check_kept(case, 0.1)
    assert 0.2 < tiles.double().mean() < 0.95


@pytest.mark.parametrize("seed", range(6))
def test_rows_stay_within_the_bound(seed):
    """Of each row ‖Δ dL/dz‖₁ ≤ grad_tol·|g|: dX of a head that is the identity is dL/dz."""
    case, tolerance = real_like(seed, n_rows=12), (2**-10, 2**-8, 2**-4, 0.3)[seed % 4]
    case.hidden, case.weight = case.hidden[:, :200], case.weight[:200, :200]
    case.targets %= case.weight.shape[0]
    case.settings = {"backend": "triton", "stash_bytes": ALL * (seed % 2)}
    exact = case.ours()
    case.settings["grad_tol"] = tolerance
    ours, truth = case.ours(), coefficients(case, torch.float32)
    off, rounding = ((found["d_hidden"].double() - truth).abs().sum(1) for found in (ours, exact))
    assert (off <= tolerance * case.grad.abs() + 3 * rounding + 1e-6).all()

    own = torch.arange(len(case.weight)) // TILE == (case.targets // TILE).unsqueeze(1)
    assert error(ours["d_hidden"][own], exact["d_hidden"][own]) <= 1e-5 * case.grad.abs().max()


@pytest.mark.parametrize("stash_bytes", [0, ALL])
def test_relative_to_what_a_row_has_tiles_are_kept(stash_bytes):
    case = peaked(bias=True, settings={"stash_bytes": stash_bytes})
    case.targets[::2] = (case.hidden @ case.weight.T + case.bias).argmax(1)[::2]
    case.grad[5:9] = 0.0
    tiles = check_kept(case, 0.1, relative=True)
    assert 0.2 < tiles.double().mean() < 0.95
    assert not torch.equal(tiles, tiles_of(case, "triton", 0.1))


@pytest.mark.parametrize("rest", [1e-4, 1e-12])
def test_sure_rows_stay_within_the_relative_bound(rest):
    """And choose as rows do that are less sure; the absolute rule leaves out all but the target's tile."""
    case = sure(rest, n_rows=12, n_columns=200)
    tiles = tiles_of(case, "triton", 2**-6, relative=True)
    assert torch.equal(tiles, tiles_of(sure(0.1, 12, 200), "triton", 2**-6, relative=True))
    assert torch.equal(tiles, tiles_of(case, "eager", 2**-6, relative=True))
    assert not tiles.all()
    assert (tiles_of(case, "triton", 2**-6).sum(1) == 1).all()

    case.settings = {"backend": "triton", "stash_bytes": 0, "grad_tol": 2**-6, "grad_tol_relative": True}
    off = (case.ours()["d_hidden"].double() - coefficients(case, torch.float32)).abs().sum(1)
    assert (off <= 2**-6 * 1.001 * rest_of(case)).all()


@pytest.mark.parametrize("columns", [1, 63, 65, 128])
def test_vocabularies_of_a_few_tiles(columns):
    check_kept(peaked(9, 12, columns, bias=True), 0.1)


def test_everything_kept_or_one_tile_of_each_row():
    assert check_kept(peaked(11), 1e-30).all()
    case = peaked(11, scale=40.0)
    case.targets = (case.hidden @ case.weight.T).argmax(1)
    assert (check_kept(case, 0.3).sum(1) == 1).sum() >= 8


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_rows_bad_gradient_stays_in_the_tiles_it_keeps(wrong):
    """Lists end within a block of rows; what the block reads past the end must not be row 0."""
    case = peaked(5, 16, 512, scale=8.0, bias=True)
    case.targets = (case.hidden @ case.weight.T + case.bias).argmax(1)
    case.grad[0] = wrong
    tiles = tiles_of(case, "triton", 0.3)[0]
    assert not tiles.all()
    case.settings["grad_tol"] = 0.3
    ours = case.ours()
    for name in ("d_weight", "d_bias"):
        assert ours[name].view(8, -1).isfinite().all(1).tolist() == (~tiles).tolist()


@pytest.fixture
def larger_shapes(monkeypatch):
    """For larger cases: still 3 blocks of rows, 2 of the depth, and 2 of the width."""
    monkeypatch.setattr(tile_choice, "INTERPRETED", replace(INTERPRETED, rows=32, columns=128, depth=32))
    monkeypatch.setattr(routed, "INTERPRETED", routed.Shape(32, 32, 32, 1, 1))


@pytest.mark.usefixtures("larger_shapes")
def test_the_memory_plan_of_a_backward(tmp_path):
    hidden, weight = torch.randn(256, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True)
    targets = torch.randint(128, (256,))
    logps = linear_logps(hidden, weight, targets, backend="triton", stash_bytes=0, grad_tol=0.1).logps.sum()
    with allocations(tmp_path / "trace.json") as found:
        logps.backward()

    case = HeadCase(256, 256, 128, 256, *[torch.float32] * 3, True, False, "cuda", memory=1, grad_tol=0.1)
    planned = HeadMemory.of(case).backward
    dw = 4 * 128 * 256
    assert 0.95 * planned <= found["peak"] - dw <= 1.05 * planned


def test_no_scored_row():
    case = peaked(7, masked=1.0, bias=True, settings={"grad_tol": 0.1})
    ours = case.ours()
    for name in ("d_hidden", "d_weight", "d_bias"):
        assert not ours[name].any()


@pytest.mark.parametrize("stash_bytes", [0, 4 * 19 * 64])
def test_several_chunks_of_the_vocabulary(monkeypatch, stash_bytes):
    monkeypatch.setattr(walk, "CHUNK_ELEMENTS", 19 * 128)
    check_kept(peaked(n_columns=400, bias=True, settings={"stash_bytes": stash_bytes}), 0.05)


@pytest.mark.parametrize(("columns", "pieces"), [(128, 1), (128, 8), (256, 2), (64, 1)])
def test_sums_of_64_columns_come_from_any_tile(monkeypatch, columns, pieces):
    """Of a part of a tile, or of several parts."""
    monkeypatch.setattr(tile_choice, "INTERPRETED", replace(INTERPRETED, columns=columns, pieces=pieces))
    check_kept(peaked(softcap=9.0, trains=("hidden",)), 0.05)


def test_a_repeated_run_and_one_gradient_alone_have_the_same_bits():
    case = peaked(bias=True, settings={"grad_tol": 0.05})
    everything, again = case.ours(), case.ours()
    for name, value in everything.items():
        assert value is None or torch.equal(again[name], value), name
    for name in ("hidden", "weight", "bias"):
        case.trains = (name,)
        assert torch.equal(case.ours()[f"d_{name}"], everything[f"d_{name}"])


def test_what_a_row_keeps_depends_on_the_row_alone():
    case = peaked(24)
    whole = tiles_of(case, "triton", 0.05)
    some = Case(case.hidden[7:20], case.weight, case.targets[7:20])
    assert torch.equal(tiles_of(some, "triton", 0.05), whole[7:20])
    assert torch.equal(tiles_of(case, "triton", 0.05, columns=128), whole)

    # a reference's rows follow the policy's, and rows that a fake kernel could not know keep nothing
    call = HeadCall(
        case.hidden, case.weight, None, case.targets, Head(), torch.float32, (), 29, ref_hidden=case.hidden.flip(0)
    )
    words = TRITON.forward(call, Keep.columns(0, 0.05)).tiles
    alone = TRITON.forward(replace(call, kept_rows=24, ref_hidden=None), Keep.columns(0, 0.05)).tiles
    assert torch.equal(words[:24], alone)
    assert not words[24:].any()


@pytest.mark.parametrize("stash_bytes", [0, ALL])
def test_rows_out_of_range_are_exact(stash_bytes):
    case = peaked(9, bias=True, trains=("hidden",), settings={"stash_bytes": stash_bytes})
    case.bias[7] = -200.0
    case.targets[3:6] = 7
    for relative in (False, True):
        assert tiles_of(case, "triton", 0.3, relative=relative)[3:6].all()
    case.settings["grad_tol"] = 0.3
    ours, truth = case.ours(), case.truth()["d_hidden"]
    assert ours["logps"][3] < -150
    assert error(ours["d_hidden"][3:6], truth[3:6]) <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize(("stash_bytes", "tolerance"), [(0, 0.05), (ALL, 0.05), (ALL, 1e-9)])
def test_a_nan_stays_in_its_row(stash_bytes, tolerance):
    """Also where rows with g = 0 are left out of the stash: past V its rows then end where the next ones begin."""
    case = peaked(9, trains=("hidden",), settings={"stash_bytes": stash_bytes, "grad_tol": tolerance})
    case.grad[0] = 0.0
    case.hidden[4, 3] = torch.nan
    for relative in (False, True):
        assert tiles_of(case, "triton", tolerance, relative=relative)[4].all()
    found = case.ours()["d_hidden"]
    assert found[4].isnan().all()
    assert not found[torch.arange(9) != 4].isnan().any()


def test_the_entropys_gradient_is_exact():
    case = peaked(12, outputs=("entropy",), grad_entropy=torch.linspace(-1, 1, 12), settings={"grad_tol": 0.05})
    checked(case)


@pytest.mark.usefixtures("larger_shapes")
@pytest.mark.parametrize(("head", "stash_bytes"), [("bias", 0), ("softcap", ALL), ("ignored", 0)])
def test_exact_at_the_target(head, stash_bytes):
    """See tests/exact.py; of a tolerance that leaves out what rounds to 0."""
    case = exact_case(head, backend="triton", stash_bytes=stash_bytes, grad_tol=1e-12)
    check_exact([case], stashed=stash_bytes > 0)


@pytest.mark.parametrize("base_trains", [False, True])
def test_a_lora_on_the_head(base_trains):
    check_lora("triton", torch.float32, 0, base_trains, temperature=0.8, grad_tol=1e-9)
