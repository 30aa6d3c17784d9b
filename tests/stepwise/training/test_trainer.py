"""One stage's trainer: metric names and averages, resumed logs, callbacks."""

import json
import math
import signal

import pytest
import torch
from transformers import TrainerControl, TrainerState

from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.record.manifest import MetricsFile
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from sdpo_kernels.stepwise.training.callbacks import MetricsWriter, ProgressShower, StopOnSignal
from sdpo_kernels.stepwise.training.trainer import StageTrainer
from tests.stepwise import runs


def test_a_logged_line_averages_the_steps_since_the_last(tmp_path, model):
    """Logged at every step and at every third: the same numbers, averaged."""
    trainer = {"per_device_train_batch_size": 2, "logging_steps": 1}
    runs.train(runs.configured(tmp_path, model, sizes=(14,), trainer=trainer))
    every = runs.metrics(tmp_path / "run")
    other = tmp_path / "third"
    other.mkdir()
    runs.train(runs.configured(other, model, sizes=(14,), trainer=trainer | {"logging_steps": 3}))
    third = runs.metrics(other / "run")
    assert [line["step"] for line in third] == [1, 3, 6, 7]  # the first and the last step are always logged
    for line, steps in zip(third, ([1], [2, 3], [4, 5, 6], [7]), strict=True):
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            wanted = sum(every[step - 1][name] for step in steps) / len(steps)
            assert line[name] == pytest.approx(wanted, rel=1e-5, abs=1e-7), (line["step"], name)
        assert line["learning_rate"] == every[steps[-1] - 1]["learning_rate"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumed_between_two_logs_writes_the_same_log(tmp_path, model, monkeypatch, accumulate):
    trainer = {"logging_steps": 5, "save_steps": 3, "gradient_accumulation_steps": accumulate}
    sizes = (28 * accumulate,)
    whole = tmp_path / "whole"
    whole.mkdir()
    runs.train(runs.configured(whole, model, sizes=sizes, trainer=trainer))
    config = runs.configured(tmp_path, model, sizes=sizes, trainer=trainer)
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s1", step=5)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    assert runs.train(config)["stages"][0]["resumed_at_step"] == 3
    assert runs.fingerprint(tmp_path / "run") == runs.fingerprint(whole / "run")


def test_accumulated_steps_log_the_mean_of_their_batches(tmp_path, model):
    """Two micro-batches a step: the first step's loss is ln 2, not twice it."""
    trainer = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    runs.train(runs.configured(tmp_path, model, sizes=(8,), trainer=trainer))
    assert runs.metrics(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_every_pair_has_the_same_weight_in_the_logged_loss(tmp_path, model):
    """Nine pairs, four at a time, logged once: the last batch's one pair counts once, not like four."""
    trainer = {"logging_steps": 3, "learning_rate": 1e-30, "per_device_train_batch_size": 4}
    config = runs.configured(tmp_path, model, sizes=(9,), loss="hinge", beta=20.0, reference="none", trainer=trainer)
    runs.train(config)
    last = runs.metrics(tmp_path / "run")[-1]
    score = Scorer.of(config, training_arguments(config, config.stages[0], tmp_path, tmp_path), 0, Reporter(quiet=True))
    prepared = prepare(config)
    logps = score.score_path(str(model), prepared.stages[0].tokens, "all")
    losses = torch.relu(1 - 20.0 * (logps[:, 0] - logps[:, 1]))
    first = runs.metrics(tmp_path / "run")[0]["loss"]  # logging_first_step has taken the first batch
    assert (4 * first + 5 * last["loss"]) / 9 == pytest.approx(losses.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("trainer", "epochs", "steps"),
    [
        ({}, 1, 3),
        ({}, 2.5, 8),
        ({"gradient_accumulation_steps": 2}, 1, 2),
        ({"max_steps": 5}, 1, 5),
        ({"dataloader_drop_last": True}, 1, 2),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, 1, 2),
        ({"per_device_train_batch_size": 50}, 3, 3),
    ],
)
def test_a_stage_takes_the_planned_steps(tmp_path, model, monkeypatch, trainer, epochs, steps):
    planned = []
    genuine = StageTrainer.train
    monkeypatch.setattr(StageTrainer, "train", lambda self: planned.append(self.schedule.steps) or genuine(self))
    data = runs.write_rows(tmp_path / "d.jsonl", runs.make_rows(10))
    stages = [{"name": "s1", "data": str(data), "epochs": epochs}]
    manifest = runs.train(runs.configured(tmp_path, model, stages=stages, trainer=trainer))
    assert manifest["stages"][0]["steps"] == steps
    assert planned == [steps]
    assert runs.metrics(tmp_path / "run")[-1]["step"] == steps


def test_a_checkpoint_has_everything_that_resuming_needs(tmp_path, model, monkeypatch):
    config = runs.configured(tmp_path, model, sizes=(16,), trainer={"save_steps": 2, "logging_steps": 3})
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s1", step=4)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    (checkpoint,) = (tmp_path / "run" / ".stage-1-s1").glob("checkpoint-*")
    listed = set(json.loads((checkpoint / "complete.json").read_text()))
    needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert needed | {"pending_metrics.safetensors"} <= listed
    for name in needed - {"model.safetensors", "trainer_state.json"}:
        torch.load(checkpoint / name, weights_only=name != "rng_state.pth")


# ---- callbacks ----


def state(step=3, last=9) -> TrainerState:
    return TrainerState(global_step=step, max_steps=last)


def test_metrics_lines(tmp_path):
    file = MetricsFile(tmp_path)
    writer = MetricsWriter(file, "hard", 2, steps_before=10)
    control = TrainerControl()
    writer.on_log(None, state(), control, {"loss": 0.5, "grad_norm": float("nan"), "epoch": 0.25})
    writer.on_log(None, state(), control, {"eval_loss": 0.6, "eval_runtime": 1.0, "eval_samples_per_second": 2.0})
    writer.on_log(None, state(), control, {"train_runtime": 4.0, "train_loss": 0.5})
    writer.on_log(None, state(), control, None)
    head = {"stage/name": "hard", "stage/index": 2, "step": 3, "stage/global_step": 13}
    assert file.lines() == [head | {"loss": 0.5, "grad_norm": "nan", "epoch": 0.25}, head | {"eval_loss": 0.6}]


def test_progress_notes(tmp_path):
    class Task:
        def __init__(self):
            self.seen = []

        def update(self, done, note=""):
            self.seen.append((done, note))

    class Trainer:
        rows_seen = 0

    task = Task()
    shower = ProgressShower(task, Trainer())
    shower.on_step_end(None, state(1), TrainerControl())
    logs = {"loss": 0.6931, "rewards/margins": 0.01, "rewards/accuracies": 0.5}
    shower.on_log(None, state(1), TrainerControl(), logs)
    Trainer.rows_seen = 500
    shower.on_log(None, state(2), TrainerControl(), {"eval_loss": 1.0})
    shower.on_log(None, state(2), TrainerControl(), logs)
    shower.on_step_end(None, state(2), TrainerControl())
    assert task.seen[0] == (1, "")
    done, note = task.seen[-1]
    assert done == 2
    assert note.startswith("loss 0.6931  margin +0.010  acc 0.50  ")
    assert "tok/s" in note
    assert "peak" in note


def test_a_signal_makes_trainer_save_and_stop_and_the_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop, control = StopOnSignal(), TrainerControl()
    with stop.installed():
        stop.on_step_end(None, state(), control)
        assert not control.should_save
        signal.raise_signal(signal.SIGTERM)
        stop.on_step_end(None, state(), control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
