"""TrainingArguments of a stage: the user's fields, the driver's own, and what transformers refuses."""

import os

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.settings import trainer_arguments as arguments_module
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from tests.stepwise import runs


def arguments(tmp_path, model, **trainer) -> TrainingArguments:
    config = runs.configured(tmp_path, model, trainer=trainer)
    return training_arguments(config, config.stages[0], tmp_path / "work", tmp_path / "board")


def test_fields_of_the_user_and_of_the_driver(tmp_path, model, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    args = arguments(tmp_path, model, weight_decay=0.1, report_to="tensorboard")
    assert args.weight_decay == 0.1
    assert args.learning_rate == 0.01
    assert args.output_dir == str(tmp_path / "work")
    assert not args.remove_unused_columns  # Trainer would drop the driver's columns
    assert not args.logging_nan_inf_filter  # a NaN loss would be logged as 0
    assert args.logging_first_step
    assert args.disable_tqdm
    assert not (tmp_path / "work").exists()
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "board")


def test_scoring_uses_the_autocast_of_training(tmp_path, model, monkeypatch):
    assert Precision.of(arguments(tmp_path, model)).dtype is None
    assert Precision.of(arguments(tmp_path, model, bf16=True)).dtype == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as accelerate's launcher sets it
    assert Precision.of(arguments(tmp_path, model)).dtype == torch.bfloat16


def test_several_ranks_without_an_accelerator_use_the_cpu(tmp_path, model, monkeypatch):
    """Otherwise every rank's accelerate would see a single process."""
    config = runs.configured(tmp_path, model)
    del config.trainer["use_cpu"]
    calls = []
    monkeypatch.setattr(arguments_module, "TrainingArguments", lambda **given: calls.append(given) or _build(given))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for count, wanted in (("1", None), ("2", True)):
        monkeypatch.setenv("WORLD_SIZE", count)
        training_arguments(config, config.stages[0], tmp_path / "work", tmp_path / "tb")
        assert calls[-1].get("use_cpu") == wanted


def test_the_device_of_a_rank_on_the_cpu_has_no_number(tmp_path, model, monkeypatch):
    """accelerate numbers it by the rank, and torch.load cannot load an optimizer's state to cpu:1."""

    def numbered(**given):
        args = _build(given)
        args._setup_devices = torch.device("cpu", 1)
        return args

    monkeypatch.setattr(arguments_module, "TrainingArguments", numbered)
    device = arguments(tmp_path, model).device
    torch.save(torch.ones(1), tmp_path / "state")
    assert (device.type, torch.load(tmp_path / "state", map_location=device).item()) == ("cpu", 1)


def _build(given: dict) -> TrainingArguments:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")
        return TrainingArguments(**given | {"use_cpu": True})


def test_weights_rounded_for_scoring_are_restored_afterwards():
    """FSDP2 rounds weights as it gathers them; here all are rounded at once, inside the context only."""
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with Precision(torch.device("cpu"), torch.bfloat16, whole=True).computing(model):
        assert model.weight.dtype == model.bias.dtype == torch.bfloat16
        assert model.weight.equal(before.bfloat16())
    assert model.weight.equal(before)


def test_a_refusal_is_one_line(tmp_path, model):
    with pytest.raises(UserError, match=r"^trainer: ") as error:
        arguments(tmp_path, model, eval_strategy="no", tf32=True)
    assert "\n" not in str(error.value)
