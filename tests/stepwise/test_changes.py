"""A run that resumes after something has changed: what no weight depends on may; contents are compared, not paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.record.changes import refused_settings
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_file import load_config
from tests.stepwise import runs

SIZES = (12, 8)


def stopped(monkeypatch, config, stage: str, step: int) -> None:
    """Train until the step `step` of `stage`, as if interrupted there."""
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage, step)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)


def weights(folder: Path) -> dict[str, str]:
    """Digests of the weights and reference log-probs of a run's stages."""
    names = ("model.safetensors", "reference_logps.safetensors")
    return {f"{p.parent.name}/{p.name}": runs.digest(p) for n in names for p in folder.glob(f"stage-*/{n}")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model) -> dict[str, str]:
    """The weights of a run of the stages s1, s2 and s3 that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    runs.train(runs.configured(folder, model, sizes=(*SIZES, 6)))
    return weights(folder / "run")


def of_two(whole: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in whole.items() if not name.startswith("stage-3")}


@pytest.mark.parametrize("by", ["its settings", "its own config.yaml"])
def test_a_run_whose_folder_model_and_data_moved_resumes(tmp_path, model, whole, monkeypatch, by):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    mine = shutil.copytree(model, old / "model")
    stopped(monkeypatch, runs.configured(old, mine, SIZES), stage="s2", step=2)
    shutil.move(old, new)
    config = load_config(new / "run.yaml", [f"output_dir={new / 'run'}", f"model={new / 'model'}"])
    if by == "its own config.yaml":
        config = load_config(new / "run" / "config.yaml", [f"model={new / 'model'}"])
        assert config.output_dir == str(new / "run")
    stages = [stage.model_copy(update={"data": (str(new / Path(stage.data[0]).name),)}) for stage in config.stages]
    manifest = runs.train(config.model_copy(update={"stages": tuple(stages)}))
    assert manifest["stages"][1]["resumed_at_step"] == 1
    assert manifest["model"] == str(new / "model")
    assert weights(new / "run") == of_two(whole)
    assert not old.exists()


def test_a_copys_config_trains_in_the_copy(tmp_path, model, whole, monkeypatch):
    config = runs.configured(tmp_path, model, SIZES)
    stopped(monkeypatch, config, stage="s2", step=1)
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = runs.fingerprint(tmp_path / "run")
    runs.train(load_config(copy / "config.yaml"))
    assert weights(copy) == of_two(whole)
    assert runs.fingerprint(tmp_path / "run") == before
    assert load_config(copy / "config.yaml", [f"output_dir={tmp_path}/third"]).output_dir == f"{tmp_path}/third"
    assert load_config(shutil.copy(copy / "config.yaml", tmp_path)).output_dir == str(copy)


def test_a_file_that_trainer_names_is_compared_by_what_is_in_it(tmp_path, model, monkeypatch):
    file = tmp_path / "accelerate.json"
    file.write_text(json.dumps({"non_blocking": False}))
    config = runs.configured(tmp_path, model, SIZES, trainer={"accelerator_config": str(file)})
    stopped(monkeypatch, config, stage="s1", step=2)

    file.write_text(json.dumps({"non_blocking": True}))
    for again in (runs.train, lambda config: check_run(config, Reporter(quiet=True))):
        with pytest.raises(UserError, match=r"trainer.accelerator_config.non_blocking: false -> true \(the steps"):
            again(config)
    file.write_text(json.dumps({"non_blocking": False}))
    moved = file.rename(tmp_path / "moved.json")
    trainer = config.trainer | {"accelerator_config": str(moved)}
    manifest = runs.train(config.model_copy(update={"trainer": trainer}))
    assert manifest["stages"][0]["resumed_at_step"] == 1
    assert manifest["trainer_files"] == {str(moved): {"non_blocking": False}}


def test_what_deepspeed_only_logs_may_change():
    def run_of(content: dict) -> dict:
        config = {"trainer": {"deepspeed": "zero.json"}, "stages": [{"name": "s1"}]}
        stages = [{"name": "s1", "state": "training"}]
        return {"config": config, "stages": stages, "trainer_files": {"zero.json": content}}

    before = {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": False}
    assert refused_settings(run_of(before), run_of(before | {"wall_clock_breakdown": True})) == []
    (line,) = refused_settings(run_of(before), run_of(before | {"zero_optimization": {"stage": 3}}))
    assert line.startswith("trainer.deepspeed.zero_optimization.stage: 2 -> 3")


def test_another_model_in_the_place_of_the_first_is_refused(tmp_path, model, monkeypatch):
    config = runs.configured(tmp_path, model, SIZES)
    stopped(monkeypatch, config, stage="s2", step=1)
    other = shutil.copytree(model, tmp_path / "other")
    tensors = {name: tensor * 1.01 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{other}: its weights have changed since this run was started"):
        runs.train(runs.configured(tmp_path, other, SIZES))
    with pytest.raises(UserError, match=r"other: its weights have changed"):  # and again
        runs.train(runs.configured(tmp_path, other, SIZES))
    assert runs.train(config)["stages"][1]["state"] == "done"


# values that are not the tests' own
FREE = {
    "logging_steps": 2,
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 5,
    "dataloader_num_workers": 1,
    "report_to": "tensorboard",
    "gradient_checkpointing": True,
}


def test_settings_that_no_weight_depends_on_may_change(tmp_path, model, whole, monkeypatch):
    stopped(monkeypatch, runs.configured(tmp_path, model, SIZES), stage="s1", step=3)
    evaluation = runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(5, seed=9))
    config = runs.configured(tmp_path, model, SIZES, eval_data=str(evaluation), trainer=FREE, on_bad_row="skip")
    check_run(config, Reporter(quiet=True))
    manifest = runs.train(config)
    assert weights(tmp_path / "run") == of_two(whole)
    assert manifest["config"]["trainer"]["eval_steps"] == 1
    assert [stage["eval"]["pairs"] for stage in manifest["stages"]] == [5, 5]
    assert [line for line in runs.metrics(tmp_path / "run") if "eval_loss" in line]


def test_a_stage_appended_to_a_finished_run_is_trained(tmp_path, model, whole):
    first = runs.train(runs.configured(tmp_path, model, SIZES))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("stage-*/*")}
    manifest = runs.train(runs.configured(tmp_path, model, (*SIZES, 6)))
    assert weights(tmp_path / "run") == whole
    assert manifest["stages"][:2] == first["stages"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_stage_appended_to_a_running_run(tmp_path, model, whole, monkeypatch):
    stopped(monkeypatch, runs.configured(tmp_path, model, SIZES), stage="s1", step=2)
    runs.train(runs.configured(tmp_path, model, (*SIZES, 6)))
    assert weights(tmp_path / "run") == whole


def test_a_stage_appended_to_a_ranked_order_comes_last(tmp_path, model):
    """By its score it would come first."""
    for number, score in ((1, -1.0), (2, 1.0), (3, 2.0)):
        rows = [
            row | {"s": score if row_number else -score} for row_number, row in enumerate(runs.make_rows(6, number))
        ]
        runs.write_rows(tmp_path / f"data{number}.jsonl", rows)
    settings = {"order": "pair_accuracy", "score_column": "s"}
    runs.train(runs.configured(tmp_path, model, (6, 6), **settings))

    # earlier versions called this order by the paper's name
    path = tmp_path / "run" / "manifest.json"
    path.write_text(path.read_text().replace('"order": "pair_accuracy"', '"order": "reward_accuracy"'))
    assert json.loads(path.read_text())["config"]["order"] == "reward_accuracy"

    manifest = runs.train(runs.configured(tmp_path, model, (6, 6, 6), **settings))
    assert [stage["name"] for stage in manifest["stages"]] == ["s2", "s1", "s3"]


def test_a_stage_that_has_not_started_may_change_or_go(tmp_path, model, whole, monkeypatch):
    stopped(monkeypatch, runs.configured(tmp_path, model, (*SIZES, 6)), stage="s1", step=2)
    runs.write_rows(tmp_path / "data3.jsonl", runs.make_rows(4, seed=7))
    config = load_config(tmp_path / "run.yaml", ["stages.2.beta=0.5"])
    runs.train(config.model_copy(update={"stages": config.stages[::2]}))
    digests = weights(tmp_path / "run")
    assert digests["stage-1-s1/model.safetensors"] == whole["stage-1-s1/model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "run").glob("stage-*")) == ["stage-1-s1", "stage-2-s3"]


def test_nothing_is_fixed_before_the_first_stage_has_started(tmp_path, model, monkeypatch):
    evaluation = str(runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(5, seed=9)))
    with monkeypatch.context() as patch:
        patch.setattr("sdpo_kernels.stepwise.run.train_stage", lambda stage: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runs.train(runs.configured(tmp_path, model, SIZES, eval_data=evaluation))
    other = runs.make_model(tmp_path / "other", seed=5)
    config = runs.configured(tmp_path, other, SIZES, eval_data=evaluation, beta=0.3)
    manifest = runs.train(config)
    alone = tmp_path / "alone"
    alone.mkdir()
    assert (
        manifest["initial_eval"]
        == runs.train(runs.configured(alone, other, SIZES, eval_data=evaluation, beta=0.3))["initial_eval"]
    )
    assert weights(tmp_path / "run") == weights(alone / "run")


@pytest.mark.parametrize("first", ["none", "other pairs"])
def test_new_evaluation_data_is_scored_with_the_models_there_are(tmp_path, model, first):
    """The same scores as if it had been there from the start."""
    other = runs.write_rows(tmp_path / "other.jsonl", runs.make_rows(7, seed=8))
    evaluation = str(runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(5, seed=9)))
    runs.train(runs.configured(tmp_path, model, SIZES, **({} if first == "none" else {"eval_data": str(other)})))
    digests = weights(tmp_path / "run")
    manifest = runs.train(runs.configured(tmp_path, model, SIZES, eval_data=evaluation))
    assert weights(tmp_path / "run") == digests
    (tmp_path / "alone").mkdir()
    alone = runs.train(runs.configured(tmp_path / "alone", model, SIZES, eval_data=evaluation))
    assert manifest["initial_eval"] == alone["initial_eval"]
    assert [stage["eval"] for stage in manifest["stages"]] == [stage["eval"] for stage in alone["stages"]]

    # without it again, what was scored stays
    assert runs.train(runs.configured(tmp_path, model, SIZES))["initial_eval"] == manifest["initial_eval"]


def test_what_may_not_change_is_listed_with_both_values_and_why(tmp_path, model, monkeypatch):
    stopped(monkeypatch, runs.configured(tmp_path, model, SIZES), stage="s2", step=1)
    changed = {"max_length": 64, "lora": {"r": 2}, "trainer": {"learning_rate": 1e-3, "logging_steps": 3}}
    config = runs.configured(tmp_path, model, SIZES, **changed)
    for command in (runs.train, lambda config: check_run(config, Reporter(quiet=True))):
        with pytest.raises(UserError) as raised:
            command(config)
        text = str(raised.value)
        assert "max_length: 1024 -> 64 (the tokens depend on it)" in text
        assert text.count("trainer.learning_rate: 0.01 -> 0.001 (the steps that are done depend on it)") == 1
        assert "lora" in text
        assert "logging_steps" not in text

    # the same settings in another place are no change
    own = load_config(tmp_path / "run.yaml").model_dump()["trainer"] | {"learning_rate": 0.5}
    settings = {"trainer": own, "lora": None, "max_length": 1024}
    write = runs.configured(tmp_path, model, SIZES, **settings)
    stages = tuple(s.model_copy(update={"trainer": {"learning_rate": 0.01}, "beta": 0.1}) for s in write.stages)
    assert runs.train(write.model_copy(update={"stages": stages, "beta": 0.7}))["stages"][1]["state"] == "done"


# ---- weights that are gone ----


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: shutil.rmtree(folder), "the folder is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "contains neither model.safetensors nor "),
        (
            lambda folder: cut(folder / "model.safetensors"),
            "model.safetensors: cannot be read as safetensors: .*incomplete",
        ),
    ],
)
def test_a_finished_run_without_its_result_is_an_error(tmp_path, model, damage, problem):
    config = runs.configured(tmp_path, model, SIZES)
    runs.train(config)
    damage(tmp_path / "run" / "stage-2-s2")
    with pytest.raises(UserError, match=rf"stage-2-s2: {problem}.*, although the stage is finished; put it back"):
        runs.train(config)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_an_earlier_stage_may_be_deleted_once_nothing_needs_it(tmp_path, model, spoken):
    config = runs.configured(tmp_path, model, SIZES)
    runs.train(config)
    shutil.rmtree(tmp_path / "run" / "stage-1-s1")
    run(config, spoken.reporter)
    assert "stage-1-s1: the folder is missing, although the stage is finished; nothing needs it any more" in spoken.text
    assert "nothing to do" in spoken.text


@pytest.mark.parametrize("start", ["previous", "initial"])
def test_the_next_stage_needs_the_one_before_if_it_starts_from_it(tmp_path, model, monkeypatch, start):
    config = runs.configured(tmp_path, model, SIZES, policy=start, reference=start)
    stopped(monkeypatch, config, stage="s2", step=1)
    shutil.rmtree(tmp_path / "run" / "stage-1-s1")
    if start == "initial":
        assert runs.train(config)["stages"][1]["state"] == "done"
    else:
        with pytest.raises(UserError, match="stage-1-s1: the folder is missing"):
            runs.train(config)
