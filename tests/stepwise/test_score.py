"""`sdpo score`: the run's models or others, on its evaluation pairs or other data."""

import json

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.score import score_run
from tests.stepwise import runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """A finished run with evaluation data."""
    folder = tmp_path_factory.mktemp("score")
    evaluation = runs.write_rows(folder / "e.jsonl", runs.make_rows(7, seed=9))
    config = runs.configured(folder, model, eval_data=str(evaluation))
    return config, runs.train(config), folder


def scored(capsys, config, models=(), data=()):
    capsys.readouterr()
    score_run(config, models, data, as_json=True)
    return json.loads(capsys.readouterr().out)


def test_scores_are_those_of_the_manifest(finished, capsys):
    config, manifest, folder = finished
    results = scored(capsys, config)
    assert list(results) == [config.model, *(f"{folder}/run/stage-{i}-s{i}" for i in (1, 2))]
    kept = [manifest["initial_eval"], *(stage["eval"] for stage in manifest["stages"])]
    for got, wanted in zip(results.values(), kept, strict=True):
        assert {k: v for k, v in got.items() if v is not None} == pytest.approx(
            {k: v for k, v in wanted.items() if v is not None}, rel=1e-6
        )
        assert [k for k, v in got.items() if v is None] == [k for k, v in wanted.items() if v is None]


def test_other_models_on_other_data(finished, capsys):
    config, _, folder = finished
    data = folder / "data1.jsonl"  # what was trained on
    second = str(folder / "run" / "stage-2-s2")
    results = scored(capsys, config, [second, config.model], [str(data)])
    assert list(results) == [config.model, second]
    assert results[second]["pairs"] == 12
    assert results[second]["reward_margin"] > 0


def test_the_table(finished, capsys):
    config, manifest, _ = finished
    score_run(config, [], [], as_json=False)
    out = capsys.readouterr().out
    assert "stage-2-s2" in out
    assert f"{manifest['stages'][1]['eval']['pair_accuracy']:.3f}" in out


def test_no_data_is_an_error(tmp_path, model):
    with pytest.raises(UserError, match=r"eval_data: is not set.*--data"):
        score_run(runs.configured(tmp_path, model), [], [], as_json=False)


def test_a_missing_model_is_an_error(finished):
    config, _, folder = finished
    with pytest.raises(UserError, match="nonesuch cannot be loaded"):
        score_run(config, [str(folder / "nonesuch")], [], as_json=True)
