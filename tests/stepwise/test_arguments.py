"""TrainingArguments of a stage: the person's fields, the driver's own, and what transformers refuses."""

import os

import pytest
import torch
from transformers import TrainingArguments

from sdpo_kernels.stepwise.arguments import autocast_dtype, training_arguments
from sdpo_kernels.stepwise.errors import UserError
from tests.stepwise import runs


def arguments(tmp_path, model, **trainer) -> TrainingArguments:
    config = runs.configured(tmp_path, model, trainer=trainer)
    return training_arguments(config, config.stages[0], tmp_path / "work", tmp_path / "board")


def test_fields_of_the_person_and_of_the_driver(tmp_path, model, monkeypatch):
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


def test_autocast_is_that_of_the_trainer(tmp_path, model):
    assert autocast_dtype(arguments(tmp_path, model)) is None
    assert autocast_dtype(arguments(tmp_path, model, bf16=True)) == torch.bfloat16


def test_a_refusal_is_one_line(tmp_path, model):
    with pytest.raises(UserError, match=r"^trainer: ") as error:
        arguments(tmp_path, model, eval_strategy="no", tf32=True)
    assert "\n" not in str(error.value)
