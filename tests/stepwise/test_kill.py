"""kill -9 and Ctrl-C, at chosen and at random moments: running the command again gives the same bits.

Each kill is one child process. Children are forked from a server with everything imported, so one takes about a second.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdpo_kernels.stepwise import run as run_module
from sdpo_kernels.stepwise.common import files
from sdpo_kernels.stepwise.data.batches import Batch
from sdpo_kernels.stepwise.record.manifest import Manifest, MetricsFile
from sdpo_kernels.stepwise.references import cache
from sdpo_kernels.stepwise.references.evaluation import EvalData
from sdpo_kernels.stepwise.training import checkpoints, publish
from sdpo_kernels.stepwise.training.trainer import StageTrainer
from tests.stepwise import runs
from tests.stepwise.runs import Child, die

SIZES = (16, 12)  # 4 and 3 steps


class World:
    """One YAML for all runs of this file, and the result of a run that was never killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = runs.make_model(folder / "model")
        evaluation = runs.write_rows(folder / "eval.jsonl", runs.make_rows(5, seed=9))
        trainer = {
            "logging_steps": 3,
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "eval_on_start": True,
        }
        self.yaml = runs.write_settings(folder, model, SIZES, eval_data=str(evaluation), trainer=trainer)
        child = self.start(folder / "whole", fault=quick)
        assert child.wait() == 0, child.text
        self.wanted = runs.fingerprint(folder / "whole")
        assert len(self.wanted) == 7
        assert runs.leftovers(folder / "whole") == []

    def start(self, run: Path, fault: Any = None, options: Any = ()) -> Child:
        arguments = ("train", self.yaml, f"output_dir={run}", "--quiet")
        return Child(self.folder, *arguments, fault=fault or quick, options=options)

    def check_ends_the_same(self, run: Path) -> None:
        child = self.start(run)
        assert child.wait() == 0, child.text
        assert runs.fingerprint(run) == self.wanted
        assert runs.leftovers(run) == []
        assert (run / "report.html").exists()
        stages = json.loads((run / "manifest.json").read_text())["stages"]
        whole = json.loads((self.folder / "whole" / "manifest.json").read_text())["stages"]
        for name in ("state", "steps", "first_loss", "last_loss", "reference_hash", "gamma_reference", "eval"):
            assert [stage[name] for stage in stages] == [stage[name] for stage in whole]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("kill"))


def quick() -> None:
    """No pictures: they take longer than the run."""
    run_module.write_report = lambda folder: [(folder / "report.html").write_text("drawn")]


# ---- chosen moments ----


def _die_at(owner: Any, name: str, call: int, after: bool = False) -> None:
    """Die before or after the `call`-th call (from 1) of owner.name."""
    genuine, count = getattr(owner, name), 0

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call and not after:
            die()
        result = genuine(*args, **kwargs)
        if count == call:
            die()
        return result

    setattr(owner, name, dies)


def _half_saved() -> None:
    """Die when half of a checkpoint's file is on the disk."""
    genuine, count = torch.save, 0

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        genuine(value, path, *args, **kwargs)
        if count == 4:  # the second checkpoint's
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = save


def _half_line() -> None:
    def append(self: MetricsFile, line: Any) -> None:
        whole = "step" in line and line["step"] < 3
        text = json.dumps(line)
        with self.path.open("a") as stream:
            stream.write(text + "\n" if whole else text[: len(text) // 2])
            stream.flush()
        if not whole:
            die()

    MetricsFile.append = append


def _half_removed() -> None:
    """Die when a folder that is being removed has lost one file."""
    genuine = shutil.rmtree

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        inside = [p for p in sorted(Path(path).rglob("*")) if p.is_file()]
        if inside:
            inside[0].unlink()
            die()
        genuine(path, *args, **kwargs)

    shutil.rmtree = rmtree


def _manifest_not_renamed() -> None:
    """Die so that a temporary file is left in the run's folder."""
    genuine, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += Path(target).name == "manifest.json"
        if count == 3:
            die()
        genuine(source, target)

    os.replace = replace


def _before_the_manifest_says_done() -> None:
    genuine = Manifest.update_stage

    def update_stage(self: Manifest, index: int, values: Any) -> None:
        if values.get("state") == "done":
            die()
        genuine(self, index, values)

    Manifest.update_stage = update_stage


def _scoring() -> None:
    _die_at(Batch, "logps", 8)  # 5 evaluation pairs and 16 pairs in batches of 3


MOMENTS = {
    "scoring references": _scoring,
    "scored, not yet saved": lambda: _die_at(cache, "write_scores", 2),
    "half of a checkpoint's file": _half_saved,
    "checkpoint written, not listed": lambda: _die_at(checkpoints, "write_listing", 2),
    "checkpoint listed, not renamed": lambda: _die_at(checkpoints, "write_listing", 2, after=True),
    "checkpoint renamed, the old one still there": lambda: _die_at(checkpoints, "publish_folder", 2, after=True),
    "half of the old checkpoint removed": _half_removed,
    "half a line of metrics": _half_line,
    "the manifest written, not yet renamed": _manifest_not_renamed,
    "inside the final save": lambda: _die_at(PreTrainedModel, "save_pretrained", 3, after=True),
    "the tokenizer's save": lambda: _die_at(PreTrainedTokenizerBase, "save_pretrained", 3),
    "evaluating the finished stage": lambda: _die_at(EvalData, "evaluate", 2),
    "finished, not renamed": lambda: _die_at(publish, "publish_folder", 1),
    "renamed, before the manifest": _before_the_manifest_says_done,
    "manifest written, working folder still there": lambda: _die_at(publish, "remove_folder", 2),
    "before the report": lambda: _die_at(run_module, "write_report", 1),
}


def at_moment(name: str) -> None:
    quick()
    MOMENTS[name]()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_a_chosen_moment(world, tmp_path, moment):
    run = tmp_path / "run"
    child = world.start(run, at_moment, [moment])
    assert child.wait() == -signal.SIGKILL, f"{moment} was never reached: {child.text}"
    world.check_ends_the_same(run)


# ---- any moment ----


def at_event(number: int) -> None:
    """Die at the `number`-th disk operation or training step (from 1)."""
    quick()
    seen = 0

    def watch(owner: Any, name: str) -> None:
        genuine = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            for _ in range(2):  # before and after are two moments
                seen += 1
                if seen == number:
                    die()
                if _ == 0:
                    result = genuine(*args, **kwargs)
            return result

        setattr(owner, name, counted)

    for owner, name in (
        (os, "rename"), (os, "replace"), (os, "unlink"), (os, "mkdir"), (shutil, "rmtree"), (shutil, "copyfile"),
        (torch, "save"), (StageTrainer, "training_step"), (files, "sync"), (Path, "write_text"),
    ):  # fmt: skip
        watch(owner, name)


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_random_events_one_after_the_other(world, tmp_path, seed):
    draw, run = random.Random(seed), tmp_path / "run"
    for _ in range(4):
        child = world.start(run, at_event, [draw.randint(1, 150)])
        code = child.wait()
        assert code in (0, -signal.SIGKILL), child.text
        if code == 0:
            break
    world.check_ends_the_same(run)


def takes_its_time() -> None:
    """No run is over before it is killed, however quick the machine."""
    quick()
    genuine = StageTrainer.training_step

    def training_step(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return genuine(self, *args, **kwargs)

    StageTrainer.training_step = training_step


def test_kills_from_outside_at_random_times(world, tmp_path):
    draw, run, kills = random.Random(5), tmp_path / "run", 0
    for _ in range(4):
        child = world.start(run, takes_its_time)
        child.process.join(draw.uniform(0.05, 0.8))
        child.signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills > 0
    world.check_ends_the_same(run)


# ---- stopped by a signal ----


def stops_itself(stage: str, step: int, number: int = signal.SIGINT, twice: bool = False) -> None:
    """Ctrl-C in the middle of optimiser step `step` (from 1)."""
    quick()
    genuine = StageTrainer.training_step

    def training_step(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.stage == stage and self.state.global_step == step - 1:
            os.kill(os.getpid(), number)
            if twice:
                time.sleep(0.01)
                os.kill(os.getpid(), number)
        return genuine(self, *args, **kwargs)

    StageTrainer.training_step = training_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_says_how_to_resume(world, tmp_path, number):
    run = tmp_path / "run"
    child = world.start(run, stops_itself, ["s1", 3, number])
    assert child.wait() == 130
    assert "stopped at step 3 of 4 of stage s1, saved; run the same command again to resume" in child.text
    assert "Traceback" not in child.text
    assert (run / ".stage-1-s1" / "checkpoint-3" / "optimizer.pt").exists()
    world.check_ends_the_same(run)
    assert json.loads((run / "manifest.json").read_text())["stages"][0]["resumed_at_step"] == 3


def test_a_stop_in_a_stages_last_step_takes_effect_after_the_stage(world, tmp_path):
    run = tmp_path / "run"
    child = world.start(run, stops_itself, ["s1", 4])
    assert child.wait() == 130
    assert "stopped after stage s1, which is finished; run the same command again to resume" in child.text
    states = [stage["state"] for stage in json.loads((run / "manifest.json").read_text())["stages"]]
    assert states == ["done", "pending"]
    world.check_ends_the_same(run)


def test_two_stops_in_one_step_do_not_wait_for_it(world, tmp_path):
    run = tmp_path / "run"
    child = world.start(run, stops_itself, ["s2", 3, signal.SIGINT, True])
    assert child.wait() == 130
    assert "stopped at once: the steps since the last checkpoint are lost" in child.text
    assert "Traceback" not in child.text
    world.check_ends_the_same(run)


def stops_while_scoring() -> None:
    quick()
    genuine, count = Batch.logps, 0

    def logps(self: Batch, model: Any, ld_alpha: Any = None) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return genuine(self, model, ld_alpha)

    Batch.logps = logps


def test_a_stop_while_references_are_scored(world, tmp_path):
    run = tmp_path / "run"
    child = world.start(run, stops_while_scoring)
    assert child.wait() == 130
    assert child.text.strip().splitlines()[-1] == "stopped; run the same command again to resume"
    assert "Traceback" not in child.text
    world.check_ends_the_same(run)


# ---- two at once ----


def stalls() -> None:
    """The first step lasts until the process is killed."""
    StageTrainer.training_step = lambda *_args, **_kwargs: time.sleep(600)


def test_a_second_process_on_the_same_run_is_an_error(world, tmp_path):
    run = tmp_path / "run"
    first = world.start(run, stalls)
    first.wait_for((run / ".stage-1-s1").exists)
    second = world.start(run)
    assert second.wait() == 2
    assert second.text.splitlines()[-1] == f"error: {run}: another process is working on this run"
    first.signal(signal.SIGKILL)
    first.wait()
    world.check_ends_the_same(run)


# ---- damaged checkpoints ----


@pytest.mark.parametrize("damage", ["no optimizer", "short model"])
def test_a_damaged_checkpoint_is_not_resumed_from(world, tmp_path, damage):
    run = tmp_path / "run"
    child = world.start(run, stops_itself, ["s1", 3])
    assert child.wait() == 130
    (checkpoint,) = (run / ".stage-1-s1").glob("checkpoint-*")
    if damage == "no optimizer":
        (checkpoint / "optimizer.pt").unlink()
    else:
        os.truncate(checkpoint / "model.safetensors", 1000)
    world.check_ends_the_same(run)
    assert json.loads((run / "manifest.json").read_text())["stages"][0]["resumed_at_step"] is None
