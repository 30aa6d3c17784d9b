"""Captions that fit the run's loss and reference, and the value its loss starts at."""

import math

import pytest

from sdpo_kernels.stepwise.report.terms import captions, start_levels
from tests.stepwise.report.folders import stage

LN2 = math.log(2)


def manifest(*stages, **config):
    return {"stages": list(stages), **({"config": config} if config else {})}


def test_ln_2_is_said_of_losses_that_start_there():
    assert "ln 2 = 0.693" in captions(manifest(stage(1, "a")), 1, [])["loss"]
    for loss in ("ipo", "simpo", "hinge"):
        text = captions(manifest(stage(1, "a", loss=loss)), 1, [])["loss"]
        assert loss in text
        assert "0.693" not in text


@pytest.mark.parametrize(
    ("policy", "reference", "levels"),
    [
        ("previous", "previous", {1: LN2, 2: LN2}),
        ("previous", "initial", {1: LN2}),
        ("initial", "initial", {1: LN2, 2: LN2}),
        ("initial", "previous", {1: LN2}),
        ("previous", "ema", {1: LN2, 2: LN2}),
        ("previous", "multi", {}),
        ("initial", "guiding", {}),
        ("previous", "none", {}),
    ],
)
def test_only_stages_that_start_as_their_reference_start_at_ln_2(policy, reference, levels):
    stages = [stage(index, str(index), policy=policy, reference=reference) for index in (1, 2)]
    assert start_levels(manifest(*stages)) == levels


def test_a_sum_starts_at_its_weights_times_ln_2():
    loss = [{"name": "sigmoid", "weight": 0.5, "options": {}}, {"name": "robust", "weight": 1.0, "options": {}}]
    run = manifest(stage(1, "a", loss="0.5 sigmoid + 1 robust"), loss=loss, loss_options={})
    assert start_levels(run) == {1: pytest.approx(1.5 * LN2)}
    assert "1.040" in captions(run, 1, [])["loss"]
    loss[1]["name"] = "ipo"
    assert start_levels(manifest(stage(1, "a", loss="0.5 sigmoid + 1 ipo"), loss=loss)) == {}
    unknown = manifest(stage(1, "a", loss="of_an_old_version"), loss="of_an_old_version")
    assert start_levels(unknown) == {}


def test_rewards_are_explained_by_the_reference():
    def reward(reference):
        return captions(manifest(stage(1, "a", reference=reference)), 1, [])["rewards"]

    assert "π_ref" in reward("previous")
    assert "no reference" in reward("none")
    assert "π_ref" not in reward("none")
    assert "mixture" in reward("multi")
    assert "rewards fall" in reward("ema")


def test_simpo_has_another_gamma():
    assert "SimPO's γ is another" in captions(manifest(stage(1, "a", loss="simpo")), 1, [])["gamma_reference"]
    assert "SimPO" not in captions(manifest(stage(1, "a")), 1, [])["gamma_reference"]


def test_clipping_and_smoothing_are_said_as_they_are():
    def norm(window, **trainer):
        return captions(manifest(stage(1, "a"), trainer=trainer), window, [])["grad_norm"]

    assert "clipped to 1 " in norm(1)
    assert "clipped to 0.5 " in norm(1, max_grad_norm=0.5)
    assert "not clipped" in norm(1, max_grad_norm=0)
    assert "last 20 of them" in norm(20)
    assert "thick" not in norm(1)
    assert "clipped" not in captions(manifest(stage(1, "a")), 1, [])["grad_norm"], "without a config nobody knows"
