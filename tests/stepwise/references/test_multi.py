"""MRPO's mixture of references: its arithmetic against an independent formula, and runs that train against it."""

import gc
import json
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.references.cache import read_scores
from sdpo_kernels.stepwise.references.mixture import adaptive_weights, clip_to_base, combine
from sdpo_kernels.stepwise.references.scorer import Scorer
from tests.stepwise import runs

LN2 = math.log(2)


def by_hand(logps, epsilon, alpha, published=False):
    """π̃ of one pair, from plain Python floats: logps [[chosen, rejected], ...], the base's first."""
    count = len(logps)
    if alpha == "adaptive":
        gammas = [abs(w - r) for w, r in logps]
        weights = [g / (sum(gammas) + 1e-6) for g in gammas[1:]]
        weights = [1 - sum(weights), *weights]
    else:
        weights = list(alpha)
    if published:
        weights = weights[::-1]
    means = [abs(sum(one[side] for one in logps) / count) for side in (0, 1)]
    for_chosen = epsilon * means[0] / sum(means)
    found = []
    for side, share in ((0, for_chosen), (1, epsilon - for_chosen)):
        base = logps[0][side]
        lower, upper = base * (1 + share), base * (1 - share)
        assert lower <= upper
        clipped = [base, *(min(max(one[side], lower), upper) for one in logps[1:])]
        # 1 / Σ α_k / π_k, shifted by the base so that exp does not overflow
        found.append(base - math.log(sum(a * math.exp(base - p) for a, p in zip(weights, clipped, strict=True))))
    return found


@pytest.mark.parametrize(("count", "convention"), [(2, "formula"), (2, "published"), (4, "formula")])
@pytest.mark.parametrize("alpha", ["adaptive", "fixed"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.9])
def test_the_mixture_is_that_of_the_formula(count, epsilon, alpha, convention):
    draw = torch.Generator().manual_seed(count)
    base = -40 * torch.rand(50, 2, generator=draw) - 0.5
    logps = torch.stack([base, *(base * (0.5 + torch.rand(50, 2, generator=draw)) for _ in range(count - 1))])
    weights = "adaptive" if alpha == "adaptive" else [0.7, *[0.3 / (count - 1)] * (count - 1)]
    mixed = combine(logps, epsilon=epsilon, alpha=weights, convention=convention)
    assert mixed.shape == (50, 2)
    assert mixed.dtype == torch.float32
    for i in range(50):
        wanted = by_hand(logps[:, i].double().tolist(), epsilon, weights, convention == "published")
        assert mixed[i].tolist() == pytest.approx(wanted, rel=3e-7)


@pytest.mark.parametrize("convention", ["formula", "published"])
@pytest.mark.parametrize("alpha", ["adaptive", (0.3, 0.7)])
def test_equal_references_mix_to_the_same_log_probs(alpha, convention):
    one = -30 * torch.rand(20, 2)
    assert torch.equal(combine(torch.stack([one, one]), epsilon=0.1, alpha=alpha, convention=convention), one)


def test_with_epsilon_zero_only_the_base_counts():
    logps = -30 * torch.rand(3, 20, 2)
    assert torch.equal(combine(logps, epsilon=0.0), logps[0])


def test_the_published_convention_swaps_the_weights():
    """As in trainer_mref.py: π_1 π_2 / (α π_1 + (1 − α) π_2), where 1 is the further reference and α its weight."""
    base, other, alpha = -2.0, -2.5, 0.9
    wanted = base + other - math.log(alpha * math.exp(other) + (1 - alpha) * math.exp(base))
    logps = torch.tensor([base, other]).view(2, 1, 1).expand(2, 1, 2)
    published = combine(logps, epsilon=0.9, alpha=[1 - alpha, alpha], convention="published")
    formula = combine(logps, epsilon=0.9, alpha=[1 - alpha, alpha])
    assert float(published[0, 0]) == pytest.approx(wanted, rel=1e-6)
    assert abs(float(formula[0, 0]) - other) < 0.1 < abs(float(published[0, 0]) - other)


def test_clipping_on_either_side():
    """Equal means: each answer gets half of ε = 0.2, so a base of −10 allows −11 to −9."""
    logps = torch.tensor([[[-10.0, -10.0]], [[-20.0, -5.0]], [[-5.0, -20.0]], [[-10.5, -10.5]]]).double()
    wanted = [[-10.0, -10.0], [-11.0, -9.0], [-9.0, -11.0], [-10.5, -10.5]]
    assert clip_to_base(logps, 0.2)[:, 0].flatten().tolist() == pytest.approx(
        [value for pair in wanted for value in pair]
    )


def test_the_longer_answer_gets_the_wider_neighbourhood():
    logps = torch.tensor([[[-30.0, -10.0]], [[-100.0, -0.1]]]).double()
    sizes = [65.0, 5.05]
    share = 0.2 * sizes[0] / sum(sizes)
    wanted = [-30 * (1 + share), -10 * (1 - (0.2 - share))]
    assert clip_to_base(logps, 0.2)[1, 0].tolist() == pytest.approx(wanted)


def test_weights_sum_to_one_and_depend_only_on_how_sure_a_reference_is():
    logps = torch.tensor([[[-3.0, -5.0]], [[-9.0, -1.0]], [[-2.0, -2.0]]]).double()  # γ of 2, −8 and 0
    assert adaptive_weights(logps)[:, 0].tolist() == pytest.approx([0.2, 0.8, 0.0], abs=1e-6)
    assert float(adaptive_weights(-torch.rand(3, 9, 2).double()).sum(0).sub(1).abs().max()) < 1e-12


def test_references_that_are_sure_of_nothing_leave_only_the_base():
    logps = torch.tensor([[[-3.0, -3.0]], [[-2.9, -2.9]]])
    assert combine(logps, epsilon=0.5)[0].tolist() == [-3.0, -3.0]
    assert torch.isfinite(combine(torch.zeros(2, 3, 2), epsilon=0.5)).all()


def test_mixing_very_different_references_stays_finite():
    logps = torch.tensor([[[-4000.0, -2.0]], [[-2.0, -4000.0]]])
    assert torch.isfinite(combine(logps, epsilon=0.9)).all()


@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 3), (2, 3, 3)])
def test_a_wrong_shape_or_convention_is_an_error(shape):
    with pytest.raises(ValueError, match="logps: was of shape"):
        combine(torch.zeros(shape), epsilon=0.1)
    with pytest.raises(ValueError, match="convention: was 'published'"):
        combine(torch.zeros(3, 4, 2), epsilon=0.1, convention="published")


# ---- runs ----


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Two models besides the base, one of them of another size."""
    folder = tmp_path_factory.mktemp("others")
    first = runs.make_model(folder / "a", seed=1)
    return [str(first), str(runs.make_model(folder / "b", seed=2, hidden_size=8))]


def scored(path, data):
    """Log-probs [[chosen, rejected], ...] from the model's own logits in float64."""
    network = AutoModelForCausalLM.from_pretrained(path).double()
    rows = []
    for i in range(len(data.tokens)):
        row = []
        for sequence in data.tokens[i]:
            ids = torch.from_numpy(sequence.ids.astype("int64"))[None]
            with torch.no_grad():
                logps = network(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            found = logps.gather(1, ids[0, 1:, None])[max(1, sequence.prompt_length) - 1 :].sum()
            row.append(float(found))
        rows.append(row)
    return rows


def test_three_models_are_mixed_into_each_stages_reference(tmp_path, model, others):
    config = runs.configured(tmp_path, model, reference="multi", multi={"models": others, "epsilon": 0.3})
    manifest = runs.train(config)
    run = tmp_path / "run"
    bases = (model, run / "stage-1-s1")
    for data, base, record in zip(prepare(config).stages, bases, manifest["stages"], strict=True):
        folder = run / f"stage-{record['index']}-{record['name']}"
        scores, reason = read_scores(folder / "reference_logps.safetensors", None, len(data.tokens))
        assert reason == ""
        parts = [scored(path, data) for path in (base, *others)]
        for i in range(len(data.tokens)):
            assert scores[i].tolist() == pytest.approx(by_hand([p[i] for p in parts], 0.3, "adaptive"), rel=3e-6)
        assert list(record["reference_hashes"]) == ["base", *others]
        assert len({record["reference_hash"], *record["reference_hashes"].values()}) == 4
        assert abs(record["first_loss"] - LN2) > 1e-4  # the policy is not its own reference
    assert runs.leftovers(run) == []
    known = json.loads((run / "manifest.json").read_text())["weights"]
    assert set(known) == {"initial", "stage-1-s1", *(f"multi.models.{i}" for i in range(len(others)))}


@pytest.mark.parametrize("way", ["no neighbourhood", "the base again"])
@pytest.mark.parametrize("more", [{}, {"trainer": {"bf16": True}}, {"lora": {"r": 2}}], ids=["fp32", "bf16", "lora"])
def test_a_mixture_that_is_the_base_starts_at_ln_2(tmp_path, model, others, way, more):
    """An exact case: with epsilon 0, or if all references are the same, π̃ is the policy's start."""
    options = {"models": others, "epsilon": 0.0} if way == "no neighbourhood" else {"models": [str(model)]}
    settings = {"reference": "multi", "multi": options, **more}
    manifest = runs.train(runs.configured(tmp_path, model, sizes=(8,), **settings))
    assert manifest["stages"][0]["first_loss"] == pytest.approx(LN2, abs=1e-4)


def test_evaluations_use_the_mixture_too(tmp_path, model, others):
    evaluation = str(runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(5, seed=9)))
    trainer = {"eval_strategy": "steps", "eval_steps": 50, "eval_on_start": True}
    for epsilon in (0.0, 0.3):
        folder = tmp_path / str(epsilon)
        folder.mkdir()
        options = {"models": others, "epsilon": epsilon}
        settings = {"reference": "multi", "multi": options, "eval_data": evaluation, "trainer": trainer}
        runs.train(runs.configured(folder, model, **settings))
        lines = [line for line in runs.metrics(folder / "run") if "eval_loss" in line and line["step"] == 0]
        assert [line["stage/index"] for line in lines] == [1, 2]
        for line in lines:
            assert (abs(line["eval_loss"] - LN2) < 1e-5) == (epsilon == 0.0)


def test_only_one_model_is_in_memory_at_a_time(tmp_path, model, others, monkeypatch):
    alive, most = [], 0
    genuine = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **kwargs):
        nonlocal most
        gc.collect()
        loaded = genuine(*args, **kwargs)
        if kwargs.get("device_map") != "meta":  # where things are only tried out, no weights are loaded
            alive.append(weakref.ref(loaded[0]))  # with its loading info
            most = max(most, sum(one() is not None for one in alive))
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    runs.train(runs.configured(tmp_path, model, reference="multi", multi={"models": others}))
    assert len(alive) == 8  # two stages of three references, and each stage's published folder
    assert most == 1


def test_a_stale_score_of_the_base_stops_the_stage(tmp_path, model, others, monkeypatch):
    """Against a mixture the loss does not start at ln 2, but the policy must match the scores of its own start."""
    genuine = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, *a: genuine(self, *a) * (1 + 1e-4))
    with pytest.raises(UserError, match=r"pair .*data1\.jsonl:\d+: rescoring gives .* stale reference cache"):
        runs.train(runs.configured(tmp_path, model, reference="multi", multi={"models": others}))


def test_a_reference_that_changes_during_a_run_is_an_error(tmp_path, model):
    other = runs.make_model(tmp_path / "other", seed=1)
    config = runs.configured(tmp_path, model, reference="multi", multi={"models": [str(other)]})
    with pytest.MonkeyPatch.context() as patch:
        runs.stop_at(patch, stage="s2", step=1)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    runs.make_model(other, seed=2)
    with pytest.raises(UserError, match=r"other: its weights have changed since this run was started"):
        runs.train(config)


def test_a_stopped_stage_resumes_to_the_same_bits_and_rescores_no_model(tmp_path, model, others, monkeypatch):
    evaluation = str(runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(5, seed=9)))
    trainer = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings = {"reference": "multi", "multi": {"models": others}, "eval_data": evaluation, "trainer": trainer}
    whole = tmp_path / "whole"
    whole.mkdir()
    runs.train(runs.configured(whole, model, **settings))
    config = runs.configured(tmp_path, model, **settings)
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s2", step=2)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    labels = []
    genuine = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, m, t, label: labels.append(label) or genuine(self, m, t, label))
    runs.train(config)
    assert labels == ["stage 2 of 2 s2: evaluation"]
    assert runs.fingerprint(tmp_path / "run") == runs.fingerprint(whole / "run")
    line = next(line for line in runs.metrics(whole / "run") if "eval_loss" in line)
    assert abs(line["eval_loss"] - LN2) > 1e-4


def test_a_stage_of_another_lora_run_is_scored_with_its_merged_weights(tmp_path, model, others):
    """Its adapter fits the base of its own run, which is not this run's."""
    first = tmp_path / "first"
    first.mkdir()
    runs.train(runs.configured(first, others[0], sizes=(8,), lora={"r": 2}))
    stage = first / "run" / "stage-1-s1"
    assert (stage / "adapter").is_dir()
    config = runs.configured(
        tmp_path, model, sizes=(8,), lora={"r": 2}, reference="multi", multi={"models": [str(stage)], "epsilon": 0.3}
    )
    runs.train(config)
    (data,) = prepare(config).stages
    parts = [scored(path, data) for path in (model, stage)]
    scores = load_file(tmp_path / "run/stage-1-s1/reference_logps.safetensors")
    for i in range(len(data.tokens)):
        wanted = by_hand([p[i] for p in parts], 0.3, "adaptive")
        assert [float(scores[side][i]) for side in ("chosen", "rejected")] == pytest.approx(wanted, rel=3e-6)
