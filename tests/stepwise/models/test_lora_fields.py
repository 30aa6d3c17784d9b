"""`lora:` takes the fields of peft.LoraConfig: what is trained is what a stage publishes, or the field is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings.run_file import load_config
from tests.stepwise import runs

FIELDS = [
    {"use_rslora": True},
    {"use_dora": True},
    {"bias": "lora_only"},
    {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}},
    {"modules_to_save": ["norm"]},
    {"exclude_modules": ["up_proj"]},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"trainable_token_indices": [5, 6]},
    {"target_modules": ["q_proj"], "layers_pattern": "layers", "layers_to_transform": 0},
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: next(iter(fields)))
def test_what_is_trained_is_what_is_published(tmp_path, model, fields):
    """Two stages: the second one continues the adapter. The merged weights give the logits of base and adapter."""
    runs.train(runs.configured(tmp_path, model, (8, 8), lora={"r": 2, **fields}))
    folder = tmp_path / "run" / "stage-2-s2"
    stored = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    for name, value in fields.items():
        assert stored[name] == value or sorted(stored[name]) == sorted(value)

    ids = torch.arange(3, 13)[None]
    merged = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    base = AutoModelForCausalLM.from_pretrained(model)
    before = base(ids).logits
    together = PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
    torch.testing.assert_close(merged, together, rtol=1e-5, atol=1e-5)
    assert (merged - before).abs().max() > 1e-3


REFUSED = [
    ({"lora_bias": True}, "lora.lora_bias: cannot be set: what it trains cannot be merged into the base weights"),
    ({"task_type": "CAUSAL_LM"}, "lora.task_type: cannot be set: the driver sets it"),
    ({"layer_replication": [[0, 1]]}, "lora.layer_replication: cannot be set: it changes the base model"),
    ({"init_lora_weights": "pissa"}, "lora.init_lora_weights: was 'pissa', must be true, gaussian or orthogonal"),
    ({"init_lora_weights": False}, "lora.init_lora_weights: was false, must be true, gaussian or orthogonal"),
    ({"use_rslora": 3}, "lora.use_rslora: was 3, must be true or false"),
    ({"bias": "some"}, "lora.bias: was 'some', must be 'none', 'all' or 'lora_only'"),
    ({"rslora": True}, "lora.rslora: unknown key; did you mean 'use_rslora'?"),
    ({"rank": 8}, "lora.rank: unknown key; did you mean 'rank_pattern'?"),
    ({"alpha": 4, "lora_alpha": 8}, "lora.lora_alpha: is the same as alpha, must be left out"),
    ({"lora_dropout": 0.1}, "lora.dropout: was 0.1, must be 0"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_set_says_why(tmp_path, model, fields, message):
    with pytest.raises(UserError) as raised:
        runs.configured(tmp_path, model, lora=fields)
    assert str(raised.value).startswith(f"{tmp_path}/run.yaml: {message}")


def test_fields_that_contradict_each_other_are_an_error_before_training(tmp_path, model):
    config = runs.configured(tmp_path, model, lora={"layers_to_transform": 0})
    with pytest.raises(UserError, match=r"lora: `layers_to_transform` cannot be used when `target_modules` is a str"):
        runs.train(config)
    assert not (tmp_path / "run").exists()


def test_pefts_names_and_the_stored_config(tmp_path, model):
    config = runs.configured(tmp_path, model, lora={"lora_alpha": 8, "lora_dropout": 0, "use_rslora": True})
    assert (config.lora.alpha, config.lora.dropout, config.lora.more) == (8.0, 0.0, {"use_rslora": True})
    stored = config.model_dump(mode="json")["lora"]
    assert stored["use_rslora"] is True
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert load_config(path) == config
