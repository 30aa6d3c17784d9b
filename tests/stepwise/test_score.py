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
    with pytest.raises(UserError, match=r"^--model .*nonesuch: there is no folder .*nonesuch$"):
        score_run(config, [str(folder / "nonesuch")], [], as_json=True)


def test_a_model_with_other_words_is_a_one_line_error(finished, tmp_path):
    """Its embedding may lack the run's tokens, or have other words there."""
    config, _, _ = finished
    small = runs.make_model(tmp_path / "small", vocab_size=20)
    with pytest.raises(UserError, match=r"^--model .*small: the tokenizer produces token \d+, .* ends at 19; [^\n]*$"):
        score_run(config, [str(small)], [], as_json=True)

    swapped = runs.make_model(tmp_path / "swapped")
    file = swapped / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["good1"], words["bad1"] = words["bad1"], words["good1"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(
        UserError, match=r"^--model .*swapped: its tokenizer differs from the model's in 2 tokens: 'bad1'"
    ):
        score_run(config, [str(swapped)], [], as_json=True)


def test_a_stage_of_another_lora_run_is_scored_by_its_merged_weights(tmp_path, capsys):
    """Its adapter belongs on its own base, not on that of the run that scores it."""
    bases = {name: runs.make_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1))}
    data = str(runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(4, seed=9)))
    configs = {}
    for name, base in bases.items():
        (tmp_path / f"run-{name}").mkdir()
        settings = {"sizes": (4,), "lora": {"r": 2}, "trainer": {"learning_rate": 0.1}}
        configs[name] = runs.configured(tmp_path / f"run-{name}", base, **settings)
    runs.train(configs["b"])
    stage = f"{configs['b'].output_dir}/stage-1-s1"
    own = scored(capsys, configs["b"], [stage], [data])[stage]["gamma"]
    foreign = scored(capsys, configs["a"], [stage], [data])[stage]["gamma"]
    assert foreign == pytest.approx(own, rel=1e-4)
