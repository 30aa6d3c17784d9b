"""Pair losses: values and both gradients against the papers' formulas, written here independently."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdpo_kernels import losses
from sdpo_kernels.losses import PairLogps, loss_names, loss_options, pair_loss

F64 = torch.float64
ENDS = st.floats(-80, 80)
DIVERGENCES = [{"f_divergence": "forward_kl"}, {"f_divergence": "js"}, *(
    {"f_divergence": "alpha", "f_alpha": alpha} for alpha in (0.0, 0.5, 1.0, 2.0))]  # fmt: skip


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=F64)


def pair_of(chosen, rejected, ref_chosen, ref_rejected, n=3, m=5, weight=1.0):
    """A PairLogps of one pair; the policy's two numbers want a gradient."""
    policy = [vector(v).requires_grad_() for v in (chosen, rejected)]
    counts = torch.tensor([n]), torch.tensor([m])
    return PairLogps(*policy, vector(ref_chosen), vector(ref_rejected), *counts, vector(weight))


def pairs_of(rows, counts, weights, dtype=F64):
    """As many pairs as `rows` has lines of (chosen, rejected, ref_chosen, ref_rejected)."""
    columns = [torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True)]
    n, m = (torch.tensor(column) for column in zip(*counts, strict=True))
    policy = [column.requires_grad_() for column in columns[:2]]
    return PairLogps(*policy, *columns[2:], n, m, torch.tensor(weights, dtype=dtype))


def gradients(loss, pair):
    return torch.autograd.grad(loss.sum(), (pair.chosen, pair.rejected), allow_unused=True, materialize_grads=True)


# ---- every formula once more: p is the pair, d = Δ, o the options ----


def soft(x: torch.Tensor) -> torch.Tensor:
    """log1p(exp(x)) = −log σ(−x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def cdpo(z, e):
    return soft(-z) + e * z  # as log σ(z) − log σ(−z) = z


def ranked(x):
    return x[sorted(range(len(x)), key=x.tolist().__getitem__)]


def nll(p):
    return (-p.chosen.sum() / p.chosen_counts.sum().double()).expand(len(p.chosen))


def log_odds(logp, count):
    p = (logp / count).exp()
    return (p / (1 - p)).log()


def f_prime(t, o):
    """f′ at the likelihood ratio t."""
    kind, alpha = o["f_divergence"], o.get("f_alpha", 0.5)
    if kind == "forward_kl":
        return 1 - 1 / t
    if kind == "js":
        return (2 * t / (t + 1)).log()
    if kind == "alpha" and alpha != 1:
        return (t ** (alpha - 1) - 1) / (alpha - 1)
    return t.log()


def margin(p, beta, o, per_token=False):
    """β times the difference of the scores; the log-ratios themselves for reverse_kl."""
    a, b = p.chosen - p.ref_chosen, p.rejected - p.ref_rejected
    if o.get("f_divergence", "reverse_kl") != "reverse_kl":
        a, b = f_prime(a.exp(), o), f_prime(b.exp(), o)
    return beta * (a / p.chosen_counts - b / p.rejected_counts) if per_token else beta * (a - b)


def exo(z, e):
    q = torch.stack([z, torch.zeros_like(z)]).log_softmax(0)
    return (q.exp() * (q - vector(1 - e, e).log()[:, None])).sum(0)


def disco(z, tau):
    m = 0.5 * (1 + torch.tanh(z / tau / 2))
    return (1 - m) * soft(-z) + m * (-z).exp()


FORMULAS = {
    "sigmoid": lambda p, beta, o: cdpo(margin(p, beta, o), o["label_smoothing"]),
    "robust": lambda p, beta, o: (
        soft(-margin(p, beta, o)) - o["label_smoothing"] / (1 - 2 * o["label_smoothing"]) * margin(p, beta, o)
    ),
    "hinge": lambda p, beta, o: (1 - margin(p, beta, o)).clamp(min=0),
    "ipo": lambda p, beta, o: (margin(p, 1, o, per_token=True) - 0.5 / beta) ** 2,
    "sigmoid_norm": lambda p, beta, o: soft(-margin(p, beta, o, per_token=True)),
    "minor_dpo": lambda p, beta, o: soft(
        beta * ((p.rejected - p.ref_rejected).clamp(min=0) - p.chosen + p.ref_chosen)
    ),
    "length_dpo": lambda p, beta, o: cdpo(
        margin(p, beta, o) - o["length_alpha"] * (p.rejected_counts - p.chosen_counts).double(), o["label_smoothing"]
    ),
    "dpop": lambda p, beta, o: soft(
        beta * o["dpop_lambda"] * torch.maximum(vector(0), p.ref_chosen - p.chosen) - margin(p, beta, o)
    ),
    "exo_pair": lambda p, beta, o: exo(margin(p, beta, o), o["label_smoothing"]),
    "discopop": lambda p, beta, o: disco(margin(p, beta, o), o["discopop_tau"]),
    "aot": lambda p, beta, o: cdpo(
        beta * (ranked(p.chosen - p.rejected) - ranked(p.ref_chosen - p.ref_rejected)), o["label_smoothing"]
    ),
    "aot_unpaired": lambda p, beta, o: cdpo(
        beta * (ranked(p.chosen - p.ref_chosen) - ranked(p.rejected - p.ref_rejected)), o["label_smoothing"]
    ),
    "ld_dpo": lambda p, beta, o: cdpo(margin(p, beta, o), o["label_smoothing"]),
    "wpo": lambda p, beta, o: cdpo(margin(p, beta, o), o["label_smoothing"]) * p.weights,
    "diffusion_dpo": lambda p, beta, o: soft(beta / 2 * (p.chosen - p.rejected - (p.ref_chosen - p.ref_rejected))),
    "nca_pair": lambda p, beta, o: (
        1.5 * soft(beta * (p.ref_chosen - p.chosen))
        + 0.5 * beta * (p.chosen - p.ref_chosen)
        + 0.5 * soft(beta * (p.rejected - p.ref_rejected))
    ),
    "bco_pair": lambda p, beta, o: (
        soft(beta * (p.ref_chosen - p.chosen)) + soft(beta * (p.rejected - p.ref_rejected))
    ),
    "sppo_hard": lambda p, beta, o: (
        (p.chosen - p.ref_chosen - 1 / (2 * beta)) ** 2 + (p.rejected - p.ref_rejected + 1 / (2 * beta)) ** 2
    ),
    "apo_zero": lambda p, beta, o: (
        1 - torch.sigmoid(beta * (p.chosen - p.ref_chosen)) + torch.sigmoid(beta * (p.rejected - p.ref_rejected))
    ),
    "apo_down": lambda p, beta, o: (
        torch.sigmoid(beta * (p.chosen - p.ref_chosen)) + 1 - torch.sigmoid(margin(p, beta, o))
    ),
    "sft": lambda p, beta, o: nll(p),
    "simpo": lambda p, beta, o: cdpo(
        beta * p.chosen / p.chosen_counts - beta * p.rejected / p.rejected_counts - o["simpo_gamma"],
        o["label_smoothing"],
    ),
    "cpo": lambda p, beta, o: cdpo(beta * (p.chosen - p.rejected), o["label_smoothing"]) + o["cpo_alpha"] * nll(p),
    "orpo": lambda p, beta, o: (
        nll(p)
        + beta * soft(log_odds(p.rejected, p.rejected_counts) - log_odds(p.chosen, p.chosen_counts))
    ),
}  # fmt: skip
RANGES = {
    "label_smoothing": (1e-3, 0.45), "dpop_lambda": (0, 60), "length_alpha": (0, 0.5), "discopop_tau": (0.03, 0.9),
    "simpo_gamma": (0, 2), "cpo_alpha": (0, 2), "ld_alpha": (0, 1),
}  # fmt: skip


def on_a_kink(name, pair, beta, o):
    """Whether a slope jumps here, or there are ties: those points have tests of their own."""
    if name == "hinge":
        return bool(((margin(pair, beta, o) - 1).abs() < 1e-9).any())
    if name in ("minor_dpo", "dpop"):
        return bool(((pair.chosen_logratio == 0) | (pair.rejected_logratio == 0)).any())
    ties = [pair.chosen - pair.rejected, pair.chosen_logratio, pair.rejected_logratio]
    return name.startswith("aot") and any(len(x.unique()) < len(x) for x in ties)


def same_as_written_out(name, pair, beta, options):
    assume(not on_a_kink(name, pair, beta, options))
    loss, truth = pair_loss(name, pair, beta, **options), FORMULAS[name](pair, beta, loss_options(name) | options)
    assert loss.shape == pair.chosen.shape
    assert loss.dtype == F64
    if name in ("sft", "cpo", "orpo"):  # the batch's mean is TRL's; the pairs' own shares differ
        assert loss.mean().item() == pytest.approx(truth.mean().item(), rel=1e-9, abs=1e-9)
    else:
        assert loss.tolist() == pytest.approx(truth.tolist(), rel=1e-9, abs=1e-9)
    for mine, right in zip(gradients(loss, pair), gradients(truth, pair), strict=True):
        assert mine.tolist() == pytest.approx(right.tolist(), rel=1e-8, abs=1e-9)


@st.composite
def drawn(draw, name, ends=ENDS):
    """Two or three pairs, β and options of the loss `name`."""
    size = draw(st.integers(2, 3))
    rows = draw(st.lists(st.tuples(ends, ends, ends, ends), min_size=size, max_size=size))
    if name == "orpo":  # probabilities below 1
        rows = [[-abs(x) - 0.01 for x in row] for row in rows]
    number = st.integers(1, 9 if name == "orpo" else 900)
    counts = draw(st.lists(st.tuples(number, number), min_size=size, max_size=size))
    weights = draw(st.lists(st.floats(0, 4), min_size=size, max_size=size))
    options = {k: draw(st.floats(*RANGES[k])) for k in loss_options(name) if k in RANGES}
    return pairs_of(rows, counts, weights), draw(st.floats(0.01, 2)), options


def test_every_loss_has_a_formula_here():
    assert sorted(FORMULAS) == loss_names()


@pytest.mark.parametrize("name", loss_names())
@settings(max_examples=20)
@given(st.data())
def test_value_and_gradients(name, data):
    ends = st.floats(-8, 8) if name == "discopop" else ENDS  # its second form below would overflow
    same_as_written_out(name, *data.draw(drawn(name, ends)))


@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", [name for name in loss_names() if "f_divergence" in loss_options(name)])
@settings(max_examples=6)
@given(st.data())
def test_f_divergences(name, options, data):
    pair, beta, others = data.draw(drawn(name, st.floats(-2, 2)))
    if others.get("discopop_tau"):
        beta = min(beta, 0.1)  # exp(−z) stays small enough to compare
    same_as_written_out(name, pair, beta, others | options)


def test_trl_knows_f_divergences_of_these_losses():
    named = {name for name in loss_names() if "f_divergence" in loss_options(name)}
    assert named == {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}


# ---- at exactly 0 and far from it ----


@pytest.mark.parametrize(
    ("name", "logps", "beta", "options", "slopes"),
    [
        ("hinge", (2.0, 0.0, 0.0, 0.0), 0.5, {}, (0.0, 0.0)),  # z is exactly 1
        ("dpop", (-7.0, -9.0, -7.0, -9.0), 0.3, {}, (-0.15, 0.15)),  # the penalty is off, with λ = 50 it would be 51 ·
        ("dpop", (-7.0, -9.0, -7.0, -9.0), 0.3, {"dpop_lambda": 0.0}, (-0.15, 0.15)),
        ("minor_dpo", (-7.0, -9.0, -7.0, -9.0), 0.3, {}, (-0.15, 0.15)),  # the push is on
        ("minor_dpo", (-7.0, -9.5, -7.0, -9.0), 0.3, {}, (-0.15, 0.0)),
        ("sigmoid", (-7.0, -9.0, -7.0, -9.0), 0.3, {}, (-0.15, 0.15)),
    ],
)
def test_slopes_at_exactly_0(name, logps, beta, options, slopes):
    pair = pair_of(*logps)
    found = gradients(pair_loss(name, pair, beta, **options), pair)
    assert [slope.item() for slope in found] == pytest.approx(list(slopes), abs=1e-15)


def test_dpops_penalty_just_below_0_is_on():
    pair = pair_of(-7.0 - 1e-12, -9.0, -7.0, -9.0)
    assert gradients(pair_loss("dpop", pair, 0.3), pair)[0].item() == pytest.approx(-0.15 * 51, rel=1e-6)


@pytest.mark.parametrize("name", loss_names())
@pytest.mark.parametrize("f", [{}, *DIVERGENCES], ids=str)
def test_only_losses_marked_so_are_ln_2_where_policy_equals_reference(name, f):
    if f and "f_divergence" not in loss_options(name):
        return
    pair = pairs_of([(-7.0, -9.0) * 2, (-3.0, -1.0) * 2], [(3, 4), (8, 2)], [1.0, 0.5])
    value = pair_loss(name, pair, 0.1, **f)
    assert (value - math.log(2)).abs().max().item() <= 1e-15 or not losses.starts_at_ln2(name)
    assert (value - math.log(2)).abs().max().item() > 1e-3 or losses.starts_at_ln2(name)
    assert not losses.starts_at_ln2("no such loss")


@pytest.mark.parametrize("name", ["sigmoid", "robust", "ld_dpo", "aot"])
def test_smoothing_keeps_ln_2(name):
    loss = pair_loss(name, pair_of(-7.0, -9.0, -7.0, -9.0), beta=0.1, label_smoothing=0.2)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("name", loss_names())
@pytest.mark.parametrize("delta", [1e6, -1e6])
def test_far_from_0_nothing_overflows(name, delta):
    pair = PairLogps(
        *(torch.tensor([v]) for v in (delta, 0.0, 0.0, 0.0)), torch.tensor([1]), torch.tensor([1]), torch.ones(1)
    )
    pair = pair._replace(chosen=pair.chosen.requires_grad_())
    loss = pair_loss(name, pair, beta=0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert pair.chosen.grad.isfinite().all()


@pytest.mark.parametrize("f", [{}, *DIVERGENCES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_at_80_nothing_overflows(f, dtype):
    ends = (-80.0, 0.0, 80.0)
    rows = [(w, r, x, y) for w in ends for r in ends for x in ends for y in ends]
    for name in loss_names():
        if f and ("f_divergence" not in loss_options(name) or (name == "ipo" and dtype == torch.float32)):
            continue  # IPO squares exp(80)
        pair = pairs_of(rows, [(2, 7)] * len(rows), [1.0] * len(rows), dtype)
        loss = pair_loss(name, pair, **f)
        assert loss.isfinite().all(), name
        assert all(slope.isfinite().all() for slope in gradients(loss, pair)), name
