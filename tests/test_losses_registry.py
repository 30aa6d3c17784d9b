"""The registry of losses: names, options, what each needs, weighted sums, and every error."""

from __future__ import annotations

import math

import pytest
import torch

from sdpo_kernels import losses
from sdpo_kernels.losses import PairLogps, check_loss, loss_names, loss_options, loss_sum, pair_loss, register, registry
from tests.test_losses import pair_of, vector


def test_registry_lists_names_and_options():
    assert loss_names() == sorted(loss_names())
    assert loss_options("sigmoid") == {"label_smoothing": 0.0, "f_divergence": "reverse_kl", "f_alpha": 0.5}
    assert loss_options("dpop") == {"dpop_lambda": 50.0}
    assert loss_options("minor_dpo") == {}
    free = {name for name in loss_names() if loss_sum(name).reference_free}
    assert free == {"simpo", "cpo", "orpo", "sft"}
    assert {name for name in loss_names() if loss_sum(name).weighs_pairs} == {"wpo"}
    assert {name for name in loss_names() if loss_sum(name).ld_alpha is not None} == {"ld_dpo"}


@pytest.mark.parametrize("name", sorted(set(loss_names()) & {"simpo", "cpo", "orpo", "sft"}))
def test_a_reference_free_loss_reads_no_reference(name):
    pair = pair_of(-7.0, -9.0, -1.0, -2.0)
    other = pair._replace(ref_chosen=vector(-50), ref_rejected=vector(3))
    assert torch.equal(pair_loss(name, pair), pair_loss(name, other))


@pytest.mark.parametrize("alias", ["lr_dpo", "r_dpo"])
def test_aliases_are_the_same_loss(alias):
    pair = pair_of(-7.0, -9.0, -1.0, -2.0, n=40)
    assert torch.equal(pair_loss(alias, pair, length_alpha=0.3), pair_loss("length_dpo", pair, length_alpha=0.3))
    assert alias not in loss_names()
    assert loss_sum(alias).label == "length_dpo"


def test_a_longer_chosen_answer_lowers_length_dpos_loss():
    """The term is +α(|w|−|l|) inside σ: the policy need not learn what length already explains."""
    long, short = pair_of(-5.0, -5.0, -5.0, -5.0, 90, 10), pair_of(-5.0, -5.0, -5.0, -5.0, 10, 90)
    assert pair_loss("length_dpo", long, length_alpha=0.1) < math.log(2) < pair_loss("length_dpo", short)


def test_the_default_beta_is_diffusion_dpos_own():
    pair = pair_of(0.020, 0.021, 0.0203, 0.0209)
    assert pair_loss("diffusion_dpo", pair).item() == pair_loss("diffusion_dpo", pair, 5000).item()
    assert losses.diffusion_dpo(pair).item() == pair_loss("diffusion_dpo", pair).item()
    assert pair_loss("sigmoid", pair).item() == pair_loss("sigmoid", pair, 0.1).item()


def test_a_new_loss_is_registered_under_its_name(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register("twice", "double")
    def twice(pair, beta, *, by=2.0):
        return by * beta * pair.delta

    assert pair_loss("twice", pair_of(3.0, 1.0, 0.0, 0.0), beta=0.5, by=4.0).item() == 4.0
    assert pair_loss("double", pair_of(3.0, 1.0, 0.0, 0.0), beta=0.5).item() == 2.0
    with pytest.raises(ValueError, match=r"^loss_type: 'twice' is already registered"):
        register("twice")(twice)
    with pytest.raises(ValueError, match=r"^by: was nan, must be a finite number"):
        pair_loss("twice", pair_of(3.0, 1.0, 0.0, 0.0), by=math.nan)


# ---- sums ----

MPO = [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}, {"name": "sft", "weight": 1.0}]


def test_the_parts_of_a_sum_are_named_and_weighted():
    pair = PairLogps(*torch.randn(4, 3), torch.ones(3), torch.ones(3))
    entries = [{"name": "sigmoid", "weight": 0.5}, "sigmoid_norm", {"name": "sigmoid", "weight": 2}]
    parts = loss_sum(entries).parts(pair, 0.1)
    assert list(parts) == ["sigmoid", "sigmoid_norm", "sigmoid_2"]
    plain = pair_loss("sigmoid", pair, 0.1)
    assert torch.allclose(parts["sigmoid"], plain / 2)
    assert torch.allclose(parts["sigmoid_2"], plain * 2)


def test_a_sum_is_the_sum():
    pair = pair_of(-7.0, -9.0, -6.0, -9.5)
    parts = [pair_loss(name, pair, 0.3).item() for name in ("sigmoid", "bco_pair", "sft")]
    assert pair_loss(MPO, pair, 0.3).item() == pytest.approx(0.8 * parts[0] + 0.2 * parts[1] + parts[2], rel=1e-14)
    assert loss_sum(MPO).label == "0.8 sigmoid + 0.2 bco_pair + 1 sft"
    assert loss_sum(loss_sum(MPO)) is not None
    with_options = [{"name": "dpop", "options": {"dpop_lambda": 5}}, {"name": "sigmoid"}]
    wanted = pair_loss("dpop", pair, 0.3, dpop_lambda=5) + pair_loss("sigmoid", pair, 0.3)
    assert pair_loss(with_options, pair, 0.3).item() == pytest.approx(wanted.item(), rel=1e-14)


def test_a_sum_knows_what_its_terms_need():
    assert not loss_sum(MPO).reference_free
    assert loss_sum([{"name": "simpo"}, {"name": "sft"}]).reference_free
    assert loss_sum(MPO).start_value is None
    assert loss_sum([{"name": "sigmoid", "weight": 2}, {"name": "dpop"}]).start_value == 3 * math.log(2)
    assert loss_sum("sigmoid").start_value == math.log(2)
    assert loss_sum("ld_dpo", {"ld_alpha": 0.3}).ld_alpha == 0.3
    assert loss_sum("sigmoid").label == "sigmoid"


def test_missing_pair_weights_are_an_error():
    with pytest.raises(ValueError, match=r"^weights: was None, must be the weights \[B\] of the pairs"):
        pair_loss([{"name": "wpo"}, {"name": "sft"}], pair_of(1.0, 0.0, 0.0, 0.0)._replace(weights=None))


@pytest.mark.parametrize(
    ("loss_type", "beta", "options", "message"),
    [
        ("dpo", 0.1, {}, r"^loss_type: was 'dpo', must be one of: .*hinge, ipo,.* sigmoid"),
        ("dpo", 0.1, {}, r"; did you mean 'sigmoid'\?$"),
        ("aot_pair", 0.1, {}, r"; did you mean 'aot'\?$"),
        ("difusion_dpo", 0.1, {}, r" wpo; 'diffusion_dpo' takes denoising errors, with losses.pair_loss only$"),
        ("sigmod", 0.1, {}, r"^loss_type: was 'sigmod', .*; did you mean 'sigmoid'\?"),
        (3, 0.1, {}, r"^loss_type: was 3, must be a name or a list"),
        ("sigmoid", 0.0, {}, r"^beta: was 0.0, must be a finite number above 0"),
        ("sigmoid", -0.1, {}, r"^beta: was -0.1, must be"),
        ("sigmoid", math.inf, {}, r"^beta: was inf, must be"),
        ("sigmoid", math.nan, {}, r"^beta: was nan, must be"),
        ("sigmoid", "0.1", {}, r"^beta: was '0.1', must be"),
        ("minor_dpo", 0.1, {"label_smoothing": 0.1}, r"^label_smoothing: the loss 'minor_dpo' does not use .*: none"),
        ("sigmoid", 0.1, {"smooth": 0.1}, r"^smooth: the loss 'sigmoid' does not use it; .*: label_smoothing"),
        ("dpop", 0.1, {"dpop_lamda": 1}, r"^dpop_lamda: .*; did you mean 'dpop_lambda'\?"),
        ("dpop", 0.1, {"dpop_lambda": -1}, r"^dpop_lambda: was -1, must be a finite number, at least 0"),
        ("dpop", 0.1, {"dpop_lambda": True}, r"^dpop_lambda: was True, must be"),
        ("exo_pair", 0.1, {"label_smoothing": 0.0}, r"^label_smoothing: was 0.0, must be above 0 and below 0.5"),
        ("ld_dpo", 0.1, {"ld_alpha": 1.1}, r"^ld_alpha: was 1.1, must be at least 0 and at most 1"),
        ("discopop", 0.1, {"discopop_tau": 0}, r"^discopop_tau: was 0, must be a finite number above 0"),
        ("hinge", 0.1, {"f_divergence": "kl"}, r"^f_divergence: was 'kl', must be one of: reverse_kl, forward_kl, js"),
        ("hinge", 0.1, {"f_alpha": 0.3}, r"^f_alpha: was 0.3, but only f_divergence='alpha' uses it"),
        ("apo_zero", 0.1, {"f_divergence": "js"}, r"^f_divergence: the loss 'apo_zero' does not use it"),
        ([], 0.1, {}, r"^loss_type: was \[\], must be a name or a list"),
        (MPO, 0.1, {"label_smoothing": 0.1}, r"^label_smoothing: was given with a list of losses, must be in"),
        (["sigmoi"], 0.1, {}, r"^0.name: was 'sigmoi', must be one of.*; did you mean 'sigmoid'\?"),
        (["sigmoid", 3], 0.1, {}, r"^1: was 3, must be a name, or have the keys name, weight, options"),
        ([{"nmae": "sigmoid"}], 0.1, {}, r"^0.nmae: unknown key, .*; did you mean 'name'\?"),
        ([{"weight": 1}], 0.1, {}, r"^0.name: is required"),
        ([*MPO, {"name": "sigmod"}], 0.1, {}, r"^3.name: was 'sigmod', must be one of: .*; did you mean 'sigmoid'\?"),
        ([{"name": "ipo", "weight": 0}], 0.1, {}, r"^0.weight: was 0, must be a finite number above 0"),
        ([{"name": "ipo", "options": 3}], 0.1, {}, r"^0.options: was 3, must be a mapping"),
        ([{"name": "dpop", "options": {"x": 1}}], 0.1, {}, r"^0.options.x: the loss 'dpop' does not use it"),
        ([{"name": "ld_dpo"}, {"name": "sft"}], 0.1, {}, r"^loss_type: 'ld_dpo' weighs .*, must be the only loss"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_setting(loss_type, beta, options, message):
    with pytest.raises(ValueError, match=message):
        check_loss(loss_type, beta, **options)
    with pytest.raises(ValueError, match=message):
        pair_loss(loss_type, pair_of(1.0, 0.0, 0.0, 0.0), beta, **options)


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_outside_its_range(name, smoothing):
    with pytest.raises(ValueError, match=f"^label_smoothing: was {smoothing!r}, must be at least 0 and below 0.5"):
        pair_loss(name, pair_of(1.0, 0.0, 0.0, 0.0), 0.1, label_smoothing=smoothing)
