"""The checks at a stage's start: each error names the pair, both numbers and the usual causes."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdpo_kernels.stepwise import stage as stage_module
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models import load as models
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.references.cache import read_scores
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.training.start_guard import LN2, StartGuard, cache_tolerance
from tests.stepwise import runs

SUMS = torch.tensor([-10.0, -20.0, -0.5, -40.0])  # two pairs: chosen, chosen, rejected, rejected
WHERE = [f"d.jsonl:{i}" for i in range(9)]


def check(policy=SUMS, fresh=SUMS, cached=SUMS, loss=LN2, tolerance=1e-5, start=LN2):
    StartGuard("easy", WHERE, start, tolerance).check(torch.tensor([7, 3]), policy, fresh, cached, loss)


def test_equal_scores_pass():
    check()
    check(cached=SUMS * (1 + 9e-6))
    check(policy=SUMS * (1 + 5e-7))


@pytest.mark.parametrize(("place", "where", "side"), [(0, 7, "chosen"), (1, 3, "chosen"), (3, 3, "rejected")])
def test_a_stale_cache_names_the_pair_and_both_numbers(place, where, side):
    cached = SUMS.clone()
    cached[place] *= 1 + 1e-4
    with pytest.raises(UserError) as error:
        check(cached=cached)
    text = str(error.value)
    assert f"stage easy: log-prob of the {side} answer of pair d.jsonl:{where}" in text
    assert f"rescoring gives {SUMS[place]:.6f}" in text
    assert f"the reference cache holds {cached[place]:.6f}" in text
    assert "stale reference cache" in text
    assert "\n" not in text


def test_the_worst_pair_is_the_one_named_and_nan_is_worst():
    cached = SUMS * torch.tensor([1.001, 1.01, 1, 1])
    with pytest.raises(UserError, match=r"chosen answer of pair d\.jsonl:3"):
        check(cached=cached)
    cached[2] = math.nan
    with pytest.raises(UserError, match=r"rejected answer of pair d\.jsonl:7"):
        check(cached=cached)


def test_short_answers_have_an_absolute_bound():
    """A log-prob of -0.001 nat cannot be held to 1e-6 of itself: below one nat the bound is absolute."""
    tiny = torch.full((4,), -1e-3)
    check(tiny + 5e-7, tiny, tiny)
    with pytest.raises(UserError, match="training mode"):
        check(tiny + 5e-6, tiny, tiny)


def test_a_policy_that_is_not_its_reference_is_not_called_a_stale_cache():
    with pytest.raises(UserError, match=r"in training mode gives -10\.0001.*dropout"):
        check(policy=SUMS * (1 + 1e-5))


def test_the_first_loss_must_be_the_losss_start_value():
    check(loss=LN2 + 9e-4)
    for loss in (LN2 + 2e-3, math.nan):
        with pytest.raises(UserError, match=r"stage easy: the first loss was .* must be ln 2 = 0\.693147"):
            check(loss=loss)
    check(loss=1.5 * LN2 + 1e-3, start=1.5 * LN2)
    with pytest.raises(UserError, match=r"stage easy: the first loss was .* must be 1\.5 ln 2 = 1\.039721"):
        check(loss=LN2, start=1.5 * LN2)
    check(loss=25.0, start=None)


def test_the_bound_is_tight_if_scores_do_not_depend_on_the_batch():
    assert cache_tolerance(True, torch.bfloat16, torch.float32) == 1e-5
    assert cache_tolerance(True, None, torch.float32) == 1e-5
    assert 1e-5 < cache_tolerance(False, None, torch.float32) < cache_tolerance(False, torch.bfloat16, torch.float32)
    assert cache_tolerance(False, None, torch.bfloat16) == cache_tolerance(False, torch.bfloat16, torch.float32)


# ---- in a real stage ----


@pytest.mark.parametrize("shift", [1e-4, 1e-2])
@pytest.mark.parametrize("trainer", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_a_cache_off_by_a_little_stops_the_stage(tmp_path, model, monkeypatch, shift, trainer):
    """Like the scores of a reference before an update at a small learning rate."""
    genuine = Scorer.score

    def stale(self, loaded, tokens, label):
        return genuine(self, loaded, tokens, label) * (1 + shift)

    monkeypatch.setattr(Scorer, "score", stale)
    with pytest.raises(UserError, match=r"pair .*data1\.jsonl:\d+: rescoring gives .* stale reference cache"):
        runs.train(runs.configured(tmp_path, model, trainer=trainer))


def test_dropout_left_on_stops_the_stage(tmp_path, monkeypatch):
    """Llama's dropout rate is an attribute of its attention layers, not a module."""
    folder = runs.make_model(tmp_path / "m", attention_dropout=0.1)
    config = runs.configured(tmp_path, folder)
    with monkeypatch.context() as patch:
        patch.setattr(models, "disable_dropout", lambda model: 0)
        with pytest.raises(UserError, match=r"pair .*data1\.jsonl:\d+: the policy in training mode .* dropout"):
            runs.train(config)
    assert runs.train(config)["stages"][0]["first_loss"] == pytest.approx(LN2, abs=1e-6)


def test_an_adapter_that_is_not_neutral_stops_the_stage(tmp_path, model, monkeypatch):
    genuine = stage_module.add_adapter

    def disturbed(loaded, lora):
        genuine(loaded, lora)
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)

    monkeypatch.setattr(stage_module, "add_adapter", disturbed)
    with pytest.raises(UserError, match=r"adapter that is not neutral|stale reference cache"):
        runs.train(runs.configured(tmp_path, model, lora={"r": 2}))


@pytest.mark.parametrize("name", ["logit_scale", "final_logit_softcapping"])
def test_a_wrong_head_stops_the_stage_before_any_step(tmp_path, model, monkeypatch, name):
    """The config has a scale or a softcap that the model's own code does not apply."""
    folder = runs.make_model(tmp_path / "m", **{name: 0.5})
    with pytest.raises(UserError, match=r"stage s1: model: fused log-probs .* differ from its own logits by") as error:
        runs.train(runs.configured(tmp_path, folder))
    assert "logit scale or softcap" in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or runs.metrics(tmp_path / "run") == []


def test_a_stage_that_does_not_start_as_its_reference_is_not_checked(tmp_path, model, monkeypatch):
    checked = []
    monkeypatch.setattr(StartGuard, "check", lambda self, *a: checked.append(self.stage))
    for reference, policy, stages in [
        ("previous", "previous", ["s1", "s2"]),
        ("initial", "previous", ["s1"]),
        ("previous", "initial", ["s1"]),
        ("initial", "initial", ["s1", "s2"]),
        ("none", "previous", []),
    ]:
        checked.clear()
        folder = tmp_path / f"{reference}-{policy}"
        folder.mkdir()
        runs.train(runs.configured(folder, model, sizes=(4, 4), reference=reference, policy=policy))
        assert checked == stages


def test_a_runs_caches_have_the_log_probs_of_the_reference(tmp_path, model):
    """Two floats a pair, under the previous stage's model, with chosen and rejected not swapped."""
    runs.train(runs.configured(tmp_path, model))
    run = tmp_path / "run"
    stages = prepare(runs.configured(tmp_path, model)).stages
    for data, before, after in zip(stages, (model, run / "stage-1-s1"), ("stage-1-s1", "stage-2-s2"), strict=True):
        scores, reason = read_scores(run / after / "reference_logps.safetensors", None, len(data.tokens))
        assert reason == ""
        network = AutoModelForCausalLM.from_pretrained(before).double()
        for i in range(len(data.tokens)):
            for side, sequence in enumerate(data.tokens[i]):
                ids = torch.from_numpy(sequence.ids.astype("int64"))[None]
                with torch.no_grad():
                    logps = network(input_ids=ids).logits.log_softmax(-1)[0, :-1]
                wanted = logps.gather(1, ids[0, 1:, None])[max(1, sequence.prompt_length) - 1 :].sum()
                assert float(scores[i, side]) == pytest.approx(float(wanted), rel=2e-6)
