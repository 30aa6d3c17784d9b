"""The eager backend and the arithmetic of its chunks, called directly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_kernels.backends import AUTO_ORDER, BACKENDS, choose_backend, eager, get_backend
from sdpo_kernels.backends.base import EXTRAS, HeadCall, Keep, Needs, Request, Saved
from sdpo_kernels.backends.chunk_math import RunningSums
from sdpo_kernels.backends.eager import EagerBackend, vocabulary_chunks
from sdpo_kernels.head import Head
from tests.reference import chunk_columns, error, extras_of, logits_of, random_case, size, target_logps
from tests.sliced import Sliced

EPS = torch.finfo(torch.float32).eps
HALF = torch.finfo(torch.float16).eps
KEEPS = (Keep.nothing(), Keep.columns(64), Keep.columns(320), Keep.columns(1000), Keep.direction())


def head_call(n_rows: int = 6, width: int = 5, n_columns: int = 300, dtype=torch.float32, **options) -> HeadCall:
    """A call of random numbers with every row scored."""
    case = random_case(n_rows, width, n_columns, dtype=dtype, bias=True)
    values = {"outputs": (), "kept_rows": n_rows, "head": Head(), **options}
    return HeadCall(case.hidden, case.weight, case.bias, case.targets, dtype=dtype, **values)


def test_it_is_registered_and_chosen():
    request = Request(torch.device("cpu"), torch.float16, torch.float16, Head(), EXTRAS)
    assert get_backend("eager") is BACKENDS["eager"]
    assert choose_backend("eager", request).name == "eager"
    assert AUTO_ORDER[-1] == "eager"  # it serves everything, so nothing may come after it
    assert BACKENDS["eager"].supports(request) is None


@given(
    st.integers(0, 40), st.integers(1, 30), st.integers(1, 3000), st.floats(0, 1),
    st.sampled_from([1, 100, 10**5]), st.sampled_from([1, 7, 128]),
)  # fmt: skip
def test_chunks_cover_the_vocabulary_once_and_stop_at_the_border(n_rows, width, n_columns, share, elements, multiple):
    call = HeadCall(
        torch.empty(n_rows, width, device="meta"), torch.empty(n_columns, width, device="meta"), None,
        torch.empty(0), Head(), torch.float32, (), n_rows,
    )  # fmt: skip
    border = int(share * n_columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "CHUNK_ELEMENTS", elements)
        patch.setattr(eager, "CHUNK_MULTIPLE", multiple)
        chunks = list(vocabulary_chunks(call, border))
    starts, stops = zip(*chunks, strict=True)
    assert starts[0] == 0
    assert stops[-1] == n_columns
    assert starts[1:] == stops[:-1]
    assert all(start < stop for start, stop in chunks)
    assert border in {0, *stops}
    widest = max(stop - start for start, stop in chunks)
    assert widest <= max(multiple, elements // (n_rows + width))
    assert all((stop - start) % multiple == 0 or stop in (border, n_columns) for start, stop in chunks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_have_the_same_bits_whatever_is_kept(dtype):
    call = head_call(33, 16, 1000, dtype)
    with chunk_columns(300):
        answers = [EagerBackend().forward(call, keep) for keep in KEEPS]
    for answer in answers[1:]:
        assert torch.equal(answer.logps, answers[0].logps)
        assert torch.equal(answer.state, answers[0].state)


@pytest.mark.parametrize("keep", [64, 192, 320])
def test_the_stash_holds_logits_and_zeros_around_them(keep):
    call = head_call(kept_rows=9, head=Head(softcap=4.0))
    with chunk_columns(100):
        kept = EagerBackend().forward(call, Keep.columns(keep)).kept
    z = logits_of(call.hidden, call.weight, call.bias, softcap=4.0)
    assert kept.shape == (9, keep)
    assert error(kept[:6, :300], z[:, :keep]) <= 8 * EPS * size(z)
    assert not kept[6:].any()
    assert not kept[:, 300:].any()


def test_what_is_kept_for_a_frozen_head_is_the_gradient_up_to_1_minus_p():
    call = head_call(kept_rows=8, dtype=torch.float64)
    answer = EagerBackend().forward(call, Keep.direction())
    hidden = call.hidden.clone().requires_grad_()
    target_logps(logits_of(hidden, call.weight, call.bias), call.targets).sum().backward()
    rest = -torch.expm1(answer.logps)
    assert error(answer.kept[:6] * rest.unsqueeze(1), hidden.grad) < 1e-14
    assert not answer.kept[6:].any()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_needed_gradients_are_computed(needs):
    call = head_call()
    answer = EagerBackend().forward(call, Keep.nothing())
    saved = Saved(answer.logps, answer.state, None, None, None, Keep.nothing())
    found = EagerBackend().backward(call, saved, torch.ones(6), None, Needs(*needs))
    assert tuple(grad is not None for grad in found) == needs


def test_the_inputs_are_not_modified():
    call = head_call(outputs=EXTRAS, head=Head(softcap=3.0, temperature=2.0))
    before = [t.clone() for t in (call.hidden, call.weight, call.bias, call.targets)]
    EagerBackend().forward(call, Keep.columns(64))
    EagerBackend().forward(call, Keep.direction())
    for mine, old in zip((call.hidden, call.weight, call.bias, call.targets), before, strict=True):
        assert torch.equal(mine, old)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**31), st.sampled_from([1.0, 30.0, 400.0]))
def test_running_sums_over_any_chunks_are_those_of_the_whole(widths, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(5, sum(widths), generator=generator, dtype=torch.float64)
    targets = torch.randint(sum(widths), (5,), generator=generator)
    sums, start = RunningSums(5, z.device, torch.float64, EXTRAS), 0
    for width in widths:
        part = z[:, start : start + width].clone()
        probs, shrink = sums.add(part, targets - start)
        assert ((probs >= 0) & (probs <= 1)).all()
        assert ((shrink >= 0) & (shrink <= 1)).all()
        start += width
    answer = sums.finish(sum(widths), None)
    assert error(answer.logps, target_logps(z, targets)) <= 1e-12 * scale
    assert error(answer.state[:, 0], z.logsumexp(1)) <= 1e-12 * scale
    for name, truth in extras_of(z, targets).items():
        assert error(getattr(answer, name), truth) <= 1e-12 * scale, name


# --- float16 as tensor cores take it ---------------------------------------------------------------------------------


@pytest.fixture
def multiplies_float16(monkeypatch):
    """As on CUDA: float16 operands go into the products as they are, and are summed in float32."""
    mm = torch.mm
    monkeypatch.setattr(eager.precision, "multiplies", lambda device, dtype: dtype == torch.float16)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype=None: mm(a.float(), b.float()))


@pytest.mark.parametrize("outputs", [(), ("entropy",)])
@pytest.mark.parametrize("grad", [1e-9, 1.0, 1e5])
@pytest.mark.usefixtures("multiplies_float16")
def test_no_float16_coefficient_is_lost(grad, outputs):
    """Most of a vocabulary's probabilities are below what float16 has; loss scales may be above it."""
    case = random_case(6, 8, 3000, dtype=torch.float16, outputs=outputs)
    case.hidden.mul_(8)
    case.hidden, case.weight = case.hidden.float(), case.weight.float()
    case.grad = torch.full((6,), grad, dtype=torch.float64)
    case.grad_entropy = case.grad if outputs else None
    case.settings = {"backend": "eager"}
    exact = case.ours()
    with torch.autocast("cpu", dtype=torch.float16):
        ours = case.ours()

    assert error(ours["logps"], exact["logps"]) <= 4 * EPS
    for name in ("d_hidden", "d_weight"):
        sizes = exact[name].norm(dim=1)
        errors = (ours[name] - exact[name]).norm(dim=1) / sizes
        assert sizes.max() / sizes.min() > (10**6 if name == "d_weight" else 1)
        assert errors[sizes > 2.0**-26 * sizes.max()].max() <= 4 * HALF
        assert errors.max() < 0.1  # the smallest have fewer bits, but none is lost


@pytest.mark.usefixtures("multiplies_float16")
def test_a_frozen_head_in_float16():
    case = random_case(6, 8, 3000, dtype=torch.float16, trains=("hidden",), temperature=1e-3)
    case.settings = {"backend": "eager"}
    exact = replace(case, hidden=case.hidden.float(), weight=case.weight.float()).ours()["d_hidden"]
    assert error(case.ours()["d_hidden"].float() / exact.abs().max(), exact / exact.abs().max()) <= 4 * HALF


@given(st.floats(1e-30, 1e30), st.sampled_from([torch.float32, torch.float16]))
def test_the_scale_is_a_power_of_2_that_fills_float16(bound, dtype):
    scale = eager._scale(dtype, torch.tensor(bound))
    if dtype == torch.float32:
        assert scale == 1.0
        return
    assert math.frexp(float(scale))[0] == 0.5
    assert 2**14 <= bound * float(scale) <= 2**15 * (1 + EPS)


@pytest.mark.parametrize("bound", [0.0, torch.nan, torch.inf])
def test_a_bound_that_is_no_number_scales_nothing(bound):
    assert eager._scale(torch.float16, torch.tensor(bound)) == 1.0


@pytest.mark.usefixtures("multiplies_float16")
def test_entropy_in_a_float16_slice_of_one_column():
    """The entropy is that of all columns, so the gradient may exceed what the slice's own could."""
    case = random_case(3, 4, 200_000, dtype=torch.float16, outputs=("entropy",), scale=0.0)
    case.hidden.fill_(1.0)
    case.weight[0] = math.log(200_000) / 4  # about half the probability
    case.targets[:] = 5
    case.grad, case.grad_entropy = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1.99, dtype=torch.float64)
    case.settings = {"backend": "eager"}
    sliced, truth = case.ours(Sliced([0, 1])), case.truth()
    assert error(sliced["d_hidden"], truth["d_hidden"]) <= 4 * HALF * truth["d_hidden"].abs().max()
    assert error(sliced["d_weight"][0], truth["d_weight"][0]) <= 4 * HALF * truth["d_weight"][0].abs().max()
