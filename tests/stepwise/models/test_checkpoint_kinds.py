"""Checkpoints that a stage cannot resume from: the error comes before anything is scored, and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.sharded import check_checkpoint
from tests.stepwise import runs


def arguments(folder: Path, *, fsdp: bool) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), fsdp=fsdp, use_cpu=True)


def test_a_whole_checkpoint_under_fsdp(tmp_path):
    """As earlier versions saved it: `pytorch_model_fsdp.bin` and `optimizer.bin`."""
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"trainer.fsdp: .* has no pytorch_model_fsdp_0: .* delete this checkpoint to"):
        check_checkpoint(tmp_path, arguments(tmp_path, fsdp=True))
    check_checkpoint(tmp_path, arguments(tmp_path, fsdp=False))


def test_shards_without_fsdp(tmp_path):
    shards = tmp_path / "pytorch_model_fsdp_0"
    shards.mkdir()
    (shards / ".metadata").touch()
    with pytest.raises(UserError, match="was saved with FSDP2, must be resumed with it"):
        check_checkpoint(tmp_path, arguments(tmp_path, fsdp=False))
    check_checkpoint(tmp_path, arguments(tmp_path, fsdp=True))


def test_a_stage_looks_at_it_before_it_scores_anything(tmp_path, model, monkeypatch):
    config = runs.configured(tmp_path, model, trainer={"save_steps": 1})
    with monkeypatch.context() as patch:
        runs.stop_at(patch, "s1", 3)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    (tmp_path / "run/.stage-1-s1/checkpoint-2/pytorch_model_fsdp_0").mkdir()
    (tmp_path / "run/.stage-1-s1/reference_logps.safetensors").unlink()
    with pytest.raises(UserError, match="was saved with FSDP2"):
        runs.train(config)
    assert not (tmp_path / "run/.stage-1-s1/reference_logps.safetensors").exists()
