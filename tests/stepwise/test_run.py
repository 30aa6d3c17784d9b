"""The loop over stages: the files of a run, what a second command does, what stops it before training."""

import gc
import json
import os

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdpo_kernels.stepwise import run as run_module
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data import order as order_module
from sdpo_kernels.stepwise.report.run_report import read_run
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_file import load_config
from tests.stepwise import runs


@pytest.fixture
def evaluation(tmp_path):
    return str(runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(5, seed=9)))


def test_the_files_of_a_run(tmp_path, model, evaluation, pictures, spoken):
    config = runs.configured(tmp_path, model, eval_data=evaluation)
    returned = run(config, spoken.reporter)
    folder = tmp_path / "run"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == returned
    assert [stage["state"] for stage in manifest["stages"]] == ["done", "done"]
    for name in ("version", "model", "created", "environment", "config", "initial_eval"):
        assert manifest[name], name
    assert load_config(folder / "config.yaml") == config
    assert runs.leftovers(folder) == []
    for path in ("report.html", "loss.png", "stage-1-s1/README.md", "stage-2-s2/model.safetensors"):
        assert (folder / path).stat().st_size > 0
    assert read_run(folder).unreadable == []
    for stage in manifest["stages"]:
        assert stage["eval"]["pairs"] == 5
        assert stage["seconds"] > 0
        assert stage["peak_memory_bytes"] > 1e6
        assert json.loads((folder / f"stage-{stage['index']}-{stage['name']}" / "stage.json").read_text()) == stage
    names = {"stage/name", "stage/index", "step", "stage/global_step", "epoch", "loss", "learning_rate", "grad_norm"}
    names |= {f"rewards/{x}" for x in ("chosen", "rejected", "accuracies", "margins", "ties")}
    names |= {"logps/chosen", "logps/rejected"}
    lines = runs.metrics(folder)
    assert all(set(line) == names for line in lines)
    assert [line["stage/global_step"] for line in lines] == [1, 2, 3, 4, 5]
    for text in (
        "initial model: evaluation  5/5",
        "stage 1 of 2 s1: references  12/12",
        "stage 1 of 2 s1  3/3",
        "stage 1 of 2 s1: saving",
        "stage 1 of 2 s1: evaluation  5/5",
        "stage 2 of 2 s2  2/2",
        "report: ",
    ):
        assert text in spoken.text


def test_a_finished_run_has_nothing_to_do(tmp_path, model, evaluation, pictures, monkeypatch):
    config = runs.configured(tmp_path, model, eval_data=evaluation)
    runs.train(config)
    folder = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    spoken = runs.Spoken(tmp_path)
    monkeypatch.setattr(run_module, "train_stage", lambda stage: pytest.fail("trained again"))
    manifest = run(config, spoken.reporter)
    assert spoken.text.splitlines()[-1] == f"nothing to do: all 2 stages in {folder} are done"
    assert manifest["stages"][1]["state"] == "done"
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    changed = {path.name for path in before | after if before.get(path) != after.get(path)}
    assert changed <= {".lock", "config.yaml"}


def test_two_runs_are_the_same_to_the_bit_unless_the_seed_differs(tmp_path, model):
    prints = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        folder.mkdir()
        runs.train(runs.configured(folder, model, trainer={"seed": seed}))
        prints.append(runs.fingerprint(folder / "run"))
    assert prints[0] == prints[1]
    assert prints[0]["stage-2-s2/model.safetensors"] != prints[2]["stage-2-s2/model.safetensors"]


def test_a_changed_setting_is_an_error_that_lists_it(tmp_path, model):
    runs.train(runs.configured(tmp_path, model))
    before = runs.fingerprint(tmp_path / "run")
    with pytest.raises(UserError) as error:
        runs.train(runs.configured(tmp_path, model, beta=0.2, trainer={"learning_rate": 1e-3}))
    assert f"{tmp_path}/run already contains a run with different settings" in str(error.value)
    assert "beta: 0.1 -> 0.2" in str(error.value)
    assert "trainer.learning_rate: 0.01 -> 0.001" in str(error.value)
    assert runs.fingerprint(tmp_path / "run") == before


def test_changed_data_is_an_error_that_lists_it(tmp_path, model, evaluation):
    config = runs.configured(tmp_path, model, eval_data=evaluation)
    runs.train(config)
    rows = runs.make_rows(8, seed=2)
    rows[3]["chosen"] = " good1 good1"
    runs.write_rows(tmp_path / "data2.jsonl", rows)
    with pytest.raises(UserError, match=r"s2\.data_hash: \w+ -> \w+"):
        runs.train(config)


def test_orders_change_the_stages_of_a_run(tmp_path, model):
    """The initial model ranks the pairs; the manifest has the accuracies, and folders are numbered as trained."""
    rows = runs.make_rows(12, seed=3)
    config = runs.configured(tmp_path, model, sizes=(12,), order="margin", tiers=3)
    runs.write_rows(tmp_path / "data1.jsonl", rows)
    manifest = runs.train(config)
    assert [stage["name"] for stage in manifest["stages"]] == ["s1-1", "s1-2", "s1-3"]
    accuracies = [stage["accuracy_before"] for stage in manifest["stages"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > accuracies[-1]
    gammas = [stage["gamma_reference"] for stage in manifest["stages"][:1]]
    assert gammas[0] > 0
    assert (tmp_path / "run" / "stage-3-s1-3" / "model.safetensors").exists()
    assert runs.train(config)["stages"] == manifest["stages"]  # from the cached ranking


def test_pair_accuracy_trains_the_easiest_source_first(tmp_path, model):
    """The sources are listed hardest first."""
    easy = [row | {"s": 1.0} for row in runs.make_rows(4, seed=1)]
    hard = [row | {"s": -1.0} for row in runs.make_rows(4, seed=2)]
    runs.write_rows(tmp_path / "data1.jsonl", hard)
    runs.write_rows(tmp_path / "data2.jsonl", easy)
    config = runs.configured(tmp_path, model, sizes=(4, 4), order="pair_accuracy", score_column="s")
    manifest = runs.train(config)
    assert [(s["name"], s["accuracy_before"]) for s in manifest["stages"]] == [("s2", 1.0), ("s1", 0.0)]
    assert (tmp_path / "run" / "stage-1-s2").is_dir()


def test_a_run_keeps_its_order_even_if_the_ranking_has_changed(tmp_path, model, monkeypatch, spoken):
    """Rounding on another machine may swap two close sources: none may be trained twice or left out."""
    config = runs.configured(tmp_path, model, order="pair_accuracy")
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s1", step=1)
        patch.setattr(order_module, "_by_accuracy", lambda config, stages, score: list(stages[::-1]))
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    monkeypatch.setattr(order_module, "_by_accuracy", lambda config, stages, score: list(stages))
    run(config, spoken.reporter)
    assert "the run keeps the order it was started in (s2, s1); the ranking is different now" in spoken.text
    whole = tmp_path / "whole"
    whole.mkdir()
    monkeypatch.setattr(order_module, "_by_accuracy", lambda config, stages, score: list(stages[::-1]))
    runs.train(runs.configured(whole, model, order="pair_accuracy"))
    assert runs.fingerprint(tmp_path / "run") == runs.fingerprint(whole / "run")


@pytest.mark.parametrize("which", [{"reference": "initial"}, {"policy": "initial"}, {"reference": "none"}])
def test_an_initial_model_that_changes_during_a_run_is_an_error(tmp_path, monkeypatch, which):
    folder = runs.make_model(tmp_path / "model")
    config = runs.configured(tmp_path, folder, **which)
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s1" if "reference" in which and which["reference"] == "none" else "s2", step=1)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    runs.make_model(folder, seed=1)
    with pytest.raises(UserError, match="model: its weights have changed since this run was started"):
        runs.train(config)


@pytest.mark.parametrize("name", ["stage-1-s1", ".stage-1-s1"])
def test_a_stage_folder_without_a_manifest_is_an_error_and_left_alone(tmp_path, model, name):
    precious = tmp_path / "run" / name / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(UserError, match=rf"contains {name} but no manifest.json"):
        runs.train(runs.configured(tmp_path, model))
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("settings", [{"order": "random"}, {"order": "margin", "tiers": 2}], ids=lambda s: s["order"])
def test_dropped_pairs_are_counted_in_every_order(tmp_path, model, settings):
    sizes = (8,) if "tiers" in settings else (8, 8)
    config = runs.configured(tmp_path, model, sizes=sizes, max_length=12, **settings)
    rows = [row | {"prompt": " ".join(["word1"] * 20)} if place < 2 else row
            for place, row in enumerate(runs.make_rows(8))]  # fmt: skip
    runs.write_rows(tmp_path / "data1.jsonl", rows)
    stages = runs.train(config)["stages"]
    assert [stage["dropped"] for stage in stages] == [stage["cut_pairs"] for stage in stages] == [2, 0]
    lost = sum(len(row[side].split()) + 1 for row in rows[:2] for side in ("chosen", "rejected"))
    assert [stage["lost_tokens"] for stage in stages] == [lost, 0]


def test_cut_pairs_and_lost_tokens_are_in_the_manifest_the_card_and_the_report(tmp_path, model, pictures):
    rows = [row | {"prompt": "word1"} for row in runs.make_rows(8, longest=2)]
    rows[2]["chosen"] = " good1" * 9
    runs.write_rows(tmp_path / "data1.jsonl", rows)
    config = runs.configured(tmp_path, model, sizes=(8,), max_length=6)
    (stage,) = runs.train(config)["stages"]
    assert (stage["pairs"], stage["dropped"], stage["cut_pairs"], stage["lost_tokens"]) == (8, 0, 1, 5)
    card = (tmp_path / "run" / "stage-1-s1" / "README.md").read_text()
    assert "| pairs cut at 6 tokens | 1, losing 5 scored tokens |" in card
    assert "cut pairs" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_of_an_earlier_version_without_these_counts_goes_on(tmp_path, model):
    config = runs.configured(tmp_path, model)
    runs.train(config)
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    for stage in manifest["stages"]:
        del stage["cut_pairs"], stage["lost_tokens"]
    path.write_text(json.dumps(manifest))
    assert runs.train(config) == manifest


@pytest.mark.parametrize("sharing", ["auto", "off"])
def test_a_run_of_an_earlier_version_goes_on_with_shared_prompts_or_without(tmp_path, model, sharing):
    runs.train(runs.configured(tmp_path, model, prefix_sharing="off"))
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["prefix_sharing"]
    path.write_text(json.dumps(manifest))
    assert runs.train(runs.configured(tmp_path, model, prefix_sharing=sharing))["stages"] == manifest["stages"]


def test_evaluations_during_training(tmp_path, model, evaluation):
    """They have TRL's names and are against each stage's reference, so all rewards are 0 before the first step."""
    trainer = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    manifest = runs.train(runs.configured(tmp_path, model, eval_data=evaluation, trainer=trainer))
    lines = [line for line in runs.metrics(tmp_path / "run") if "eval_loss" in line]
    assert [(line["stage/index"], line["step"]) for line in lines] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    for line in lines:
        for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
            assert f"eval_{name}" in line
        if line["step"] == 0:
            assert line["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
            assert line["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
        else:
            assert line["eval_loss"] != pytest.approx(0.693147, abs=1e-5)
    # γ of the manifest is what the last evaluation of a stage sees, over batches of 3 and 2 pairs
    first = next(line for line in lines if line["stage/index"] == 2)
    assert manifest["stages"][0]["eval"]["pairs"] == 5
    assert first["eval_rewards/chosen"] == pytest.approx(0, abs=1e-6)


def test_the_evaluation_reference_of_initial_stays_the_initial_model(tmp_path, model, evaluation):
    trainer = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 8}
    settings = {"eval_data": evaluation, "reference": "initial", "trainer": trainer}
    manifest = runs.train(runs.configured(tmp_path, model, **settings))
    start = next(x for x in runs.metrics(tmp_path / "run") if "eval_loss" in x and x["stage/index"] == 2)
    scores = manifest["stages"][0]["eval"]  # of the same model against the same reference
    assert start["eval_rewards/margins"] == pytest.approx(scores["reward_margin"], abs=1e-6)
    assert start["eval_rewards/accuracies"] == pytest.approx(scores["reward_accuracy"])
    assert abs(scores["reward_margin"]) > 1e-4


def test_training_helps_on_unseen_pairs(tmp_path, model, evaluation):
    """Chosen and rejected answers use different words, which is soon learned."""
    rows = runs.make_rows(64, seed=1)
    runs.write_rows(tmp_path / "data1.jsonl", rows)
    manifest = runs.train(runs.configured(tmp_path, model, sizes=(64,), eval_data=evaluation))
    before, after = manifest["initial_eval"], manifest["stages"][0]["eval"]
    assert after["gamma"] > before["gamma"] + 1
    assert after["reward_accuracy"] == 1.0
    assert manifest["stages"][0]["last_loss"] < 0.6


def test_gamma_of_the_reference_is_that_of_the_previous_stages_model(tmp_path, model):
    """The same pairs twice: the second stage's reference already prefers the chosen ones."""
    runs.write_rows(tmp_path / "data1.jsonl", runs.make_rows(16, seed=1))
    runs.write_rows(tmp_path / "data2.jsonl", runs.make_rows(16, seed=1))
    manifest = runs.train(runs.configured(tmp_path, model))
    first, second = manifest["stages"]
    assert second["gamma_reference"] > first["gamma_reference"] + 0.5
    assert first["reference_hash"] != second["reference_hash"]


def test_several_processes_without_a_launcher_are_an_error(tmp_path, model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE: was 2 without RANK.*start several processes with torchrun"):
        runs.train(runs.configured(tmp_path, model))


def _in_environment(names):
    os.environ.update(names)


def test_a_tolerance_with_fsdp_by_accelerates_launcher_is_an_error(tmp_path, model):
    yaml = runs.write_settings(tmp_path, model, grad_tol=0.01)
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    child = runs.Child(tmp_path, "train", yaml, fault=_in_environment, options=(asked,))
    assert child.wait() == 2, child.text
    assert "error: grad_tol: was 0.01, must be 0 with FSDP, which accelerate's launcher asks for" in child.text


@pytest.mark.parametrize("count", ["abc", "0", "-1", ""])
def test_an_invalid_number_of_processes_is_a_one_line_error(tmp_path, model, count):
    yaml = runs.write_settings(tmp_path, model)
    child = runs.Child(tmp_path, "train", yaml, fault=_in_environment, options=({"WORLD_SIZE": count},))
    assert child.wait() == 2, child.text
    assert f"error: WORLD_SIZE: was {count!r}, must be a number of processes, at least 1\n" in child.text


def test_an_error_on_one_node_is_printed_by_its_first_rank(tmp_path):
    """Before the ranks have connected, no other rank can know of it."""
    names = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    child = runs.Child(tmp_path, "train", tmp_path / "nope.yaml", fault=_in_environment, options=(names,))
    assert child.wait() == 2
    assert child.text.strip() == f"error: {tmp_path / 'nope.yaml'}: no such file"


def test_fsdp_in_one_process_is_an_error_before_anything_is_scored(tmp_path, model):
    config = runs.configured(tmp_path, model, trainer={"fsdp": True})
    with pytest.raises(UserError, match=r"trainer.fsdp: needs several processes"):
        runs.train(config)
    assert not list((tmp_path / "run").glob("**/reference_logps.safetensors"))


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path, model):
    (tmp_path / "file").write_text("x")
    config = runs.configured(tmp_path, model, output_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(UserError, match=r"output_dir: .*/file/run cannot be created: Not a directory"):
        runs.train(config)


def test_settings_that_transformers_refuses_are_an_error_before_the_first_stage(tmp_path, model):
    path = runs.write_settings(tmp_path, model)
    config = load_config(path, ["stages.1.trainer={tf32: true}"])  # without CUDA
    with pytest.raises(UserError, match=r"^trainer: .*tf32"):
        runs.train(config)
    assert not (tmp_path / "run" / "stage-1-s1").exists()


def test_a_stage_folder_of_another_run_is_not_used(tmp_path, model):
    """Someone removed manifest.json and changed the data, or copied a folder of that name there."""
    runs.train(runs.configured(tmp_path, model, sizes=(8,)))
    (tmp_path / "run" / "manifest.json").unlink()
    runs.write_rows(tmp_path / "data1.jsonl", runs.make_rows(8, seed=5))
    with pytest.raises(UserError, match=r"contains stage-1-s1 but no manifest\.json"):
        runs.train(runs.configured(tmp_path, model, sizes=(8,)))


def test_resuming_on_another_machine_is_a_warning(tmp_path, model, monkeypatch, spoken):
    config = runs.configured(tmp_path, model)
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s2", step=1)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    manifest = tmp_path / "run" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["environment"]["threads"] = 64
    manifest.write_text(json.dumps(data))
    run(config, spoken.reporter)
    assert "this machine differs from the one the run was started on (threads 64 -> 1)" in spoken.text


def test_a_report_that_a_kill_prevented_is_written_later(tmp_path, model, pictures):
    config = runs.configured(tmp_path, model, sizes=(4,))
    runs.train(config)
    report = tmp_path / "run" / "report.html"
    os.unlink(report)
    runs.train(config)
    assert report.exists()


def test_a_report_that_is_older_than_the_run_is_written_again(tmp_path, model, pictures):
    config = runs.configured(tmp_path, model, sizes=(4,))
    runs.train(config)
    report, manifest = tmp_path / "run" / "report.html", tmp_path / "run" / "manifest.json"
    report.write_text("of an earlier stage")
    later = report.stat().st_mtime_ns + 10**9
    os.utime(manifest, ns=(later, later))
    runs.train(config)
    assert "1 of 1 stages done" in report.read_text()


def test_the_report_is_written_after_every_stage(tmp_path, model, monkeypatch):
    done = []

    def write(folder):
        stages = json.loads((folder / "manifest.json").read_text())["stages"]
        done.append(sum(stage["state"] == "done" for stage in stages))
        return []

    monkeypatch.setattr(run_module, "write_report", write)
    runs.train(runs.configured(tmp_path, model, sizes=(4, 4, 4)))
    assert done == [1, 2, 3]


def test_a_report_that_fails_between_stages_is_a_warning(tmp_path, model, monkeypatch, spoken):
    calls = []

    def write(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise ValueError("no font")
        return []

    monkeypatch.setattr(run_module, "write_report", write)
    manifest = run(runs.configured(tmp_path, model, sizes=(4, 4)), spoken.reporter)
    assert [stage["state"] for stage in manifest["stages"]] == ["done", "done"]
    assert "the report could not be written, training goes on: no font" in spoken.text


def test_the_initial_models_evaluation_is_recomputed_if_its_file_is_missing(tmp_path, model, evaluation, monkeypatch):
    """The rewards of every later evaluation are against it."""
    config = runs.configured(tmp_path, model, eval_data=evaluation)
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s1", step=1)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    (tmp_path / "run" / "eval_logps.safetensors").unlink()
    manifest = runs.train(config)
    assert manifest["stages"][1]["eval"]["reward_margin"] > 0


def test_no_model_is_in_memory_when_the_next_is_loaded(tmp_path, model, evaluation, monkeypatch):
    """One model in memory: after evaluations, after training, and where reference and policy differ."""
    alive = []
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def counting(*args, **kwargs):
        if kwargs.get("device_map") != "meta":  # where things are only tried out, no weights are loaded
            alive.append(sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects()))
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    runs.train(runs.configured(tmp_path, model, reference="initial", eval_data=evaluation))
    assert len(alive) == 8  # M_0's evaluation; two references, one policy; a check and an evaluation of each stage
    assert set(alive) == {0}
