"""`sdpo init`: what it writes, and that it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdpo_kernels.cli import app
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Mute
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.starter.init import HELDOUT_PAIRS, PAIRS, STAGES, write_starter
from sdpo_kernels.stepwise.starter.letters import Problem


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_trains_and_learns(tmp_path):
    """Stage 1 whole and a twentieth of stage 2: pair accuracy rises from near chance."""
    answer = CliRunner().invoke(app, ["init", str(tmp_path / "first")])
    assert answer.exit_code == 0, answer.output
    assert answer.output.endswith(f"to train: sdpo train {tmp_path}/first/run.yaml\n")
    for name in ("long", "eval"):
        path = tmp_path / "first/data" / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:32]))

    settings = load_config(tmp_path / "first/run.yaml", [])
    run(settings, Mute())
    finished = tmp_path / "first/run"
    assert (finished / "stage-2-long/model.safetensors").is_file()
    before, after = re.findall(r'"pair_accuracy": ([0-9.]+)', (finished / "manifest.json").read_text())[::2]
    assert float(before) < 0.7 < float(after)


def test_the_pairs_are_right_against_careless_answers_about_different_words(tmp_path):
    run_file = write_starter(tmp_path / "first", None)
    data = run_file.parent / "data"
    found = [rows(data / f"{name}.jsonl") for name in ("short", "long", "eval")]
    assert [len(some) for some in found] == [PAIRS["short"], PAIRS["long"], HELDOUT_PAIRS * len(STAGES)]
    everything = [row for some in found for row in some]
    assert len({row["prompt"] for row in everything}) == len(everything)
    for row in everything:
        problem = Problem(row["prompt"].removeprefix("sort ").removesuffix(":"))
        assert (row["chosen"], row["rejected"]) == (problem.answer, problem.careless)
        assert row["chosen"] != row["rejected"]


@pytest.mark.parametrize("name", ["plain", "with space", "a: b, {c} #d", 'quo"te', "Grüße"])
def test_any_name_of_a_folder(name, tmp_path):
    settings = load_config(write_starter(tmp_path / name, None), [])
    assert settings.model == str(tmp_path / name / "model")
    assert settings.stages[0].data == (str(tmp_path / name / "data/short.jsonl"),)
    assert settings.output_dir == str(tmp_path / name / "run")


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-135M-Instruct", "models/with space", "gpt2", "123"])
def test_a_model_of_ones_own(model, tmp_path):
    run_file = write_starter(tmp_path / "first", model)
    settings = load_config(run_file, [])
    assert (settings.model, settings.loss) == (model, "sigmoid")
    assert not (run_file.parent / "model").exists()


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already there and not empty; give a new folder"):
        write_starter(tmp_path, None)
    with pytest.raises(UserError, match="already there and not empty"):
        write_starter(tmp_path / "notes.txt", None)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the current folder"):
        write_starter(Path(), None)


def test_what_a_kill_left_is_written_again(tmp_path):
    (tmp_path / ".first.part").mkdir()
    (tmp_path / ".first.part/half").write_text("")
    (tmp_path / "first").mkdir()  # empty: taken
    write_starter(tmp_path / "first", None)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["data", "model", "run.yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_the_same_files_every_time(tmp_path):
    one, other = (write_starter(tmp_path / name, None).parent for name in ("one", "other"))
    for path in sorted(one.rglob("*")):
        if path.is_file() and path.name != "run.yaml":
            assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "../nowhere", "models/of mine/nowhere"])
def test_a_path_to_no_model(model, tmp_path):
    with pytest.raises(UserError, match=f"^--model: was '{model}', which is neither a folder nor the name of a hub"):
        write_starter(tmp_path / "first", model)
    assert not list(tmp_path.iterdir())
