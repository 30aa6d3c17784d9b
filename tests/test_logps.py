"""linear_logps: values and gradients of every option against float64, scored rows, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_kernels import backends, linear_logps, logps_op
from sdpo_kernels.backends.base import EXTRAS, Keep
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows
from tests.lora_cases import check_lora
from tests.reference import Case, check, chunk_columns, random_case, scored_rows, skip_unless_served

pytestmark = pytest.mark.usefixtures("each_backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ALL = 10**12  # stash_bytes that holds everything


@st.composite
def cases(draw, dtype=torch.float32, extras: bool = True) -> Case:
    """Any shape, any option, any set of tensors that train."""
    n_rows, width = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    n_columns = draw(st.integers(1, 200))
    trains = draw(st.sets(st.sampled_from(["hidden", "weight", "bias"])))
    case = random_case(
        n_rows,
        width,
        n_columns,
        seed=draw(st.integers(0, 2**31)),
        dtype=dtype,
        bias=draw(st.booleans()),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        scale=draw(st.sampled_from([0.1, 1.0, 4.0])),
        temperature=draw(st.sampled_from([1.0, 0.7, 2.5])),
        logit_scale=draw(st.sampled_from([1.0, 0.25, -1.5])),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        outputs=tuple(draw(st.sets(st.sampled_from(EXTRAS)))) if extras else (),
        trains=tuple(trains),
    )
    stash = draw(st.sampled_from(["auto", 0, 4 * n_rows * 64, ALL]))
    case.settings = {"stash_bytes": stash, "rows": draw(st.sampled_from([None, scored_rows(case.targets)]))}
    if "entropy" in case.outputs and draw(st.booleans()):
        case.grad_entropy = torch.randn(n_rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if draw(st.booleans()):
        case.grad[draw(st.integers(0, n_rows - 1))] = 0.0
    return case


def test_no_other_backend_serves_in_place_of_the_one_under_test(each_backend, monkeypatch):
    monkeypatch.setattr(backends.BACKENDS[each_backend], "supports", lambda request: "it is broken")
    case = random_case(3, 4, 20)
    with pytest.raises(ValueError, match="backend: none supports this call"):
        case.ours()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_of_every_option(dtype, each_backend):
    skip_unless_served(each_backend, dtype)

    @given(cases(dtype, extras=each_backend == "eager"), st.sampled_from([3, 64, 100, 1000]))
    def holds(case, columns):
        with chunk_columns(columns):
            ours = case.ours()
        check(case, ours, slack=256 if dtype == torch.float64 else 4)  # float64 ground truth has roundings of its own
        for name in case.trains:
            if (grad := ours.get(f"d_{name}")) is not None:
                assert grad.dtype == dtype

    holds()


@pytest.mark.parametrize("stash_bytes", [0, 4 * 50 * 640, ALL, "auto"])
@pytest.mark.parametrize("trains", [("hidden", "weight"), ("hidden",), ("weight",)], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_middling_head_at_its_own_chunk_size(dtype, trains, stash_bytes):
    case = random_case(
        67, 65, 1537, dtype=dtype, masked=0.25, scale=3.0, trains=trains, settings={"stash_bytes": stash_bytes}
    )
    check(case, case.ours(), factor=2.0)


def test_what_the_forward_keeps_for_each_setting(monkeypatch):
    monkeypatch.setattr(backends, "AUTO_ORDER", ("eager",))
    seen = []
    op = logps_op.linear_logps_op
    monkeypatch.setattr(logps_op, "linear_logps_op", lambda *args: seen.append(args[11]) or op(*args))

    def keep(trains: tuple[str, ...], stash_bytes: int | str, outputs: tuple[str, ...] = ()) -> Keep:
        random_case(8, 4, 200, trains=trains, outputs=outputs, bias=True, settings={"stash_bytes": stash_bytes}).ours()
        return Keep.decode(seen.pop())

    both = ("hidden", "weight")
    assert keep(both, 0) == Keep.nothing()
    assert keep(both, 4 * 8 * 150) == Keep.columns(128)
    assert keep(both, ALL) == Keep.columns(256)  # 200, in whole blocks of 64
    assert keep(both, "auto") == Keep.columns(64)  # min(2·N·V, 4·V·H) = 3200 bytes, 32 per column
    assert keep(("bias",), ALL) == Keep.columns(256)
    assert keep(("hidden",), 0) == Keep.direction()
    assert keep(("hidden",), 0, ("entropy",)) == Keep.nothing()  # its gradient may be needed
    assert keep((), ALL) == Keep.nothing()
    with torch.no_grad():
        linear_logps(torch.zeros(1, 1, requires_grad=True), torch.zeros(2, 1), torch.tensor([0]))
    assert Keep.decode(seen.pop()) == Keep.nothing()


@pytest.mark.parametrize("stash_bytes", [0, ALL])
@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",), ()], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reference_with_the_same_head_is_scored_in_the_same_call(dtype, trains, stash_bytes):
    """The bits are those of separate calls, and no gradient flows into the reference."""
    case = random_case(9, 12, 200, dtype=dtype, masked=0.3, bias=True, trains=trains)
    case.settings["stash_bytes"] = stash_bytes
    ref_hidden = random_case(9, 12, 200, dtype=dtype, seed=1).hidden.requires_grad_()
    with torch.no_grad():
        ref = linear_logps(ref_hidden, case.weight, case.targets, bias=case.bias, **case.head).logps
    alone = case.ours()
    case.settings["ref_hidden"] = ref_hidden
    both = case.ours()
    assert torch.equal(both.pop("ref_logps"), ref)
    for name, value in alone.items():
        assert value is both[name] or torch.equal(both[name], value), name
    assert ref_hidden.grad is None


@pytest.mark.parametrize("stash_bytes", [0, ALL])
@pytest.mark.parametrize("base_trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lora_on_the_head(dtype, base_trains, stash_bytes, each_backend):
    check_lora(each_backend, dtype, stash_bytes, base_trains, temperature=0.8, softcap=5.0)


def test_a_gradient_of_entropy_through_a_lora_on_the_head(each_backend):
    check_lora(each_backend, torch.float32, 0, False, outputs=("entropy",))


def test_the_head_with_its_lora_is_not_kept_for_the_backward():
    hidden, weight, lora_b = torch.randn(4, 10), torch.randn(90, 8), torch.randn(90, 2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_logps(hidden, weight, torch.arange(4), lora_b=lora_b, stash_bytes=0)
    assert torch.Size([90, 2]) in kept
    assert torch.Size([90, 10]) not in kept


def test_a_mismatched_reference_is_an_error():
    with pytest.raises(
        ValueError, match=r"ref_hidden: was float32 of shape \[2, 4\], must be float32 of shape \[3, 4\]"
    ):
        linear_logps(
            torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3, dtype=torch.int64), ref_hidden=torch.zeros(2, 4)
        )


def test_float32_hidden_bias_with_a_bfloat16_head():
    case = random_case(5, 6, 70, dtype=torch.bfloat16, bias=True)
    case.bias = torch.randn(70)
    ours = case.ours()
    check(case, ours)
    assert ours["d_bias"].dtype == torch.float32


@pytest.mark.parametrize("rows_given", [False, True])
def test_unscored_rows_get_0_and_their_garbage_has_no_effect(rows_given):
    case = random_case(6, 5, 40, bias=True, outputs=EXTRAS, grad_entropy=torch.ones(6))
    case.targets[[1, 4]] = IGNORE_INDEX
    clean = case.ours()
    case.hidden[[1, 4]] = torch.nan
    case.settings = {"rows": scored_rows(case.targets)} if rows_given else {}
    dirty = case.ours()
    for name, value in dirty.items():
        if name == "d_hidden":
            assert torch.equal(value[[1, 4]], torch.zeros(2, 5))
        assert torch.equal(value, clean[name]), name
        if value.shape == (6,):
            assert not value[[1, 4]].any()


def test_everything_masked():
    case = random_case(4, 3, 10, masked=1.0, bias=True, outputs=EXTRAS)
    for value in case.ours().values():
        assert not value.any()


def test_a_vocabulary_of_one_word_is_certain():
    case = random_case(3, 4, 1, bias=True, outputs=EXTRAS, grad_entropy=torch.ones(3))
    ours = case.ours()
    assert ours["is_top1"].all()
    for name in ("logps", "entropy", "log_sum_sq_probs", "d_hidden", "d_weight", "d_bias"):
        assert not ours[name].any(), name


@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
def test_rows_of_coefficient_0_get_no_gradient_even_from_nan(trains):
    case = random_case(5, 4, 30, bias=True, trains=trains)
    case.grad[[0, 3]] = 0.0
    case.hidden[3] = torch.nan
    ours = case.ours()
    assert ours["logps"][3].isnan()
    assert torch.equal(ours["d_hidden"][[0, 3]], torch.zeros(2, 4))
    assert all(ours[f"d_{name}"].isfinite().all() for name in trains)


def test_unrequested_outputs_are_none_and_only_log_probs_and_entropy_carry_gradients():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.tensor([0, 8, -100])
    assert linear_logps(hidden, weight, targets)[1:] == (None,) * 5
    out = linear_logps(hidden, weight, targets, outputs=EXTRAS)
    assert [value.requires_grad for value in out[:5]] == [True, True, False, False, False]
    assert out.is_top1.dtype == torch.bool


def test_equal_logits_are_all_top():
    out = linear_logps(torch.ones(2, 1), torch.tensor([[1.0], [3.0], [3.0]]), torch.tensor([1, 0]), outputs=["is_top1"])
    assert out.is_top1.tolist() == [True, False]


@pytest.mark.parametrize("trains", [("hidden", "weight"), ("weight",)], ids="+".join)
def test_a_row_with_one_of_two_coefficients_0_still_counts(trains):
    case = random_case(3, 4, 20, outputs=("entropy",), trains=trains)
    case.grad = torch.tensor([0.0, 1.0, 0.0])
    case.grad_entropy = torch.tensor([1.0, 0.0, 0.0])
    check(case, case.ours())


def test_order_and_repetition_of_outputs_do_not_matter():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 8, 1])
    one = linear_logps(hidden, weight, targets, outputs=["entropy", "is_top1"])
    other = linear_logps(hidden, weight, targets, outputs=["is_top1", "entropy", "entropy"])
    for a, b in zip(one, other, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_a_second_derivative_raises():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    logps = linear_logps(hidden, weight, torch.tensor([1, 2, 3])).logps
    (grad,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_backward_twice_through_a_retained_graph():
    case = random_case(5, 4, 30)
    hidden = case.hidden.requires_grad_()
    logps = linear_logps(hidden, case.weight.requires_grad_(), case.targets, stash_bytes=ALL).logps
    first = torch.autograd.grad(logps.sum(), (hidden, case.weight), retain_graph=True)
    second = torch.autograd.grad(logps.sum(), (hidden, case.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_inputs():
    case = random_case(6, 10, 40)
    strided = dataclasses.replace(case, hidden=case.hidden.T.contiguous().T, weight=case.weight.T.contiguous().T)
    assert not strided.hidden.is_contiguous()
    check(case, strided.ours())


def test_repeated_calls_give_the_same_bits():
    case = random_case(33, 17, 900, dtype=torch.bfloat16, masked=0.3)
    one, other = case.ours(), case.ours()
    assert all(torch.equal(one[name], other[name]) for name in ("logps", "d_hidden", "d_weight"))


# --- errors -----------------------------------------------------------------------------------------------------


def call(**changes):
    """linear_logps on a valid call with `changes`."""
    inputs = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(9, 3), "targets": torch.tensor([0, 8, -100, 3])}
    inputs |= changes
    return linear_logps(inputs.pop("hidden"), inputs.pop("weight"), inputs.pop("targets"), **inputs)


def rows_of(index: torch.Tensor) -> ScoredRows:
    return ScoredRows(index, torch.zeros_like(index), torch.tensor([index.numel()]))


META = torch.device("meta")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 4, 3)}, r"hidden: was of shape \[2, 4, 3\], must be \[N, H\]"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.int64)}, r"hidden: was of dtype torch.int64, must be one of"),
        ({"weight": torch.zeros(9, 2)}, r"weight: was of shape \[9, 2\], must be \[V, 3\]"),
        ({"weight": torch.zeros(9)}, r"weight: was of shape \[9\], must be \[V, 3\]"),
        ({"weight": torch.zeros(0, 3)}, r"weight: was of shape \[0, H\], must have at least one row"),
        ({"weight": torch.zeros(9, 3).bfloat16()}, r"weight: was of dtype torch.bfloat16, must be torch.float32"),
        ({"weight": torch.zeros(9, 3, device=META)}, r"weight: was on meta, must be on cpu"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: was int64 of shape \[3\], must be int64 .*\[4\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, r"targets: was int32 of shape \[4\], must be int64"),
        ({"targets": torch.zeros(4, 1, dtype=torch.int64)}, r"targets: was int64 of shape \[4, 1\], must be int64"),
        ({"targets": torch.tensor([0, 9, 1, 2])}, r"targets: was 9, must be in \[0, 9\) or -100"),
        ({"targets": torch.tensor([0, 8, -1, 2])}, r"targets: was -1, must be in \[0, 9\) or -100"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device=META)}, r"targets: was on meta, must be on cpu"),
        ({"bias": torch.zeros(8)}, r"bias: was of shape \[8\], must be \[9\]"),
        ({"bias": torch.zeros(9).bfloat16()}, r"bias: was of dtype torch.bfloat16, must be torch.float32"),
        ({"bias": torch.zeros(9, device=META)}, r"bias: was on meta, must be on cpu"),
        ({"lora_b": torch.zeros(8, 1)}, r"lora_b: was of shape \[8, 1\], must be \[9, r\]"),
        ({"lora_b": torch.zeros(9, 0)}, r"lora_b: was of shape \[9, 0\], must be \[9, r\]"),
        ({"lora_b": torch.zeros(9, 1), "weight": torch.zeros(())}, r"weight: was of shape \[\], must be \[V, "),
        ({"lora_b": torch.zeros(9, 1)}, r"weight: was of shape \[9, 3\], must be \[V, 2\]"),
        ({"lora_b": torch.zeros(9, 1).bfloat16()}, r"lora_b: was of dtype torch.bfloat16, must be torch.float32"),
        ({"lora_b": torch.zeros(9, 1, device=META), "weight": torch.zeros(9, 2)}, r"lora_b: was on meta, must be on"),
        ({"temperature": 0.0}, r"temperature: was 0.0, must be a finite number above 0"),
        ({"logit_scale": 0.0}, r"logit_scale: was 0.0, must be a finite number other than 0"),
        ({"softcap": -1.0}, r"softcap: was -1.0, must be a finite number above 0, or None"),
        ({"outputs": ["perplexity"]}, r"outputs: was \['perplexity'\], must be a sequence of names from"),
        ({"outputs": "entropy"}, r"outputs: was 'entropy', must be a sequence of names from"),
        ({"rows": rows_of(torch.zeros(4, dtype=torch.int32))}, r"rows: its index was int32 of shape \[4\], must"),
        ({"rows": rows_of(torch.tensor([2, 1]))}, r"rows: its index was not ascending"),
        ({"rows": rows_of(torch.tensor([1, 1]))}, r"rows: its index was not ascending"),
        ({"rows": rows_of(torch.tensor([0, 4]))}, r"rows: its index held 4, must be in \[0, 4\)"),
        ({"rows": rows_of(torch.tensor([-1, 2]))}, r"rows: its index held -1, must be in \[0, 4\)"),
        ({"rows": rows_of(torch.zeros(4, device=META, dtype=torch.int64))}, r"rows: was on meta, must be on cpu"),
        ({"backend": "cuda"}, r"backend: was 'cuda', must be one of: auto, .*eager"),
        ({"stash_bytes": -1}, r'stash_bytes: was -1, must be "auto" or a number of bytes'),
        ({"stash_bytes": 0.5}, r'stash_bytes: was 0.5, must be "auto" or a number of bytes'),
        ({"stash_bytes": True}, r'stash_bytes: was True, must be "auto" or a number of bytes'),
        ({"stash_bytes": "all"}, r"stash_bytes: was 'all', must be \"auto\" or a number of bytes"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_argument_its_value_and_what_it_should_be(changes, message):
    with pytest.raises(ValueError, match="^" + message):
        call(**changes)


def test_an_integer_head_is_rejected_under_autocast_too():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"^weight: was of dtype"):
        call(weight=torch.zeros(9, 3, dtype=torch.int32))


def test_the_environment_overrides_auto_but_not_an_explicit_backend(monkeypatch):
    monkeypatch.setenv("SDPO_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"^backend: was 'nonsense', must be one of: auto, .*eager"):
        call()
    call(backend="eager")
    monkeypatch.setenv("SDPO_BACKEND", "eager")
    call()


def test_a_backend_that_cannot_serve_says_why_and_auto_warns_once(monkeypatch, caplog):
    class Picky(type(backends.BACKENDS["eager"])):
        name = "picky"

        def supports(self, request):
            return "it serves nobody"

    backends._warn_once.cache_clear()
    monkeypatch.setitem(backends.BACKENDS, "picky", Picky())
    monkeypatch.setattr(backends, "AUTO_ORDER", ("picky", "eager"))
    monkeypatch.delenv("SDPO_BACKEND", raising=False)
    with pytest.raises(ValueError, match=r"^backend: 'picky' cannot serve this call: it serves nobody"):
        call(backend="picky")
    with caplog.at_level("WARNING", logger="sdpo_kernels.backends"):
        call()
        call()
    assert [record.getMessage() for record in caplog.records] == ["backend picky skipped: it serves nobody"]
    monkeypatch.setattr(backends, "AUTO_ORDER", ("picky",))
    with pytest.raises(ValueError, match=r"^backend: none supports this call: Request"):
        call()


def test_a_lora_on_a_head_of_one_row():
    """Both gradients are then contiguous parts of one tensor; an op's outputs may not share memory."""
    hidden, weight = torch.randn(3, 8), torch.randn(1, 4, requires_grad=True)
    lora_b = torch.randn(1, 4, requires_grad=True)
    linear_logps(hidden, weight, torch.zeros(3, dtype=torch.int64), lora_b=lora_b).logps.sum().backward()
    assert not weight.grad.any()  # the only token has probability 1
    assert not lora_b.grad.any()
