"""Pair losses: values and both gradients against the formulas of the papers, written out a second time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_kernels import losses
from sdpo_kernels.losses import PairLogps, check_loss, loss_names, loss_options, pair_loss, register

FINITE = st.floats(-80, 80)


def pair_of(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, n: int = 3, m: int = 5):
    """A PairLogps of one pair; the policy's two numbers want a gradient."""
    numbers = [torch.tensor([v], dtype=torch.float64) for v in (chosen, rejected, ref_chosen, ref_rejected)]
    return PairLogps(
        numbers[0].requires_grad_(), numbers[1].requires_grad_(), numbers[2], numbers[3],
        torch.tensor([n]), torch.tensor([m]),
    )  # fmt: skip


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def log_sigma(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def written_out(name: str, pair: PairLogps, beta: float, e: float) -> tuple[float, float, float]:
    """Loss, dL/dchosen and dL/drejected, from the formulas."""
    lw, ll, rw, rl, nw, nl = (t.item() for t in pair)
    a, b = lw - rw, ll - rl
    z = beta * (a - b)
    s = sigma(-z)
    if name == "sigmoid":
        slope = beta * ((1 - e) * s - e * sigma(z))
        return -(1 - e) * log_sigma(z) - e * log_sigma(-z), -slope, slope
    if name == "robust":
        slope = beta * ((1 - e) * s + e * sigma(z)) / (1 - 2 * e)
        return (-(1 - e) * log_sigma(z) + e * log_sigma(-z)) / (1 - 2 * e), -slope, slope
    if name == "hinge":
        slope = beta if z < 1 else 0.0
        return max(0.0, 1 - z), -slope, slope
    assert name == "ipo"
    root = a / nw - b / nl - 1 / (2 * beta)
    return root**2, 2 * root / nw, -2 * root / nl


@given(
    st.sampled_from(["sigmoid", "robust", "hinge", "ipo"]),
    st.tuples(FINITE, FINITE, FINITE, FINITE),
    st.floats(0.01, 2),
    st.floats(0, 0.45),
    st.integers(1, 900),
    st.integers(1, 900),
)
def test_value_and_gradients(name, logps, beta, smoothing, n, m):
    pair = pair_of(*logps, n, m)
    options = {"label_smoothing": smoothing} if "label_smoothing" in loss_options(name) else {}
    z = beta * pair.delta.item()
    if name == "hinge" and abs(z - 1) < 1e-9:
        return  # the kink has a test of its own
    loss = pair_loss(name, pair, beta, **options)
    loss.sum().backward()
    value, slope_chosen, slope_rejected = written_out(name, pair, beta, smoothing)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(value, rel=1e-11, abs=1e-12)
    assert pair.chosen.grad.item() == pytest.approx(slope_chosen, rel=1e-11, abs=1e-13)
    assert pair.rejected.grad.item() == pytest.approx(slope_rejected, rel=1e-11, abs=1e-13)


def test_the_hinge_has_slope_0_at_its_kink():
    pair = pair_of(2.0, 0.0, 0.0, 0.0)
    loss = pair_loss("hinge", pair, beta=0.5)  # z is exactly 1
    loss.sum().backward()
    assert loss.item() == 0.0
    assert pair.chosen.grad.item() == 0.0
    assert pair.rejected.grad.item() == 0.0


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_policy_equal_to_its_reference_loses_ln_2(name, smoothing):
    loss = pair_loss(name, pair_of(-7.0, -9.0, -7.0, -9.0), beta=0.1, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("name", loss_names())
@pytest.mark.parametrize("delta", [1e6, -1e6])
def test_far_from_0_nothing_overflows(name, delta):
    pair = PairLogps(*(torch.tensor([v]) for v in (delta, 0.0, 0.0, 0.0)), torch.tensor([1]), torch.tensor([1]))
    pair = pair._replace(chosen=pair.chosen.requires_grad_())
    loss = pair_loss(name, pair, beta=0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert pair.chosen.grad.isfinite().all()


def test_registry_lists_names_and_options():
    assert {"hinge", "ipo", "robust", "sigmoid"} <= set(loss_names())
    assert loss_names() == sorted(loss_names())
    assert loss_options("sigmoid") == {"label_smoothing": 0.0}
    assert loss_options("ipo") == {}


def test_a_new_loss_is_entered_under_its_name(monkeypatch):
    monkeypatch.setattr(losses, "_REGISTRY", dict(losses._REGISTRY))

    @register("twice")
    def twice(pair, beta, *, by=2.0):
        return by * beta * pair.delta

    assert pair_loss("twice", pair_of(3.0, 1.0, 0.0, 0.0), beta=0.5, by=4.0).item() == 4.0
    with pytest.raises(ValueError, match=r"^loss_type: 'twice' is registered already"):
        register("twice")(twice)


@pytest.mark.parametrize(
    ("name", "beta", "options", "message"),
    [
        ("dpo", 0.1, {}, r"^loss_type: was 'dpo', must be one of: .*hinge, ipo,.* sigmoid"),
        ("sigmoid", 0.0, {}, r"^beta: was 0.0, must be a finite number above 0"),
        ("sigmoid", -0.1, {}, r"^beta: was -0.1, must be"),
        ("sigmoid", math.inf, {}, r"^beta: was inf, must be"),
        ("sigmoid", math.nan, {}, r"^beta: was nan, must be"),
        ("sigmoid", "0.1", {}, r"^beta: was '0.1', must be"),
        ("hinge", 0.1, {"label_smoothing": 0.1}, r"^label_smoothing: the loss 'hinge' does not use it; .*: none"),
        ("sigmoid", 0.1, {"smooth": 0.1}, r"^smooth: the loss 'sigmoid' does not use it; .*: label_smoothing"),
    ],
)
def test_bad_settings_are_refused_by_name(name, beta, options, message):
    with pytest.raises(ValueError, match=message):
        check_loss(name, beta, **options)
    with pytest.raises(ValueError, match=message):
        pair_loss(name, pair_of(1.0, 0.0, 0.0, 0.0), beta, **options)


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_outside_its_range(name, smoothing):
    with pytest.raises(ValueError, match=f"^label_smoothing: was {smoothing!r}, must be at least 0 and below 0.5"):
        pair_loss(name, pair_of(1.0, 0.0, 0.0, 0.0), 0.1, label_smoothing=smoothing)
