"""A run's `post: {expo: …}`: settings, the folder it writes, kills, and what check, score and the report show."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.models.merge import merge_adapter
from sdpo_kernels.stepwise.post import after_run
from sdpo_kernels.stepwise.record.expo_record import expo_line
from sdpo_kernels.stepwise.record.manifest import Manifest
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.score import score_run
from sdpo_kernels.stepwise.settings.post import ALPHAS
from sdpo_kernels.stepwise.settings.run_file import dump_config, load_config
from tests.stepwise import runs
from tests.stepwise.runs import Child, die


def configured(folder, model, expo: dict[str, Any], **settings: Any):
    if not settings.pop("without_eval", False):
        settings["eval_data"] = str(runs.write_rows(folder / "e.jsonl", runs.make_rows(5, seed=9)))
    return runs.configured(folder, model, **{"sizes": (8, 4), "post": {"expo": expo}, **settings})


def weights(folder):
    return load_file(folder / "model.safetensors")


# ---- settings ----


def test_settings_and_their_defaults(tmp_path, model):
    expo = configured(tmp_path, model, {}).post.expo
    assert (expo.alpha, expo.alphas, expo.start, expo.metric) == (ALPHAS, ALPHAS, "initial", None)
    expo = configured(tmp_path, model, {"alpha": 1, "from": "previous"}, without_eval=True).post.expo
    assert (expo.alpha, expo.alphas, expo.start) == (1.0, None, "previous")
    assert runs.configured(tmp_path, model, post=None).post is None
    config = configured(tmp_path, model, {"alpha": [0.2, 0.4], "metric": "gamma", "from": "previous"})
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert "from: previous" in path.read_text()
    assert load_config(path) == config
    assert load_config(path, ["post.expo.alpha=0.3", "post.expo.metric=null"]).post.expo.alpha == 0.3


NUMBERS = "must be a number above 0 or a list of such numbers"
MISTAKES = [
    ({"alhpa": 1}, {}, "post.expo.alhpa: unknown key; did you mean 'alpha'?"),
    ({"start": "initial"}, {}, "post.expo.start: unknown key; must be one of alpha, from, metric"),
    ({"from": "first"}, {}, "post.expo.from: was 'first', must be 'initial' or 'previous'"),
    ({"alpha": 0}, {}, f"post.expo.alpha: was 0, {NUMBERS}"),
    ({"alpha": [0.1, -1]}, {}, f"post.expo.alpha: was [0.1, -1], {NUMBERS}"),
    ({"alpha": []}, {}, f"post.expo.alpha: was [], {NUMBERS}"),
    ({"alpha": True}, {}, f"post.expo.alpha: was true, {NUMBERS}"),
    ({"alpha": "0.3"}, {}, f"post.expo.alpha: was '0.3', {NUMBERS}"),
    ({"alpha": [0.1], "metric": "loss"}, {}, "post.expo.metric: was 'loss', must be 'pair_accuracy', "),
    ({"alpha": 0.1, "metric": "gamma"}, {}, "post.expo.metric: was 'gamma', but is used only with a list in post.expo"),
    ({"alpha": [0.1]}, {"without_eval": True}, "eval_data: is required with a list in post.expo.alpha"),
    ({"from": "previous"}, {"policy": "initial"}, "post.expo.from: was 'previous', must be initial: with policy:"),
    ({"from": "previous"}, {"lora": {}, "dtype": "bfloat16"}, "post.expo.from: was 'previous', must be initial with"),
]


@pytest.mark.parametrize(("expo", "settings", "message"), MISTAKES)
def test_mistakes_are_reported_in_one_line(tmp_path, model, expo, settings, message):
    with pytest.raises(UserError) as raised:
        configured(tmp_path, model, expo, **settings)
    assert str(raised.value).startswith(f"{tmp_path}/run.yaml: {message}")
    assert "\n" not in str(raised.value)


def test_an_unknown_post_step(tmp_path, model):
    with pytest.raises(UserError, match=r"post.exp: unknown key; did you mean 'expo'\?"):
        runs.configured(tmp_path, model, post={"exp": {}})
    with pytest.raises(UserError, match=r"post: was 3, must be a mapping"):
        runs.configured(tmp_path, model, post=3)


def test_a_hub_model_is_refused_before_training(tmp_path, model, monkeypatch):
    config = configured(tmp_path, model, {"alpha": 0.3}).model_copy(update={"model": "org/model"})
    with pytest.raises(UserError, match=r"^post.expo: needs the model's own files: org/model: is not a folder"):
        runs.train(config)
    assert not (tmp_path / "run").exists()


def test_the_example_loads(tmp_path, monkeypatch):
    (tmp_path / "runs/methods/start/start").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_config(Path(__file__).resolve().parents[3] / "examples/methods/expo.yaml")
    assert (config.post.expo.alphas, config.post.expo.metric) == (ALPHAS, "pair_accuracy")
    assert len(config.stages) == 3


# ---- runs ----


def test_a_given_alpha_from_the_initial_model(tmp_path, model, spoken, pictures):
    config = configured(tmp_path, model, {"alpha": 0.5}, without_eval=True)
    manifest = run(config, spoken.reporter)
    folder = tmp_path / "run"
    before, after, made = weights(model), weights(folder / "stage-2-s2"), weights(folder / "expo")
    for name, tensor in made.items():
        assert torch.allclose(tensor, after[name] + 0.5 * (after[name] - before[name]), rtol=1e-6, atol=1e-7)
    record = manifest["post"]["expo"]
    assert (record["alpha"], record["from"], record["theta0"], record["theta1"]) == (0.5, "initial", str(model), "s2")
    assert (record["metric"], record["scores"], record["eval"]) == (None, None, None)
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert json.loads((folder / "expo" / "expo.json").read_text()) == record
    assert "expo: α 0.5 from initial" in spoken.text
    assert "expo: α 0.5 from initial" in (folder / "report.html").read_text()
    assert runs.leftovers(folder) == []
    stamp = (folder / "expo" / "model.safetensors").stat().st_mtime_ns
    assert runs.train(config) == manifest
    assert (folder / "expo" / "model.safetensors").stat().st_mtime_ns == stamp


def test_another_alpha_or_another_last_stage_keeps_the_earlier_result(tmp_path, model, spoken):
    folder = tmp_path / "run"
    runs.train(configured(tmp_path, model, {"alpha": 0.5}, without_eval=True))
    first = runs.digest(folder / "expo" / "model.safetensors")
    run(configured(tmp_path, model, {"alpha": 0.4}, without_eval=True), spoken.reporter)
    second = runs.digest(folder / "expo" / "model.safetensors")
    assert f"expo: the earlier result, of stage s2, is now in {folder}/expo-s2" in spoken.text
    assert runs.digest(folder / "expo-s2" / "model.safetensors") == first != second

    manifest = runs.train(configured(tmp_path, model, {"alpha": 0.4}, without_eval=True, sizes=(12, 8, 6)))
    assert manifest["post"]["expo"]["theta1"] == "s3"
    assert runs.digest(folder / "expo-s2-2" / "model.safetensors") == second
    made = weights(folder / "expo")
    before, after = weights(model), weights(folder / "stage-3-s3")
    for name, tensor in made.items():
        assert torch.allclose(tensor, after[name] + 0.4 * (after[name] - before[name]), rtol=1e-6, atol=1e-7)


def test_a_search_on_the_evaluation_pairs(tmp_path, model, capsys):
    """The best α is kept; the trials' scores are those of the models, and the folder scores like its trial."""
    expo = {"alpha": [0.2, 0.4], "metric": "reward_margin"}  # small steps: the margin still grows with α
    config = configured(tmp_path, model, expo, trainer={"learning_rate": 1e-3})
    manifest = runs.train(config)
    folder, record = tmp_path / "run", manifest["post"]["expo"]
    scores = record["scores"]
    assert list(scores) == ["0", "0.2", "0.4"]
    assert scores["0"] == manifest["stages"][1]["eval"]["reward_margin"]
    assert scores["0"] < scores["0.2"] < scores["0.4"] == record["eval"]["reward_margin"]
    assert record["alpha"] == 0.4
    before, after, made = (weights(path) for path in (model, folder / "stage-2-s2", folder / "expo"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(made[name], after[name] + 0.4 * (after[name] - before[name]), rtol=1e-6, atol=1e-7)
    assert "| 0.2 | " in (folder / "expo" / "README.md").read_text()
    capsys.readouterr()
    score_run(config, [], [], as_json=True)
    scored = json.loads(capsys.readouterr().out)
    assert list(scored)[-1] == str(folder / "expo")
    assert scored[str(folder / "expo")]["reward_margin"] == pytest.approx(scores["0.4"], rel=1e-6)


def test_no_gain_keeps_the_last_stage_and_reports_it(tmp_path, model, monkeypatch, spoken):
    monkeypatch.setattr(after_run, "_evaluate", lambda *args: {"pair_accuracy": 0.5})
    manifest = run(configured(tmp_path, model, {"alpha": [0.2]}), spoken.reporter)
    assert manifest["post"]["expo"]["alpha"] == 0
    assert "no α above 0 scored higher than the last stage's pair_accuracy 0.5" in spoken.text
    made, last = (tmp_path / "run" / name / "model.safetensors" for name in ("expo", "stage-2-s2"))
    assert made.read_bytes() == last.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_run_keeps_a_scaled_adapter(tmp_path, model, dtype):
    config = configured(tmp_path, model, {"alpha": 0.5}, lora={"r": 2}, dtype=dtype)
    runs.train(config)
    folder = tmp_path / "run"
    before, after = (load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("stage-2-s2", "expo"))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor * 1.5 if "lora_B" in name else tensor)
    merged = merge_adapter(folder / "expo" / "adapter", config).state_dict()
    for name, tensor in weights(folder / "expo").items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name


def test_a_lora_run_from_the_previous_stage_keeps_merged_weights_only(tmp_path, model):
    runs.train(configured(tmp_path, model, {"alpha": 0.5, "from": "previous"}, lora={"r": 2}))
    folder = tmp_path / "run"
    assert not (folder / "expo" / "adapter").exists()
    before, after, made = (weights(folder / name) for name in ("stage-1-s1", "stage-2-s2", "expo"))
    for name, tensor in made.items():
        assert torch.allclose(tensor, after[name] + 0.5 * (after[name] - before[name]), rtol=1e-6, atol=1e-7)


def test_check_shows_what_will_be_done(tmp_path, model):
    stream = io.StringIO()
    check_run(configured(tmp_path, model, {}), Reporter(console=Console(file=stream, width=200, highlight=False)))
    assert f"post       expo from initial, the best α of 0, 0.1, 0.2, 0.3, 0.4, 0.5, into {tmp_path}/run/expo" in (
        stream.getvalue()
    )


def test_a_folder_from_elsewhere_is_not_touched(tmp_path, model):
    config = configured(tmp_path, model, {"alpha": 0.5}, without_eval=True)
    (tmp_path / "run" / "expo").mkdir(parents=True)
    (tmp_path / "run" / "expo" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"run/expo does not belong to this run; move it away"):
        runs.train(config)
    (tmp_path / "run" / "expo").rename(tmp_path / "mine")
    assert runs.train(config)["post"]["expo"]["alpha"] == 0.5


@pytest.mark.parametrize(
    "record", [None, 3, {}, {"alpha": "x", "from": 1}, {"alpha": 1, "from": "x", "scores": {"2": 1}}]
)
def test_an_edited_manifest_gives_no_line(record):
    assert expo_line({"post": {"expo": record}}) is None
    assert expo_line({"post": record}) is None
    assert expo_line({}) is None


# ---- kills ----


def _die_before_the_rename() -> None:
    def publish(staging, final):
        die()

    after_run.publish_folder = publish


def test_a_kill_at_any_moment(tmp_path, model, monkeypatch):
    """Before the rename and after it: running the command again gives the folder of a run that was not killed."""
    expo, kept = {"alpha": [0.2, 0.4], "metric": "gamma"}, str(tmp_path / "whole")
    whole = runs.train(configured(tmp_path, model, expo, output_dir=kept))
    config = configured(tmp_path, model, expo)
    folder = tmp_path / "run"
    child = Child(tmp_path, "train", tmp_path / "run.yaml", "-q", fault=_die_before_the_rename)
    assert child.wait() == -9, child.text
    assert (folder / ".expo" / "finished" / "expo.json").exists()
    assert not (folder / "expo").exists()

    def stopped(self):
        raise KeyboardInterrupt  # nothing cleans up after it: the disk is as a kill leaves it

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    assert "post" not in json.loads((folder / "manifest.json").read_text())
    stamp = (folder / "expo").stat().st_mtime_ns
    manifest = runs.train(config)
    assert (folder / "expo").stat().st_mtime_ns == stamp  # not redone
    assert runs.leftovers(folder) == []
    for name in ("model.safetensors", "eval_logps.safetensors"):
        assert runs.digest(folder / "expo" / name) == runs.digest(tmp_path / "whole" / "expo" / name)
    for found in (manifest, whole):
        del found["post"]["expo"]["seconds"]
    assert manifest["post"] == whole["post"]
