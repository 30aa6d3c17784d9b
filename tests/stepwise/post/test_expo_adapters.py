"""ExPO on LoRA adapters: the product is scaled, and adapters that cannot be scaled are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.post.expo import extrapolate
from tests.stepwise import runs
from tests.stepwise.post.test_expo import _small_pieces, load  # noqa: F401 - the fixture is autouse


@pytest.fixture
def adapter(tmp_path, model):
    """An adapter of `model` with random numbers in all its matrices, embeddings included."""
    torch.manual_seed(3)
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.3)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def test_an_adapter_of_the_start_scales_its_product(tmp_path, model, adapter):
    extrapolate(model, adapter, tmp_path / "out", 0.4)
    base = AutoModelForCausalLM.from_pretrained(model).state_dict()
    merged = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder).merge_and_unload().state_dict()
        for folder in (adapter, tmp_path / "out")
    ]
    changed = 0
    for name, weight in base.items():
        delta = merged[0][name] - weight
        changed += bool(delta.abs().max() > 1e-3)
        assert torch.allclose(merged[1][name], weight + 1.4 * delta, atol=1e-6), name
    assert changed == 3  # q_proj, down_proj, embed_tokens
    old, new = load(adapter), load(tmp_path / "out")
    assert [name for name in old if torch.equal(old[name], new[name])] == [
        n for n in old if n.endswith(("A.weight", "embedding_A"))
    ]
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_logits_of_a_scaled_adapter(tmp_path, model, adapter):
    """They are those of base + (1 + α)·delta, computed by hand from the matrices."""
    extrapolate(model, adapter, tmp_path / "out", 0.5)
    by_hand = AutoModelForCausalLM.from_pretrained(model)
    once = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter).merge_and_unload()
    with torch.no_grad():
        for parameter, other in zip(by_hand.parameters(), once.parameters(), strict=True):
            parameter.add_(other - parameter, alpha=1.5)
        ids = torch.tensor([[5, 9, 20, 33]])
        scaled = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
        assert torch.allclose(scaled(ids).logits, by_hand(ids).logits, atol=1e-5)
        assert not torch.allclose(once(ids).logits, by_hand(ids).logits, atol=1e-2)


def edit(adapter: Path, **values) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_adapters_that_cannot_be_scaled(tmp_path, model, adapter):
    def refused(start, aligned):
        with pytest.raises(UserError) as raised:
            extrapolate(start, aligned, tmp_path / "out", 0.3)
        assert not (tmp_path / "out").exists()
        return str(raised.value)

    assert "is a LoRA adapter; merge it into its base first" in refused(adapter, model)
    assert "merge" in refused(adapter, adapter)
    other = runs.make_model(tmp_path / "other", seed=5)
    assert f"is an adapter of {model}, not of {other}" in refused(other, adapter)
    for values in ({"peft_type": "IA3"}, {"init_lora_weights": "pissa_niter_4"}):
        strange = shutil.copytree(adapter, tmp_path / "strange", dirs_exist_ok=True)
        edit(strange, **values)
        assert "only LoRA that leaves its base unchanged" in refused(model, strange)
    shutil.copyfile(adapter / "adapter_config.json", strange / "adapter_config.json")
    vector = {"base_model.model.x.lora_magnitude_vector.weight": torch.ones(2), "lm_head.weight": torch.ones(2, 2)}
    save_file(load(adapter) | vector, strange / "adapter_model.safetensors")
    message = refused(model, strange)
    assert "lora_magnitude_vector.weight, lm_head.weight besides LoRA's A and B" in message


def test_a_hub_base_is_not_compared(tmp_path, model, adapter):
    edit(adapter, base_model_name_or_path="org/model")
    extrapolate(model, adapter, tmp_path / "out", 0.3)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
