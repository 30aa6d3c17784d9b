"""Every command and block of README.md runs; the docs name every setting, room and page; the examples' YAML loads."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from sdpo_kernels.cli import app
from sdpo_kernels.stepwise.data.pairs import read_pairs
from sdpo_kernels.stepwise.settings.post import Metric
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer import DEFAULT_TRAINER
from tests.stepwise.runs import Child, make_model, make_rows, write_rows
from tests.test_imports import LAYERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```(python|yaml|json)\n(.*?)```", README, re.S))
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    ") and line.strip()]

# `make` itself installs before any of these tests runs
INSTALLS = {"make test", "make bench-env", "pip install torch"}
INSTALLS |= {"pip install sdpo-kernels", "pip install sdpo-kernels[hf]", "pip install sdpo-kernels[train]"}
INSTALLS |= {"pip install -e '.[train]'", "pip install sdpo-kernels[train,qlora]", "pip install sdpo-kernels[quack]"}
INFO = {"python -m sdpo_kernels info"}  # run by tests/test_info.py
# what a make target runs, shortened
TARGETS = {
    "make demo": ["-m", "examples.demo.run"],
    # without the rivals that are compiled: tests/test_benchmarks.py runs those
    "make bench": ["-m", "benchmarks.head", "--quick", "--cases", "gemms", "ours", "naive"],
    "python -m benchmarks.floor": ["-m", "benchmarks.floor", "--quick", "--rounds", "1"],
    "python -m benchmarks.grad_tol": ["-m", "benchmarks.grad_tol", "--quick", "--rounds", "1", "--relative", "0.01"],
}
# run, shortened, by tests/test_benchmarks.py, tests/test_benchmark_page.py, tests/test_benchmark_real.py,
# tests/stepwise/memory or below
NAMES = ("real", "accuracy", "mismatch", "scaling", "step", "body", "memory", "stages", "page")
BENCHMARKS = {f"python -m benchmarks.{name}" for name in NAMES}
BENCHMARKS |= {"python -m benchmarks.stages --betas"}  # tests/test_betas.py


def test_every_command_is_known():
    sdpo = {command for command in COMMANDS if command.startswith("sdpo ")}
    assert len(sdpo) == 10
    assert set(COMMANDS) - sdpo - INSTALLS - INFO - set(TARGETS) == BENCHMARKS


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {command.split()[1] for command in COMMANDS if command.startswith("make ")} <= targets


def test_python_block_runs():
    done = subprocess.run([sys.executable, "-c", BLOCKS["python"]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+\.\d+ tensor\(\[", done.stdout)


def test_the_sample_row_is_a_pair(tmp_path):
    (tmp_path / "easy.jsonl").write_text(BLOCKS["json"])
    (pair,) = read_pairs([str(tmp_path / "easy.jsonl")], on_bad_row="error").pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ("What is 2+2?", " It is four.", " It is five.")


def test_the_options_of_score_are_documented():
    page = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    options = [option.opts[0] for option in get_command(app).commands["score"].params if option.opts[0].startswith("-")]
    assert sorted(options) == ["--data", "--json", "--model"]
    assert sorted(re.findall(r"^\| `(--[a-z]+)[ `]", page, re.M)) == sorted(options)


@pytest.mark.slow
def test_sdpo_commands_run_on_the_yaml_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "path/to/your/sft-model")
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("easy", "hard", "eval")):
        write_rows(tmp_path / "data" / f"{name}.jsonl", make_rows(8, seed))
    (tmp_path / "run.yaml").write_text(BLOCKS["yaml"])
    commands = [command for command in COMMANDS if command.startswith("sdpo ")]
    for command in commands:
        if "beta=" in command:  # different settings need their own run
            command += " output_dir=runs/other"
        child = Child(tmp_path, *command.split()[1:])  # forked, so that each need not import torch
        assert child.wait() == 0, f"{command}: {child.text}"
        if command.startswith("sdpo init"):  # tests/stepwise/test_starter.py trains on more of it
            for path in tmp_path.glob("runs/first/data/*.jsonl"):
                path.write_text("".join(path.read_text().splitlines(keepends=True)[:32]))
    assert (tmp_path / "runs/quick/report.html").exists()
    assert (tmp_path / "runs/quick/stage-2-hard/model.safetensors").exists()
    assert (tmp_path / "runs/expo/model.safetensors").exists()


@pytest.mark.slow
def test_quick_demo(tmp_path):
    environment = os.environ | {"DEMO": "quick", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, *TARGETS["make demo"], "--output", str(tmp_path / "demo")]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stdout + done.stderr  # what Triton says at exit of objects that were not collected
    for word in ("SFT", "DPO", "sDPO", "exactly right", "reference's log-prob margin"):
        assert word in done.stdout
    assert (tmp_path / "demo/comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("make bench", "ours"),
        ("python -m benchmarks.floor", "ours"),
        ("python -m benchmarks.grad_tol", "0.01 relative"),
    ],
)
def test_benchmarks_run(tmp_path, command, word):
    program = [sys.executable, *TARGETS[command], "--json", str(tmp_path / "found.json")]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert word in done.stdout
    assert word in (tmp_path / "found.json").read_text()


@pytest.mark.slow
def test_step_benchmark_runs(data_dir, tmp_path):
    options = ["--tasks", "grammar", "--rounds", "1", "--pairs", "12", "--json", str(tmp_path / "step.json")]
    done = subprocess.run([sys.executable, "-m", "benchmarks.step", *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "grammar unshared/ours" in done.stdout
    (result,) = json.loads((tmp_path / "step.json").read_text())["results"]

    # the rival is not installed here; without it the benchmark says so
    sides = result["sides"]
    if importlib.util.find_spec("trl") is None:
        assert "make bench-env" in sides.pop("trl")["skipped"]
    assert all(side["tokens_a_second"] > 0 for side in sides.values())
    assert sides["ours"]["through_the_model"] < sides["unshared"]["through_the_model"]


def test_body_benchmark_runs(data_dir, tmp_path):
    options = ["--tasks", "grammar", "--pairs", "6", "--rounds", "1", "--json", str(tmp_path / "body.json")]
    done = subprocess.run([sys.executable, "-m", "benchmarks.body", *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "tokens ÷" in done.stdout
    (result,) = json.loads((tmp_path / "body.json").read_text())["results"]
    assert 0 < result["shared"]["tokens"] < result["unshared"]["tokens"]
    saved = 1 - result["shared"]["seconds"] / result["unshared"]["seconds"]
    assert result["saved_of_tokens"] == pytest.approx(
        saved / (1 - result["shared"]["tokens"] / result["unshared"]["tokens"])
    )


@pytest.mark.parametrize("name", [*RunConfig.model_fields, *DEFAULT_TRAINER])
def test_settings_page_names_every_key(name):
    assert f"`{name}" in (ROOT / "docs/settings.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*get_args(Metric), "rewards/margins", "rewards/accuracies", "rewards/ties"])
def test_the_glossary_defines_every_metric(name):
    assert f"`{name.removesuffix('_per_token')}`" in (ROOT / "docs/glossary.md").read_text(encoding="utf-8")


def test_the_index_links_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([^)#]+)\)", index))


def test_architecture_names_every_room_and_only_files_that_exist():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {name.removeprefix("stepwise.") for layer in LAYERS for name in layer if name.startswith("stepwise.")}
    assert not {name for name in rooms if f"`{name}/`" not in page and f"`{name}.py`" not in page}
    folders = [ROOT / name for name in ("sdpo_kernels", "tests", "benchmarks", "examples", "docs")]
    files = {f"/{path.relative_to(ROOT)}" for folder in folders for path in folder.rglob("*.py")}
    files |= {f"/{path.name}" for path in ROOT.glob("*.py")}
    for name in re.findall(r"`([\w/]+\.py)`", page):
        assert any(file.endswith(f"/{name}") for file in files), f"docs/architecture.md: {name} is not there"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_load(path, tmp_path, monkeypatch):
    """Beside the data, where the model of examples/smollm2.yaml has been made."""
    (tmp_path / "here/runs/real/smollm2/model").mkdir(parents=True)
    (tmp_path / "shared").symlink_to(ROOT.parent / "shared")
    monkeypatch.chdir(tmp_path / "here")
    config = load_config(path)
    assert len(config.stages) == 3
    places = ("shared/data/", "runs/smollm2/data/")  # the latter is made of the former
    for stage in config.stages:
        assert all(any(place in source for place in places) for source in stage.data)


def test_links_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link, anchor in re.findall(r"\]\(([^)#]+)(#[^)]+)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors_of(page.parent / link), f"{page.name}: {link}{anchor}"


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
