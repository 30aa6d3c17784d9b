"""Token log-probs against the model's own logits, for every way that a trainer passes labels and wraps a model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sdpo_kernels.backends.base import EXTRAS
from sdpo_kernels.integrations.causal_lm import attach_fused_head, detach_fused_head, disable_dropout
from sdpo_kernels.integrations.lm_head import unwrap
from sdpo_kernels.integrations.token_logps import token_logps
from tests.integrations.test_dpo_step import batch
from tests.integrations.tiny_models import tiny_model


def own_logps(model, ids, labels, mask):
    """[B, T] float64 log-probs of the token after each position, and the logits that they are of."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.double()
    targets = torch.roll(labels, -1, 1)
    targets[:, -1] = -100
    found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(targets == -100, 0.0), targets, logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("shifted", [False, True])
def test_values_mask_and_gradients_are_those_of_the_models_own_logits(family, shifted):
    twin = tiny_model(family)
    disable_dropout(twin)
    model = attach_fused_head(copy.deepcopy(twin))
    ids, labels, mask = batch()
    wanted, targets, _ = own_logps(twin, ids, labels, mask)

    logps, scored, extras = token_logps(
        model, targets if shifted else labels, shifted=shifted, input_ids=ids, attention_mask=mask, use_cache=True
    )
    assert logps.dtype == torch.float32
    assert torch.equal(scored, targets != -100)
    assert extras == {}
    torch.testing.assert_close(logps.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not logps[~scored].any()

    weights = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    (logps * weights).sum().backward()
    (wanted * weights).sum().backward()
    for (name, found), own in zip(model.named_parameters(), twin.parameters(), strict=True):
        if own.grad is not None:
            torch.testing.assert_close(
                found.grad, own.grad, rtol=2e-3, atol=2e-5 * float(own.grad.abs().max()), msg=name
            )


def test_extras_are_at_the_position_that_predicts_and_zero_elsewhere():
    twin = tiny_model("llama")
    model = attach_fused_head(copy.deepcopy(twin))
    ids, labels, mask = batch()
    _, targets, logits = own_logps(twin, ids, labels, mask)
    logps = logits.log_softmax(-1)
    wanted = {
        "entropy": -(logps.exp() * logps).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * logps, -1),
        "mean_logits": logits.mean(-1),
        "is_top1": (logits.argmax(-1) == targets).double(),
    }

    _, scored, extras = token_logps(model, labels, outputs=EXTRAS, input_ids=ids, attention_mask=mask)
    assert list(extras) == list(EXTRAS) == list(wanted)
    for name, found in extras.items():
        assert found.shape == targets.shape
        torch.testing.assert_close(found.double(), wanted[name].masked_fill(~scored, 0.0), rtol=1e-5, atol=1e-5)


def test_the_temperature_divides_the_logits_of_log_probs_and_extras():
    twin = tiny_model("gemma2")  # with a softcap, which comes before the temperature
    model = attach_fused_head(copy.deepcopy(twin))
    ids, labels, mask = batch()
    _, targets, logits = own_logps(twin, ids, labels, mask)
    own = (logits / 0.7).log_softmax(-1)
    wanted = own.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    entropy = -(own.exp() * own).sum(-1)

    found, scored, extras = token_logps(
        model, labels, outputs=("entropy",), temperature=0.7, input_ids=ids, attention_mask=mask
    )
    torch.testing.assert_close(found.double(), wanted.masked_fill(~scored, 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(extras["entropy"].double(), entropy.masked_fill(~scored, 0.0), rtol=1e-5, atol=1e-5)

    found.sum().backward()
    wanted.masked_fill(~scored, 0.0).sum().backward()
    got, own_gradient = model.lm_head.weight.grad, twin.lm_head.weight.grad
    torch.testing.assert_close(got, own_gradient, rtol=2e-3, atol=2e-5 * float(own_gradient.abs().max()))

    with pytest.raises(ValueError, match="temperature: was 0"):
        token_logps(model, labels, temperature=0.0, input_ids=ids, attention_mask=mask)


def test_the_routers_auxiliary_loss_is_an_extra_with_the_models_own_value():
    twin = tiny_model("mixtral", output_router_logits=True)
    model = attach_fused_head(copy.deepcopy(twin))
    ids, labels, mask = batch()
    own = twin(input_ids=ids, attention_mask=mask).aux_loss
    torch.testing.assert_close(token_logps(model, labels, input_ids=ids, attention_mask=mask)[2]["aux_loss"], own)

    # a trainer may switch it on for a call, whatever the config says
    model = attach_fused_head(tiny_model("mixtral"))
    assert token_logps(model, labels, input_ids=ids, attention_mask=mask)[2] == {}
    extras = token_logps(model, labels, input_ids=ids, attention_mask=mask, output_router_logits=True)[2]
    torch.testing.assert_close(extras["aux_loss"], own)


def test_an_auxiliary_loss_that_cannot_be_computed_is_refused(monkeypatch):
    model = attach_fused_head(tiny_model("mixtral"))
    module = __import__("sys").modules[type(model).__module__]
    monkeypatch.setattr(module, "load_balancing_loss_func", lambda other: other)
    ids, labels, mask = batch()
    with pytest.raises(ValueError, match="auxiliary loss of the router takes other arguments"):
        token_logps(model, labels, input_ids=ids, attention_mask=mask, output_router_logits=True)


class DeepSpeedEngine(nn.Module):
    """As DeepSpeed's: it holds the model as `module` and calls it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrapped_models_score_the_same():
    ids, labels, mask = batch()
    model = attach_fused_head(tiny_model("llama"))
    plain = token_logps(model, labels, input_ids=ids, attention_mask=mask).logps

    engine = DeepSpeedEngine(model)
    assert unwrap(engine) is model
    assert torch.equal(token_logps(engine, labels, input_ids=ids, attention_mask=mask).logps, plain)

    # trainers attach after PEFT has wrapped the model
    lora = get_peft_model(detach_fused_head(model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    attach_fused_head(lora)
    adapted = token_logps(lora, labels, input_ids=ids, attention_mask=mask).logps
    assert not torch.allclose(adapted, plain, atol=1e-3)
    with lora.disable_adapter():
        torch.testing.assert_close(token_logps(lora, labels, input_ids=ids, attention_mask=mask).logps, plain)


def test_wrong_calls_are_refused():
    ids, labels, mask = batch()
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="model: was a LlamaForCausalLM without a fused head; call attach_fused_head"):
        token_logps(model, labels, input_ids=ids)

    attach_fused_head(model)
    with pytest.raises(ValueError, match=r"labels: was torch.int64 of shape \[36\], must be torch.int64 of shape"):
        token_logps(model, labels.flatten(), input_ids=ids)
    with pytest.raises(ValueError, match=r"labels: was torch.int32"):
        token_logps(model, labels.int(), input_ids=ids)
    with pytest.raises(ValueError, match="labels: was list, must be"):
        token_logps(model, labels.tolist(), input_ids=ids)
    with pytest.raises(ValueError, match=r"outputs: was \('logits',\), must be names from entropy"):
        token_logps(model, labels, outputs=("logits",), input_ids=ids)
    with pytest.raises(ValueError, match=r"logp_targets: was of shape \[4, 8\], must be \[4, 9\]"):
        token_logps(model, labels[:, :-1].contiguous(), input_ids=ids)

    # as Liger's apply_… does after the head was attached
    model.forward = lambda **inputs: type(model).forward(model, input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="its forward was replaced by another library"):
        token_logps(model, labels, input_ids=ids, attention_mask=mask)


def test_a_head_that_zero3_has_partitioned_is_refused_by_name():
    model = attach_fused_head(tiny_model("llama"))
    ids, labels, mask = batch()
    weight = nn.Parameter(torch.empty(0))
    weight.ds_shape = torch.Size((61, 32))
    model.lm_head.weight = weight
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 has partitioned, must be whole: use ZeRO-2"):
        token_logps(model, labels, input_ids=ids, attention_mask=mask)
