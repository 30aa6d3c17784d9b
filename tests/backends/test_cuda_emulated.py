"""csrc/cuda without a GPU: the walk, the operators and every kernel, in an emulator on the CPU (see emulated.py)."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_kernels import backends, linear_logps, logits_logps, logps_op
from sdpo_kernels.backends.base import Keep
from tests.backends.emulated import emulated_backend
from tests.backends.epilogue_cases import check_pair_epilogue, pair_cases
from tests.lora_cases import check_lora
from tests.reference import Case, check, error, random_case, scored_rows, target_logps
from tests.sliced import Sliced

pytestmark = [
    pytest.mark.xdist_group("emulator"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
ALL = 10**12
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True, scope="module")
def _emulated():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "emulated", emulated_backend())
        patch.setenv("SDPO_BACKEND", "emulated")  # logits_logps has no argument for it
        yield


def case_of(*shape: int, **options) -> Case:
    """A random case that the emulated backend must serve."""
    chosen = {"backend": "emulated"} | options.pop("settings", {})
    return random_case(*shape, settings=chosen, **options)


@st.composite
def cases(draw) -> Case:
    """Any small shape and option."""
    n_rows, width, n_columns = draw(st.integers(1, 12)), draw(st.integers(1, 40)), draw(st.integers(1, 200))
    case = case_of(
        n_rows, width, n_columns,
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        bias=draw(st.booleans()),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        scale=draw(st.sampled_from([0.1, 1.0, 4.0])),
        temperature=draw(st.sampled_from([1.0, 0.7])),
        logit_scale=draw(st.sampled_from([1.0, -1.5])),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        trains=tuple(draw(st.sets(st.sampled_from(["hidden", "weight", "bias"])))),
    )  # fmt: skip
    case.settings["stash_bytes"] = draw(st.sampled_from([0, 4 * n_rows * 64, ALL]))
    case.settings["rows"] = draw(st.sampled_from([None, scored_rows(case.targets)]))
    return case


@settings(max_examples=100)
@given(cases())
def test_values_and_gradients_of_every_option(case):
    check(case, case.ours(), factor=4.0)


@pytest.mark.parametrize("stash_bytes", [0, 4 * 9 * 128, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("columns", [1, 63, 65, 700])
def test_vocabularies_that_are_no_multiple_of_a_block(columns, trains, stash_bytes):
    case = case_of(9, 17, columns, bias=True, trains=trains, settings={"stash_bytes": stash_bytes})
    check(case, case.ours(), factor=4.0)


@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
def test_more_columns_than_a_slab(trains):
    case = case_of(2, 3, 8192 + 700, bias=True, trains=trains)
    check(case, case.ours(), factor=4.0)


@pytest.mark.parametrize("stash_bytes", [0, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
def test_all_logits_negative(trains, stash_bytes):
    case = case_of(9, 8, 70, bias=True, trains=trains, settings={"stash_bytes": stash_bytes})
    case.bias -= 40
    check(case, case.ours(), factor=4.0)


@pytest.mark.parametrize("stash_bytes", [0, 4 * 10 * 64, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("gap", [100.0, 160.0, 400.0])
def test_rows_in_and_out_of_range(gap, trains, stash_bytes):
    case = case_of(10, 12, 150, bias=True, trains=trains, settings={"stash_bytes": stash_bytes})
    case.bias[7] = -gap
    case.targets[::2] = 7
    ours = case.ours()
    check(case, ours, factor=4.0)
    assert ours["logps"][0] < 12 - gap


@pytest.mark.parametrize("gap", [12.0, 25.0, 40.0])
def test_near_certainty_nothing_is_lost(gap):
    logits = torch.tensor([gap, 0.0, -0.5, 0.25, 1.0])
    case = Case(torch.ones(1, 1), logits.unsqueeze(1), torch.tensor([0]), settings={"backend": "emulated"})
    ours, z = case.ours(), logits.double()
    rest = torch.sigmoid(z[1:].logsumexp(0) - z[0])
    assert abs(ours["d_weight"][0].item() / rest.item() - 1) <= gap * EPS
    assert abs(-ours["logps"].item() / torch.log1p(rest / (1 - rest)).item() - 1) <= gap * EPS


@pytest.mark.parametrize("trains", [("hidden", "weight"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize(
    "logits",
    [
        [torch.nan, 0.0, 1.0], [0.0, 1.0, torch.nan], [torch.inf, 0.0, 1.0], [0.0, torch.inf, 1.0],
        [-torch.inf, 0.0, torch.nan], [-torch.inf, -torch.inf, -torch.inf],
    ],
    ids=str,
)  # fmt: skip
def test_nan_where_float64_has_nan(logits, trains):
    case = Case(torch.ones(1, 1), torch.tensor(logits).unsqueeze(1), torch.tensor([0]), trains=trains)
    case.settings = {"backend": "emulated"}
    ours = case.ours()
    assert ours["logps"].isnan().all()
    assert ours[f"d_{trains[-1]}"].isnan().all()


def test_a_masked_target_and_masked_columns():
    case = case_of(6, 5, 60, bias=True, trains=("hidden", "weight"))
    case.bias[[0, 1, 40]] = -torch.inf
    case.targets[:] = torch.tensor([2, 3, 4, 5, 6, 0])
    ours, truth = case.ours(), case.truth()
    assert ours["logps"][5] == -torch.inf
    assert error(ours["logps"][:5], truth["logps"][:5]) <= 8 * EPS * truth["logps"][:5].abs().max()
    assert error(ours["d_weight"], truth["d_weight"]) <= 64 * EPS * truth["d_weight"].abs().max()


def test_log_probs_have_the_same_bits_whatever_is_kept():
    case = case_of(11, 30, 200, scale=3.0)
    found = []
    for trains, stash in (((), 0), (("hidden", "weight"), ALL), (("hidden", "weight"), 6000), (("hidden",), 0)):
        case.trains, case.settings["stash_bytes"] = trains, stash
        found.append(case.ours()["logps"])
    assert all(torch.equal(logps, found[0]) for logps in found[1:])
    with torch.no_grad():
        alone = linear_logps(case.hidden[3:4], case.weight, case.targets[3:4], backend="emulated").logps
    assert torch.equal(alone, found[0][3:4])


@pytest.mark.parametrize("stash_bytes", [0, ALL])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_with_a_float32_head(hidden_dtype, stash_bytes):
    """W is converted chunk by chunk, and its gradient is not rounded."""
    case = case_of(9, 16, 130, masked=0.2, settings={"stash_bytes": stash_bytes})
    case.hidden = case.hidden.to(hidden_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = case.ours()
    by_hand = case_of(9, 16, 130, masked=0.2, settings={"stash_bytes": stash_bytes})
    by_hand.hidden, by_hand.weight = case.hidden.bfloat16(), by_hand.weight.bfloat16()
    wanted = by_hand.ours()
    assert torch.equal(ours["logps"], wanted["logps"])
    assert ours["d_weight"].dtype == torch.float32
    assert torch.equal(ours["d_weight"].bfloat16(), wanted["d_weight"])
    assert ours["d_hidden"].dtype == hidden_dtype
    assert error(ours["d_hidden"], wanted["d_hidden"]) <= 2**-8 * wanted["d_hidden"].abs().max()


def test_strided_tensors():
    case = case_of(9, 16, 130, bias=True)
    expected = case.ours()
    case.hidden = torch.nn.functional.pad(case.hidden, (3, 2))[:, 3:-2]
    case.weight = case.weight.t().contiguous().t()
    case.bias = torch.stack([case.bias, case.bias], 1)[:, 0]
    for name, value in case.ours().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("stash_bytes", [0, 4 * 6 * 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base_trains", [False, True])
def test_a_lora_on_the_head(base_trains, dtype, stash_bytes):
    check_lora("emulated", dtype, stash_bytes, base_trains, temperature=0.8)


@pytest.mark.parametrize("keep", [Keep.nothing(), Keep.columns(64), Keep.columns(128), Keep.direction()])
def test_opcheck(keep):
    case = random_case(5, 4, 100, bias=True)
    frozen = keep.is_direction
    args = (
        case.hidden.requires_grad_(), case.weight.requires_grad_(not frozen), case.targets, case.bias, None,
        1.5, 20.0, 0.8, "", torch.float32, "emulated", keep.encode(), None, None, 0.0, False,
    )  # fmt: skip
    torch.library.opcheck(logps_op.linear_logps_op, args)


# --- existing logits ---------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(1, 5), st.sampled_from([1, 7, 8, 100, 2500]), st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1.0, 0.7, 3.0]), st.sampled_from([0.1, 3.0, 60.0]), st.booleans(), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_logits(n_rows, n_columns, dtype, temperature, scale, inplace, aligned, seed):
    generator = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(n_rows, n_columns, generator=generator)).to(dtype)
    targets = torch.randint(n_columns, (n_rows,), generator=generator)
    targets[torch.rand(n_rows, generator=generator) < 0.3] = -100
    grad = torch.randn(n_rows, generator=generator)
    leaf = z.clone().requires_grad_()
    given = leaf * 1
    inplace = inplace and aligned  # it requires contiguous logits
    if not aligned:
        given = torch.nn.functional.pad(given, (1, 0))[:, 1:]
    logps = logits_logps(given, targets, temperature=temperature, inplace_backward=inplace)
    logps.backward(grad)
    exact = z.double().requires_grad_()
    right = target_logps(exact / temperature, targets)
    right.backward(grad.double())
    assert error(logps, right) <= 8 * EPS * max(1.0, float(right.abs().max()))
    steepness = max(1.0, float(z.abs().max()) / temperature)  # how far off a rounded exponent is
    rounding = 4 * EPS * steepness + (0 if dtype == torch.float32 else 2**-8)
    assert error(leaf.grad, exact.grad) <= rounding * float(grad.abs().max()) / temperature


def test_masked_and_nan_logits():
    z = torch.zeros(5, 600)
    z[0, 5::3] = -torch.inf
    z[1, 1:] = -torch.inf
    z[2, 0] = -torch.inf
    z[3, 0], z[3, 300], z[3, 301:] = -torch.inf, torch.nan, -torch.inf
    z[4, 0] = torch.inf
    logps = logits_logps(z, torch.zeros(5, dtype=torch.int64))
    right = z.double().log_softmax(-1)[:, 0]
    assert abs(logps[0] - right[0]) <= 8 * EPS * abs(right[0])
    assert logps[1:3].tolist() == [0.0, -torch.inf]
    assert logps[3:].isnan().all()


# --- the pair epilogue ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(pair_cases(st.sampled_from([1, 2, 5, 40])))
def test_the_pair_epilogue(case):
    check_pair_epilogue("emulated", **case)


@settings(max_examples=40)
@given(cases(), st.sets(st.integers(1, 199), max_size=3))
def test_slices_of_the_vocabulary(case, borders):
    """Any cut of the columns gives the values and gradients of the whole."""
    case.settings = {"backend": "emulated", "stash_bytes": int(case.settings["stash_bytes"] != 0)}
    starts = [0, *sorted(border for border in borders if border < len(case.weight))]
    check(case, case.ours(Sliced(starts)), slack=8)


@pytest.mark.parametrize("stash_bytes", [0, 1])
def test_slices_with_rows_out_of_range(stash_bytes):
    case = case_of(6, 8, 200, scale=80.0, bias=True, settings={"stash_bytes": stash_bytes})
    assert case.plain()["logps"].min() < -100
    cut = case.ours(Sliced([0, 70, 128]))
    if stash_bytes:
        check(case, cut, slack=8)

    # without a stash, a row's sum and its S come from products in different orders: 2e-5 of logits of 300
    case.settings["stash_bytes"] = ALL * stash_bytes
    for name, whole in case.ours().items():
        torch.testing.assert_close(cut[name], whole, rtol=1e-5, atol=1e-5)


def test_one_and_two_slices_give_the_same_log_probs():
    case = case_of(33, 16, 9000, bias=True, scale=3.0, trains=(), settings={"stash_bytes": 0})
    whole = case.ours()["logps"]
    for starts in ([0], [0, 8192]):  # sums are of slabs of 8192 columns
        assert torch.equal(case.ours(Sliced(starts))["logps"], whole)
