"""Tensor parallelism on two ranks, each with half of every layer: the same numbers as one process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.trial import try_run
from sdpo_kernels.stepwise.settings.run_file import load_config
from tests.stepwise import ranks_of_a_run as faults
from tests.stepwise import runs
from tests.stepwise.ranks_of_a_run import Ranks
from tests.stepwise.test_distributed import assert_same_figures
from tests.stepwise.test_distributed_methods import EPSILON, NEAR, deviation, trained

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(
        not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"),
        reason="this version of transformers cannot train a tensor-parallel model",
    ),
]

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def divided(folder: Path, model: Path, **settings: Any) -> Path:
    """Settings with the batches of one process: both ranks work on the same pairs."""
    trainer = {"adam_epsilon": EPSILON, "save_steps": 2} | settings.pop("trainer", {})
    return runs.write_settings(folder, model, tp_size=2, trainer=trainer, **settings).rename(folder / "divided.yaml")


def test_a_killed_run_resumes_and_ends_as_one_process(tmp_path):
    model = runs.make_model(tmp_path / "model", **HEADS)
    settings: dict[str, Any] = {
        "sizes": (9, 5),
        "eval_data": str(runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(3))),
    }
    watched = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    whole = trained(tmp_path, model, 1, 4, **settings, trainer=watched)

    yaml, run = divided(tmp_path, model, **settings, trainer=watched), tmp_path / "run"
    killed = Ranks(tmp_path, "train", yaml, "--quiet", fault=faults.die_at, options=["s1", 3, (0, 1)])
    assert killed.wait() == [-9, -9], killed.text
    again = Ranks(tmp_path, "train", yaml, fault=faults.model_is_halved)
    assert again.wait() == [0, 0], again.text

    assert "warning" not in again.text.lower()  # packed, with shared prompts
    assert again.texts[1] == ""
    assert json.loads((run / "manifest.json").read_text())["stages"][0]["resumed_at_step"] == 2
    assert deviation(whole, run) < NEAR
    assert_same_figures(whole, run, tolerance=5e-5)
    mine, other = (load_file(folder / "stage-1-s1/reference_logps.safetensors") for folder in (run, whole))
    assert all(mine[key].allclose(other[key], rtol=1e-6) for key in other)
    assert runs.leftovers(run) == []
    files = [sorted(path.name for path in (folder / "stage-1-s1").iterdir()) for folder in (run, whole)]
    assert files[0] == files[1]


def test_in_mixed_precision_with_a_tied_head_and_accumulation_a_stage_starts_from_its_references(tmp_path):
    model = runs.make_model(tmp_path / "model", tie_word_embeddings=True, **HEADS)
    trainer = {"bf16": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ranks = Ranks(tmp_path, "train", divided(tmp_path, model, sizes=(8, 4), trainer=trainer), "--quiet")
    assert ranks.wait() == [0, 0], ranks.text
    for record in json.loads((tmp_path / "run/manifest.json").read_text())["stages"]:
        first = next(row for row in runs.metrics(tmp_path / "run") if row["stage/name"] == record["name"])
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert "lm_head.weight" not in load_file(tmp_path / "run/stage-2-s2/model.safetensors")


def test_a_mixture_of_experts_with_the_loss_of_its_router(tmp_path):
    """Its experts are divided as transformers' plan says; it is trained and saved as one process does."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": len(runs.VOCABULARY)}
    config = MixtralConfig(num_local_experts=4, output_router_logits=True, **shape, **HEADS)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    runs.make_tokenizer().save_pretrained(tmp_path / "model")
    whole = trained(tmp_path, tmp_path / "model", 1, 4, sizes=(8, 4))
    ranks = Ranks(tmp_path, "train", divided(tmp_path, tmp_path / "model", sizes=(8, 4)), "--quiet")
    assert ranks.wait() == [0, 0], ranks.text
    assert deviation(whole, tmp_path / "run") < NEAR


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({"lora": {"r": 2}}, "lora: was set with tp_size: 2, must be left out"),
    "ema": ({"reference": "ema"}, "reference: was 'ema' with tp_size: 2, must be another"),
    "fsdp": ({"trainer": {"fsdp": True}}, "trainer.fsdp: was set with tp_size: 2, must be left out"),
    "grad_tol": ({"grad_tol": 0.01}, "grad_tol: was 0.01, must be 0 with tp_size or trainer.fsdp"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_settings_that_contradict_it(tmp_path, model, kind):
    settings, message = WRONG[kind]
    with pytest.raises(UserError, match=message):
        load_config(runs.write_settings(tmp_path, model, tp_size=2, **settings))


def test_heads_that_cannot_be_divided_are_found_before_the_weights_are_read(tmp_path, model):
    config = runs.configured(tmp_path, model, tp_size=2)  # it has 2 attention heads, and 1 for keys and values
    with pytest.raises(UserError, match=r"tp_size: was 2, must divide the model's num_key_value_heads \(1\)"):
        try_run(config, runs.make_tokenizer(), AutoConfig.from_pretrained(model))


def test_it_must_be_the_number_of_processes(tmp_path, model):
    config = runs.configured(tmp_path, model, tp_size=2)
    with pytest.raises(UserError, match="tp_size: was 2, must be the number of processes, which is 1"):
        runs.train(config)
