"""`grad_tol`: what the backward leaves out stays within its bound, and everything else is as it is without."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from sdpo_kernels import FusedLinearDPOLoss, fused_linear_dpo, linear_logps
from sdpo_kernels.backends import BACKENDS
from sdpo_kernels.backends.base import HeadCall, Keep
from sdpo_kernels.backends.grad_tol import TILE, unpacked, words_of
from sdpo_kernels.head import Head
from sdpo_kernels.rows import IGNORE_INDEX
from tests.exact import coefficients
from tests.lora_cases import check_lora
from tests.reference import Case, check, chunk_columns, error, random_case

ALL = 10**12  # stash_bytes that holds everything
STASHES = (0, 4 * 100 * 150, ALL)  # of 100 rows in float32 the second one holds two tiles


def tiles_of(case: Case, backend: str, tolerance: float, columns: int = 0, relative: bool = False) -> Tensor:
    """Which tiles of each scored row [N, T] a backward takes; bool."""
    rows = (case.targets != IGNORE_INDEX).nonzero().squeeze(1)
    call = HeadCall(
        case.hidden[rows], case.weight, case.bias, case.targets[rows], Head(**case.head), case.hidden.dtype, (),
        len(rows),
    )  # fmt: skip
    words = BACKENDS[backend].forward(call, Keep.columns(columns, tolerance, relative)).tiles
    assert words is not None
    assert words.shape == (len(rows), words_of(len(case.weight)))
    return unpacked(words, -(-len(case.weight) // TILE))


def spread(tiles: Tensor, n_columns: int) -> Tensor:
    """[N, V] from [N, T]."""
    return tiles.repeat_interleave(TILE, 1)[:, :n_columns]


def real_like(seed: int, n_rows: int = 100) -> Case:
    """Rows from flat to peaked, whose hidden states are the logits themselves: the head is the identity.

    A third of the targets are a row's likeliest column, some are its least likely one.
    """
    generator = torch.Generator().manual_seed(seed)
    n_columns = int(torch.randint(1, 700, (), generator=generator))
    steep = 10 ** torch.empty(n_rows, 1).uniform_(-2, 1.3, generator=generator)
    hidden = torch.randn(n_rows, n_columns, generator=generator) * steep
    hidden += torch.randn(n_rows, n_columns // TILE + 1, generator=generator).repeat_interleave(TILE, 1)[:, :n_columns]

    targets = torch.randint(n_columns, (n_rows,), generator=generator)
    targets[::3] = hidden[::3].argmax(1)
    targets[1::10] = hidden[1::10].argmin(1)
    grad = torch.randn(n_rows, generator=generator, dtype=torch.float64)
    return Case(hidden, torch.eye(n_columns), targets, grad=grad)


# --- the bound --------------------------------------------------------------------------------------------------


def test_ten_thousand_rows_stay_within_the_bound(backend):
    """Of each row ‖Δ dL/dz‖₁ ≤ grad_tol·|g|, beside what an exact backward rounds; and its target's tile is exact."""
    left_out = rows = 0
    for seed in range(100):
        case, tolerance = real_like(seed), (2**-10, 2**-8, 2**-4, 0.3)[seed % 4]
        case.settings = {"backend": backend, "stash_bytes": STASHES[seed % 3]}
        exact = case.ours()
        case.settings["grad_tol"] = tolerance
        with chunk_columns(128):
            ours = case.ours()

        assert torch.equal(ours["logps"], exact["logps"]) or backend == "eager"
        truth = coefficients(case, torch.float32)  # dX of an identity
        off, rounding = ((found["d_hidden"].double() - truth).abs().sum(1) for found in (ours, exact))
        assert (off <= tolerance * case.grad.abs() + 1.01 * rounding + 1e-7).all(), (seed, case)

        own = torch.arange(len(case.weight)) // TILE == (case.targets // TILE).unsqueeze(1)
        assert error(ours["d_hidden"][own], exact["d_hidden"][own]) <= 1e-5 * case.grad.abs().max()
        left_out += int((~tiles_of(case, backend, tolerance)).sum())
        rows += len(case.targets)
    assert rows == 10_000
    assert left_out > 10_000


def test_softcap_and_scale_multiply_the_bound_by_no_more_than_scale_over_temperature(backend):
    for seed in range(20):
        case = real_like(seed)
        case.softcap, case.logit_scale, case.temperature = 3.0 + seed, 1.7, 0.6
        case.settings = {"backend": backend, "grad_tol": 0.05, "stash_bytes": STASHES[seed % 3]}
        off = (case.ours()["d_hidden"].double() - coefficients(case, torch.float32)).abs().sum(1)
        assert (off <= (0.05 * case.grad.abs() + 1e-5) * 1.7 / 0.6).all()


# --- gradients are those of what is kept ------------------------------------------------------------------------

HEADS = {
    "plain": {},
    "bias and scale": {"bias": True, "logit_scale": 1.5},
    "softcap": {"bias": True, "softcap": 15.0, "temperature": 0.8},
    "one row": {"n_rows": 1},
    "ignored rows": {"masked": 0.4},
}


def peaked(n_rows: int = 100, n_columns: int = 1000, **options) -> Case:
    """A case of which a tolerance of 0.05 leaves many tiles out."""
    return random_case(n_rows, 48, n_columns, scale=4.0, seed=3, **options)


def kept_gradients(case: Case, tiles: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients in float64 of the coefficients in kept tiles."""
    da = coefficients(case, dtype)
    scored = (case.targets != IGNORE_INDEX).nonzero().squeeze(1)
    da[scored] *= spread(tiles, len(case.weight))
    x, w = (t.to(dtype).double() for t in (case.hidden, case.weight))
    return {"d_hidden": da @ w, "d_weight": da.T @ x, "d_bias": da.sum(0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stash_bytes", STASHES)
@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_the_tiles_that_are_kept(head, stash_bytes, dtype, backend):
    case = peaked(dtype=dtype, **HEADS[head])
    case.grad[5:9] = 0.0  # rows that the backward skips
    case.settings = {"backend": backend, "stash_bytes": stash_bytes}
    exact, truth = case.ours(), case.truth()
    tiles = tiles_of(case, backend, 0.05)
    assert 0.02 < tiles.double().mean() < 0.95

    case.settings["grad_tol"] = 0.05
    ours, wanted = case.ours(), kept_gradients(case, tiles, dtype)
    assert error(ours["logps"], exact["logps"]) <= 1e-5
    for name, right in wanted.items():
        if name in ours:
            # where the rounding of dlogits is most of an error it is the same here, and terms are fewer
            assert error(ours[name], right) <= 1.5 * error(exact[name], truth[name]) + 1e-6, name
    assert error(ours["d_hidden"], truth["d_hidden"]) > 2 * error(exact["d_hidden"], truth["d_hidden"])


@pytest.mark.parametrize("trains", [("hidden",), ("weight",), ("bias",)], ids=str)
@pytest.mark.parametrize("stash_bytes", STASHES)
def test_one_gradient_alone_has_the_same_bits(stash_bytes, trains, backend):
    case = peaked(bias=True, settings={"backend": backend, "stash_bytes": stash_bytes, "grad_tol": 0.05})
    everything = case.ours()
    case.trains = trains
    name = f"d_{trains[0]}"
    assert torch.equal(case.ours()[name], everything[name])


@pytest.mark.parametrize("base_trains", [False, True])
@pytest.mark.parametrize("stash_bytes", [0, ALL])
def test_a_lora_on_the_head(base_trains, stash_bytes, backend):
    """With a tolerance that leaves nothing out but what rounds to 0."""
    check_lora(backend, torch.float32, stash_bytes, base_trains, temperature=0.8, grad_tol=1e-9)


# --- what a row's choice depends on -----------------------------------------------------------------------------


def test_a_rows_choice_depends_on_the_row_alone():
    case = peaked(200)
    whole = tiles_of(case, "native", 0.05)
    assert torch.equal(tiles_of(case, "native", 0.05, columns=512), whole)

    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    some = Case(case.hidden[order[:33]], case.weight, case.targets[order[:33]])
    assert torch.equal(tiles_of(some, "native", 0.05), whole[order[:33]])
    alone = Case(case.hidden[7:8], case.weight, case.targets[7:8])
    assert torch.equal(tiles_of(alone, "native", 0.05), whole[7:8])


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("stash_bytes", STASHES)
def test_the_number_of_threads_changes_no_bit(stash_bytes, relative):
    settings = {"backend": "native", "stash_bytes": stash_bytes, "grad_tol": 0.05, "grad_tol_relative": relative}
    case = peaked(bias=True, settings=settings)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            found.append(case.ours())
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
        assert torch.equal(found[2][name], value), name


# --- exact all the same -----------------------------------------------------------------------------------------


def test_a_tolerance_of_zero_keeps_nothing_and_is_the_default(backend):
    case = peaked(settings={"backend": backend})
    default = case.ours()
    case.settings["grad_tol"] = 0.0
    for name, value in case.ours().items():
        assert value is None or torch.equal(value, default[name])


def test_backends_that_leave_nothing_out_are_exact(monkeypatch):
    monkeypatch.setattr(type(BACKENDS["native"]), "uses_grad_tol", lambda self, device: False)
    case = peaked(settings={"backend": "native"})
    exact = case.ours()
    case.settings["grad_tol"] = 0.5
    assert torch.equal(case.ours()["d_weight"], exact["d_weight"])


def test_eager_leaves_tiles_out_only_where_it_is_named(monkeypatch):
    case = peaked(settings={"backend": "eager"})
    exact = case.ours()["d_weight"]
    case.settings["grad_tol"] = 0.05
    assert not torch.equal(case.ours()["d_weight"], exact)

    monkeypatch.delenv("SDPO_BACKEND", raising=False)
    for backend in ("native", "triton"):
        monkeypatch.setattr(type(BACKENDS[backend]), "supports", lambda self, request: "not now")
    case.settings["backend"] = "auto"
    assert torch.equal(case.ours()["d_weight"], exact)
    monkeypatch.setenv("SDPO_BACKEND", "eager")
    assert not torch.equal(case.ours()["d_weight"], exact)


def test_rows_out_of_range_are_exact():
    case = peaked(trains=("hidden",))
    case.hidden[10:13] *= 40
    case.targets[10:13] = (case.hidden[10:13] @ case.weight.T).argmin(1)
    assert tiles_of(case, "native", 0.05)[10:13].all()
    case.settings = {"backend": "native", "grad_tol": 0.05}
    ours = case.ours()
    assert ours["logps"][10:13].max() < -86
    truth = case.truth()["d_hidden"]
    assert error(ours["d_hidden"][10:13], truth[10:13]) <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("stash_bytes", [0, ALL])
def test_a_nan_stays_in_its_row(stash_bytes, backend):
    case = peaked(trains=("hidden",))
    case.hidden[4, 3] = torch.nan
    case.settings = {"backend": backend, "grad_tol": 0.05, "stash_bytes": stash_bytes}
    found = case.ours()["d_hidden"]
    assert found[4].isnan().all()
    assert not found[torch.arange(100) != 4].isnan().any()


@pytest.mark.parametrize("stash_bytes", [0, "auto"])
def test_no_scored_row(stash_bytes, backend):
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
    targets = torch.full((3,), -100)
    linear_logps(hidden, weight, targets, backend=backend, grad_tol=0.1, stash_bytes=stash_bytes).logps.sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_the_entropys_gradient_is_exact(backend):
    case = peaked(outputs=("entropy",), grad_entropy=torch.linspace(-1, 1, 100))
    case.settings = {"backend": backend, "grad_tol": 0.05}
    check(case, case.ours())


# --- through the public functions -------------------------------------------------------------------------------


def test_the_fused_loss_passes_it_on():
    case = peaked(16)
    hidden, labels = case.hidden.view(4, 4, -1), case.targets.view(4, 4)

    def gradient(tolerance: float) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        fused_linear_dpo(leaf, case.weight, labels, ref_logps=torch.zeros(4), grad_tol=tolerance).loss.backward()
        return leaf.grad

    assert not torch.equal(gradient(0.1), gradient(0.0))
    assert 0 < error(gradient(0.1), gradient(0.0)) <= 0.1 * error(gradient(0.0), torch.zeros(()))


@pytest.mark.parametrize("wrong", [-0.1, 1.0, float("nan"), True, "auto"])
def test_a_wrong_tolerance_is_refused(wrong):
    with pytest.raises(ValueError, match=r"grad_tol: was .*, must be a number of at least 0 and below 1"):
        linear_logps(torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2, dtype=torch.int64), grad_tol=wrong)
    with pytest.raises(ValueError, match="grad_tol: was"):
        FusedLinearDPOLoss(grad_tol=wrong)


def test_a_number_of_numpy_is_taken():
    case = peaked(settings={"backend": "eager", "grad_tol": 0.1})
    ours = case.ours()["d_hidden"]
    case.settings["grad_tol"] = np.float32(0.1)
    assert torch.equal(case.ours()["d_hidden"], ours)


def test_slices_of_a_vocabulary_refuse_it():
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"grad_tol: was 0\.1, must be 0 with vocab_group"):
        fused_linear_dpo(
            torch.zeros(2, 3, 4), torch.zeros(8, 4), labels, ref_logps=torch.zeros(2), vocab_group=object(),
            grad_tol=0.1,
        )  # fmt: skip


def test_compiled_it_gives_the_same(backend):
    torch._dynamo.reset()
    case = peaked(settings={"backend": backend, "grad_tol": 0.05})
    compiled = case.ours(torch.compile(linear_logps, fullgraph=True, backend="aot_eager"))
    for name, value in case.ours().items():
        assert value is None or torch.equal(compiled[name], value), name


@pytest.mark.parametrize("stash_bytes", [0, ALL])
def test_compiled_with_nothing_scored(stash_bytes, backend):
    """The graph does not know the number of scored rows: what the forward keeps has room for all."""
    torch._dynamo.reset()
    case = peaked(settings={"backend": backend, "grad_tol": 0.05, "stash_bytes": stash_bytes})
    case.targets.fill_(IGNORE_INDEX)
    compiled = case.ours(torch.compile(linear_logps, fullgraph=True, backend="aot_eager"))
    assert not any(value.any() for value in compiled.values() if value is not None)


FULLEST_CHUNK = """
import resource, torch
from sdpo_kernels import linear_logps

torch.set_num_threads(1)
rows, columns, common = 4096, 65536, 8192
hidden, weight = torch.zeros(rows, 8), torch.zeros(columns, 8)
hidden[:, 0], weight[common:, 0] = 1.0, -20.0
hidden.requires_grad_()
out = linear_logps(hidden, weight, torch.arange(rows), stash_bytes=0, backend="native", grad_tol=0.01)

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out.logps.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(BACKENDS["native"].unavailable_reason is not None, reason="needs the native library")
def test_memory_follows_the_fullest_chunk():
    """All rows take the first 128 of 1024 blocks: a chunk of the mean number of rows would need 128 MiB for its S."""
    done = subprocess.run([sys.executable, "-c", FULLEST_CHUNK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40


@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids=str)
@pytest.mark.parametrize("stash_bytes", STASHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_every_row_takes_all_the_gradients_are_those_without(dtype, stash_bytes, trains, backend):
    """Flat rows: the products are the dense ones."""
    case = random_case(100, 48, 1000, scale=0.1, seed=3, bias=True, dtype=dtype, trains=trains)
    case.settings = {"backend": backend, "stash_bytes": stash_bytes}
    exact, truth = case.ours(), case.truth()
    case.settings["grad_tol"] = 2**-8
    ours = case.ours()
    assert tiles_of(case, backend, 2**-8).all()
    for name, value in ours.items():
        if value is None or name not in truth:
            continue
        assert error(value, truth[name]) <= 1.5 * error(exact[name], truth[name]) + 1e-6, name
        if trains != ("hidden",):  # alone, an exact dX is made in the forward
            assert torch.equal(value, exact[name]), name
