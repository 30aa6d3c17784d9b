"""A merged adapter scores as base + adapter does, tied head or not, also after it was saved and loaded again."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sdpo_kernels.stepwise.models.merge import is_tied, merge_adapter, merge_in_pieces
from tests.stepwise import runs

IDS = torch.tensor([[1, 5, 9, 4, 7, 3, 8, 6, 2]])


def logp(model) -> float:
    """Summed log-prob of one sequence, float64."""
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits.double()
    return float(logits[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None]).sum())


TARGETS = [["embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"], ["q_proj", "v_proj"]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
def test_the_published_weights_score_as_those_that_were_trained(tmp_path, tied, targets):
    folder = runs.make_model(tmp_path / "base", tie_word_embeddings=tied)
    config = runs.configured(tmp_path, folder, lora={"r": 4, "target_modules": targets})
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert is_tied(base) == tied
    start = logp(base)

    trained = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    torch.manual_seed(0)
    for name, weight in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    wanted = logp(trained)
    assert abs(wanted - start) > 0.1
    trained.save_pretrained(tmp_path / "adapter")

    merged = merge_adapter(tmp_path / "adapter", config)
    assert logp(merged) == pytest.approx(wanted, rel=1e-5)
    merged.save_pretrained(tmp_path / "published")
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "published", dtype=torch.float32)
    assert logp(published) == pytest.approx(wanted, rel=1e-5)

    # a cut run merges one weight at a time: the same bits, and the same configs
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    trained.save_pretrained(tmp_path / "alone", save_embedding_layers=False)
    assert merge_in_pieces(tmp_path / "alone", config, pieces)
    again = AutoModelForCausalLM.from_pretrained(pieces, dtype=torch.float32)
    assert all(weight.equal(published.state_dict()[name]) for name, weight in again.state_dict().items())
    for name in ("config.json", "generation_config.json"):
        assert (pieces / name).read_text() == (tmp_path / "published" / name).read_text()
    assert is_tied(again) == is_tied(published)

    touches_ends = bool({"embed_tokens", "lm_head"} & set(targets))
    assert is_tied(published) == (tied and not touches_ends)
