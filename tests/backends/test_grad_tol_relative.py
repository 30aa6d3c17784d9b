"""`grad_tol_relative`: what the backward leaves out stays within grad_tol·(1 − p) of each row, also as p → 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdpo_kernels import FusedLinearDPOLoss, fused_linear_dpo, linear_logps
from sdpo_kernels.backends.grad_tol import TILE
from tests.backends.test_grad_tol import ALL, STASHES, kept_gradients, peaked, real_like, spread, tiles_of
from tests.exact import coefficients
from tests.reference import Case, chunk_columns, error

SURE = (1e-1, 1e-4, 1e-8, 1e-12, 1e-15)  # 1 − p


def rest_of(case: Case) -> Tensor:
    """1 − p of each row of a case whose hidden states are the logits, in float64 and without a difference."""
    z = case.hidden.double()
    others = z.scatter(1, case.targets.unsqueeze(1), -torch.inf).logsumexp(1)
    return (others - z.logsumexp(1)).exp()


def sure(rest: float, n_rows: int = 40, n_columns: int = 500) -> Case:
    """Rows whose targets have probability 1 − `rest`; all else is the same for every `rest`."""
    case = real_like(4, n_rows)
    case.grad = None
    assert case.hidden.shape[1] > n_columns
    case.hidden, case.weight = case.hidden[:, :n_columns].contiguous(), case.weight[:n_columns, :n_columns].contiguous()
    case.targets = torch.arange(n_rows) * 11 % n_columns
    y = case.targets.unsqueeze(1)
    others = case.hidden.double().scatter(1, y, -torch.inf).logsumexp(1, keepdim=True)
    case.hidden.scatter_(1, y, (others + math.log1p(-rest) - math.log(rest)).float())
    return case


# --- the choice -------------------------------------------------------------------------------------------------


def test_how_sure_a_row_is_changes_no_choice(backend):
    """Nor does the backend: the choice is that of the probabilities among the other columns."""
    choices = [tiles_of(sure(rest), backend, 2**-6, relative=True) for rest in SURE]
    assert 0.1 < choices[0].double().mean() < 0.9
    for choice in choices[1:]:
        assert torch.equal(choice, choices[0])
    assert torch.equal(choices[0], tiles_of(sure(SURE[0]), "eager", 2**-6, relative=True))

    # the absolute rule leaves out all but the target's tile
    assert (tiles_of(sure(1e-12), backend, 2**-6).sum(1) == 1).all()


def test_a_rows_choice_depends_on_the_row_alone():
    case = peaked(200)
    whole = tiles_of(case, "native", 0.05, relative=True)
    assert torch.equal(tiles_of(case, "native", 0.05, columns=512, relative=True), whole)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    some = Case(case.hidden[order[:33]], case.weight, case.targets[order[:33]])
    assert torch.equal(tiles_of(some, "native", 0.05, relative=True), whole[order[:33]])


# --- the bound --------------------------------------------------------------------------------------------------


def off_and_allowed(case: Case, backend: str, stash_bytes: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """‖Δ dL/dz‖₁ of each row against float64, and grad_tol·(1 − p)·|g| beside what an exact backward rounds."""
    case.settings = {"backend": backend, "stash_bytes": stash_bytes}
    exact = case.ours()
    case.settings |= {"grad_tol": tolerance, "grad_tol_relative": True}
    with chunk_columns(128):
        ours = case.ours()
    truth = coefficients(case, torch.float32)  # dX of an identity
    off, rounding = ((found["d_hidden"].double() - truth).abs().sum(1) for found in (ours, exact))
    of_row = rest_of(case) * (1.0 if case.grad is None else case.grad.abs())
    return off, (tolerance + 1e-6) * of_row + 1.01 * rounding


def test_ten_thousand_rows_stay_within_the_bound(backend):
    left_out = rows = 0
    for seed in range(100):
        case, tolerance = real_like(seed), (2**-10, 2**-8, 2**-4, 0.3)[seed % 4]
        off, allowed = off_and_allowed(case, backend, STASHES[seed % 3], tolerance)
        assert (off <= allowed).all(), (seed, case)
        left_out += int((~tiles_of(case, backend, tolerance, relative=True)).sum())
        rows += len(case.targets)
    assert rows == 10_000
    assert left_out > 5_000


@pytest.mark.parametrize("stash_bytes", [0, ALL])
@pytest.mark.parametrize("rest", SURE)
def test_sure_rows_keep_gradients_of_their_own(rest, stash_bytes, backend):
    case = sure(rest)
    off, allowed = off_and_allowed(case, backend, stash_bytes, 2**-6)
    assert (off <= allowed).all()
    assert (off > 1e-4 * rest).any()  # something was left out
    assert (off <= 2**-6 * 1.001 * rest_of(case)).all()  # rounding is of the row's own size, too


@pytest.mark.parametrize("below", [20.0, 60.0])
def test_unlikely_targets(below, backend):
    """p of 1e-9 and 1e-26: 1 − p is 1, so the choice is that of the absolute rule but for the target's own share."""
    case = sure(0.5)
    y = case.targets.unsqueeze(1)
    case.hidden.scatter_(1, y, case.hidden.amin(1, keepdim=True) - below)
    relative = tiles_of(case, backend, 2**-6, relative=True)
    assert torch.equal(relative, tiles_of(case, backend, 2**-6))
    off, allowed = off_and_allowed(case, backend, 0, 2**-6)
    assert (off <= allowed).all()


@pytest.mark.parametrize("n_columns", [1, 64, 65])
@pytest.mark.parametrize("gap", [0.0, 30.0, 100.0])
def test_a_target_that_is_alone(gap, n_columns, backend):
    """The only column, the only tile, or a tile of its own beside one that has all of the rest; 1 − p may be e⁻¹⁰⁰."""
    hidden = torch.zeros(3, n_columns)
    hidden[:, -1] = gap
    case = Case(hidden, torch.eye(n_columns), torch.full((3,), n_columns - 1))
    case.settings = {"backend": backend, "stash_bytes": 0}
    exact = case.ours()["d_hidden"]
    case.settings |= {"grad_tol": 0.3, "grad_tol_relative": True}
    assert torch.equal(case.ours()["d_hidden"], exact)


# --- gradients are those of what is kept ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stash_bytes", STASHES)
def test_gradients_are_those_of_the_tiles_that_are_kept(stash_bytes, dtype, backend):
    case = peaked(dtype=dtype, bias=True, softcap=15.0, temperature=0.8)
    case.settings = {"backend": backend, "stash_bytes": stash_bytes}
    exact, truth = case.ours(), case.truth()
    tiles = tiles_of(case, backend, 0.05, relative=True)
    assert 0.02 < tiles.double().mean() < 0.99

    case.settings |= {"grad_tol": 0.05, "grad_tol_relative": True}
    ours = case.ours()
    assert error(ours["logps"], exact["logps"]) <= 1e-5
    for name, right in kept_gradients(case, tiles, dtype).items():
        assert error(ours[name], right) <= 1.5 * error(exact[name], truth[name]) + 1e-6, name


# --- exact all the same -----------------------------------------------------------------------------------------


def test_a_tolerance_of_zero_is_exact(backend):
    case = peaked(bias=True, settings={"backend": backend})
    exact = case.ours()
    case.settings |= {"grad_tol": 0.0, "grad_tol_relative": True}
    for name, value in case.ours().items():
        assert value is None or torch.equal(value, exact[name]), name


def test_rows_out_of_range_are_exact():
    case = peaked(trains=("hidden",))
    case.hidden[10:13] *= 40
    case.targets[10:13] = (case.hidden[10:13] @ case.weight.T).argmin(1)
    assert tiles_of(case, "native", 0.05, relative=True)[10:13].all()


@pytest.mark.parametrize("stash_bytes", [0, ALL])
def test_a_nan_stays_in_its_row(stash_bytes, backend):
    case = peaked(trains=("hidden",))
    case.hidden[4, 3] = torch.nan
    assert tiles_of(case, backend, 0.05, relative=True)[4].all()
    case.settings = {"backend": backend, "grad_tol": 0.05, "grad_tol_relative": True, "stash_bytes": stash_bytes}
    found = case.ours()["d_hidden"]
    assert found[4].isnan().all()
    assert not found[torch.arange(100) != 4].isnan().any()


def test_a_target_that_is_infinite_keeps_its_row_whole(backend):
    """Its log-prob is NaN, though all other columns are as they should be."""
    case = peaked(trains=("hidden",))
    column = case.targets[4]
    case.hidden[:, 0], case.weight[:, 0] = 0.0, 0.0
    case.hidden[4, 0], case.weight[column, 0] = 1e30, 1e30
    assert tiles_of(case, backend, 0.05, relative=True)[4].all()
    case.settings = {"backend": backend, "grad_tol": 0.05, "grad_tol_relative": True}
    assert case.ours()["d_hidden"][4].isnan().all()


# --- through the public functions -------------------------------------------------------------------------------


def test_the_fused_losses_pass_it_on():
    """Tokens that the model is sure of: the absolute rule leaves out all that is outside their tiles."""
    case = sure(1e-4, 16)
    hidden, labels, ref = case.hidden.view(4, 4, -1), case.targets.view(4, 4), torch.zeros(4)

    def gradient(**tolerance: object) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        fused_linear_dpo(leaf, case.weight, labels, ref_logps=ref, **tolerance).loss.backward()
        again = hidden.clone().requires_grad_()
        FusedLinearDPOLoss(**tolerance)(again, case.weight, labels, ref_logps=ref).loss.backward()
        assert torch.equal(leaf.grad, again.grad)
        return leaf.grad.flatten(0, 1)

    exact = gradient()
    absolute, relative = gradient(grad_tol=2**-6), gradient(grad_tol=2**-6, grad_tol_relative=True)
    own = spread(torch.arange(8) == (case.targets // TILE).unsqueeze(1), 500)
    assert not absolute[~own].any()
    off = (relative - exact).abs().sum(1) / exact.abs().sum(1)
    assert (off <= 2**-7).all()
    assert off.any()


def test_compiled_it_gives_the_same(backend):
    torch._dynamo.reset()
    case = peaked(settings={"backend": backend, "grad_tol": 0.05, "grad_tol_relative": True})
    compiled = case.ours(torch.compile(linear_logps, fullgraph=True, backend="aot_eager"))
    for name, value in case.ours().items():
        assert value is None or torch.equal(compiled[name], value), name


@pytest.mark.parametrize("wrong", [1, "yes", None])
def test_what_is_no_bool_is_refused(wrong):
    with pytest.raises(ValueError, match=r"grad_tol_relative: was .*, must be True or False"):
        linear_logps(torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2, dtype=torch.int64), grad_tol_relative=wrong)
