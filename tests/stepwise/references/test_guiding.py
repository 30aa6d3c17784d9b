"""`reference: guiding` (Pre-DPO): the policy starts from M₀ and is compared with another model, trained before."""

import json
import shutil

import pytest
import torch
from torch.nn.functional import logsigmoid

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.references.cache import read_scores
from tests.stepwise import runs
from tests.stepwise.references.test_multi import scored


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Another model with the same vocabulary, of another size."""
    return runs.make_model(tmp_path_factory.mktemp("guide") / "model", seed=1, hidden_size=8)


def truth(model, guide, data, beta):
    """The DPO loss of all pairs from log-probs in float64."""
    gamma, of_guide = ((scores[:, 0] - scores[:, 1]) for scores in map(torch.tensor, (model, guide)))
    return float(-logsigmoid(beta * (gamma - of_guide)).mean())


def test_the_reference_of_every_stage_is_the_guide(tmp_path, model, guide):
    config = runs.configured(tmp_path, model, sizes=(4, 4), reference="guiding", guiding=str(guide), beta=0.2)
    manifest = runs.train(config)

    # a batch is a whole stage, so the first loss is of all its pairs
    starts = (model, tmp_path / "run/stage-1-s1")
    for data, start, record in zip(prepare(config).stages, starts, manifest["stages"], strict=True):
        of_guide = scored(guide, data)
        assert record["first_loss"] == pytest.approx(truth(scored(start, data), of_guide, data, 0.2), rel=1e-5)
        folder = tmp_path / f"run/stage-{record['index']}-{record['name']}"
        scores, _ = read_scores(folder / "reference_logps.safetensors", None, len(data.tokens))
        assert scores.flatten().tolist() == pytest.approx([value for row in of_guide for value in row], rel=3e-6)

    known = json.loads((tmp_path / "run/manifest.json").read_text())["weights"]
    assert set(known) == {"initial", "stage-1-s1", "guiding"}
    assert known["guiding"] == manifest["stages"][0]["reference_hash"]
    assert runs.leftovers(tmp_path / "run") == []


def test_the_guide_may_be_the_policy_of_an_earlier_run(tmp_path, model):
    """Pre-DPO as it is used: the second run starts where the first one started, and ends elsewhere."""
    for name, more in (
        ("first", {}),
        ("second", {"reference": "guiding", "guiding": str(tmp_path / "first/run/stage-1-s1")}),
    ):
        (tmp_path / name).mkdir()
        runs.train(runs.configured(tmp_path / name, model, sizes=(8,), **more))
    first, second = (runs.digest(tmp_path / name / "run/stage-1-s1/model.safetensors") for name in ("first", "second"))
    assert first != second


def test_evaluations_are_relative_to_the_guide(tmp_path, model, guide):
    evaluation = runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(5, seed=9))
    trainer = {"eval_strategy": "steps", "eval_steps": 50, "eval_on_start": True}
    settings = {"reference": "guiding", "guiding": str(guide), "eval_data": str(evaluation), "trainer": trainer}
    config = runs.configured(tmp_path, model, sizes=(8,), **settings)
    runs.train(config)
    line = next(line for line in runs.metrics(tmp_path / "run") if "eval_loss" in line)
    data = prepare(
        runs.configured(tmp_path, model, sizes=(8,), stages=[{"name": "e", "data": str(evaluation)}])
    ).stages[0]
    assert line["eval_loss"] == pytest.approx(truth(scored(model, data), scored(guide, data), data, 0.1), rel=1e-5)


def test_a_stopped_run_goes_on_with_the_guide_elsewhere_but_not_with_another(tmp_path, model, guide):
    own = tmp_path / "own"
    shutil.copytree(guide, own)
    with pytest.MonkeyPatch.context() as patch:
        runs.stop_at(patch, stage="s2", step=2)
        with pytest.raises(KeyboardInterrupt):
            runs.train(
                runs.configured(tmp_path, model, reference="guiding", guiding=str(own), trainer={"save_steps": 1})
            )

    other = runs.make_model(tmp_path / "other", seed=2)
    with pytest.raises(UserError, match=r"other: its weights have changed since this run was started"):
        runs.train(runs.configured(tmp_path, model, reference="guiding", guiding=str(other), trainer={"save_steps": 1}))

    moved = own.rename(tmp_path / "moved")
    runs.train(runs.configured(tmp_path, model, reference="guiding", guiding=str(moved), trainer={"save_steps": 1}))
    whole = tmp_path / "whole"
    whole.mkdir()
    runs.train(runs.configured(whole, model, reference="guiding", guiding=str(guide), trainer={"save_steps": 1}))
    assert runs.fingerprint(tmp_path / "run") == runs.fingerprint(whole / "run")


def test_a_guide_from_a_lora_run_is_scored_with_its_merged_weights(tmp_path, model, guide):
    """Its adapter fits the base of its own run, which is not this run's."""
    first = tmp_path / "first"
    first.mkdir()
    runs.train(runs.configured(first, guide, sizes=(8,), lora={"r": 2}))
    stage = first / "run/stage-1-s1"
    config = runs.configured(
        tmp_path, model, sizes=(4,), lora={"r": 2}, reference="guiding", guiding=str(stage), beta=0.2
    )
    manifest = runs.train(config)
    (data,) = prepare(config).stages
    wanted = truth(scored(model, data), scored(stage, data), data, 0.2)
    assert manifest["stages"][0]["first_loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_guide_with_another_vocabulary_is_an_error_before_training(tmp_path, model, guide):
    other = tmp_path / "other"
    shutil.copytree(guide, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"word0"', '"else0"'))
    with pytest.raises(UserError, match=r"guiding: .*other: .*vocabulary"):
        prepare(runs.configured(tmp_path, model, reference="guiding", guiding=str(other)))
