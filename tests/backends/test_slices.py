"""Slices of the vocabulary: the same values and gradients as the whole, whoever has which columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_kernels.backends import BACKENDS, precision
from sdpo_kernels.backends.base import EXTRAS
from tests.reference import Case, check, chunk_columns, random_case, skip_unless_served
from tests.sliced import Sliced

pytestmark = pytest.mark.usefixtures("each_backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@st.composite
def cases(draw, dtype: torch.dtype) -> Case:
    """Any shape, any option."""
    n_rows, width, n_columns = draw(st.integers(1, 12)), draw(st.integers(1, 20)), draw(st.integers(1, 200))
    case = random_case(
        n_rows, width, n_columns,
        seed=draw(st.integers(0, 2**31)),
        dtype=dtype,
        bias=draw(st.booleans()),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        scale=draw(st.sampled_from([0.1, 1.0, 4.0])),
        temperature=draw(st.sampled_from([1.0, 0.7])),
        logit_scale=draw(st.sampled_from([1.0, -1.5])),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        outputs=tuple(draw(st.sets(st.sampled_from(EXTRAS)))),
        trains=tuple(draw(st.sets(st.sampled_from(["hidden", "weight", "bias"])))),
        settings={"stash_bytes": draw(st.sampled_from([0, 1]))},
    )  # fmt: skip
    if "entropy" in case.outputs and draw(st.booleans()):
        case.grad_entropy = torch.randn(n_rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_of_any_cut(dtype, each_backend):
    skip_unless_served(each_backend, dtype)

    @given(cases(dtype), st.sets(st.integers(1, 199), max_size=4), st.sampled_from([3, 64, 1000]))
    def holds(case, borders, columns):
        starts = [0, *sorted(border for border in borders if border < len(case.weight))]
        with chunk_columns(columns):
            ours = case.ours(Sliced(starts))
        check(case, ours, slack=256 if dtype == torch.float64 else 4)

    holds()


@pytest.mark.parametrize("stash_bytes", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_one_two_and_four_slices_give_the_same_bits(scale, dtype, stash_bytes, each_backend):
    """Where slices begin at multiples of 64 columns; dW and db, too. dX is a sum over the slices."""
    if each_backend != "native":
        pytest.skip(f"{each_backend} sums in chunks, whose borders move with the slices")
    case = random_case(
        257, 32, 1000, dtype=dtype, bias=True, scale=scale, settings={"stash_bytes": stash_bytes, "backend": "native"}
    )
    whole = case.ours(Sliced([0]))
    for starts in ([0, 512], [0, 256, 512, 768], [0, 64, 960]):
        cut = case.ours(Sliced(starts))
        for name in ("logps", "d_weight", "d_bias"):
            assert torch.equal(cut[name], whole[name]), (starts, name)

    case.settings["stash_bytes"] = 10**12 * stash_bytes
    own = case.ours()
    for name in ("logps", "d_hidden", "d_weight", "d_bias"):
        assert torch.equal(own[name], whole[name]), name


def test_rows_out_of_range_and_infinite_logits(each_backend):
    """A target 200 nats below the rest, one of −∞, a slice of −∞ alone, and all of it in one row."""
    hidden = torch.eye(4)
    weight = torch.zeros(256, 4)
    weight[:, 0] = torch.linspace(-3, 3, 256)
    weight[7, 0] = -200.0
    weight[7, 1] = -torch.inf
    weight[64:128, 2] = -torch.inf
    weight[:, 3] = torch.linspace(-300, 300, 256)
    hidden = torch.diag(torch.ones(4))
    targets = torch.tensor([7, 7, 130, 1])
    case = Case(hidden, weight, targets, trains=("hidden",), settings={"backend": each_backend})

    # 0 · −∞ is NaN in a plain product: each row has one column of the head
    found = [_alone(case, row, starts) for starts in ([0], [0, 64, 128]) for row in range(4)]
    for row in range(4):
        truth = weight[:, row].double().log_softmax(0)[targets[row]]
        for logp in (found[row], found[4 + row]):
            torch.testing.assert_close(logp.double(), truth, rtol=1e-6, atol=0)


def _alone(case: Case, row: int, starts: list[int]) -> torch.Tensor:
    this = slice(row, row + 1)
    weight = case.weight[:, this].contiguous()
    one = Case(case.hidden[this, this], weight, case.targets[this], settings=case.settings, trains=())
    return one.ours(Sliced(starts))["logps"][0]


@pytest.mark.parametrize("stash_bytes", [0, 1])
def test_gradients_of_rows_out_of_range(stash_bytes, each_backend):
    case = random_case(6, 8, 200, scale=80.0, bias=True, settings={"stash_bytes": stash_bytes, "backend": each_backend})
    assert case.plain()["logps"].min() < -100
    check(case, case.ours(Sliced([0, 70, 128])))


@pytest.mark.parametrize("stash_bytes", [0, 1])
def test_gradients_if_a_slice_is_minus_infinity_with_its_targets(stash_bytes, each_backend):
    """Columns that a bias masks, targets among them, and logits so low that exp(−lse) is beyond float32."""
    case = random_case(6, 8, 200, bias=True, settings={"stash_bytes": stash_bytes, "backend": each_backend})
    case.bias -= 300
    case.bias[64:128] = -torch.inf
    case.targets[:2] = torch.tensor([70, 100])
    case.settings["stash_bytes"] = 10**12 * stash_bytes
    whole = case.ours()
    assert whole["logps"].min() == -torch.inf
    assert all(bool(whole[name].isfinite().all()) for name in ("d_hidden", "d_weight", "d_bias"))
    for name, cut in case.ours(Sliced([0, 64, 128])).items():
        torch.testing.assert_close(cut, whole[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trains", [("hidden",), ("weight",), ("hidden", "weight")], ids="-".join)
def test_a_gradient_that_is_not_needed_is_not_computed(trains, each_backend, monkeypatch):
    """Neither a product nor a copy of the hidden states in float32, which a part of dX is summed from."""
    case = random_case(24, 16, 200, dtype=torch.bfloat16, trains=trains, settings={"backend": each_backend})
    backend, seen, shapes = BACKENDS[each_backend], [], []
    backward, matmul = backend.backward, precision.matmul

    def recorded(call, *arguments):
        shapes.clear()
        found = backward(call, *arguments)
        seen.append((call.hidden.dtype, found))
        return found

    monkeypatch.setattr(backend, "backward", recorded)
    monkeypatch.setattr(precision, "matmul", lambda a, b: (shapes.append((len(a), b.shape[1])), matmul(a, b))[1])
    case.ours(Sliced([0, 64]))
    assert len(seen) == 2
    for dtype, found in seen:
        assert dtype == (torch.float32 if "hidden" in trains else torch.bfloat16)
        assert (found.hidden is not None, found.weight is not None) == ("hidden" in trains, "weight" in trains)
    if each_backend == "eager":
        products = {(24, 136)} | ({(24, 16)} if "hidden" in trains else set())
        assert set(shapes) == products | ({(136, 16)} if "weight" in trains else set())
