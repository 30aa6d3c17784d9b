"""The auxiliary loss of mixture-of-experts routers: the model's own value and gradient, through the fused head."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule

from sdpo_kernels.dpo_output import DPOOutput
from sdpo_kernels.integrations import causal_lm
from sdpo_kernels.integrations.causal_lm import attach_fused_head, check_head, disable_dropout
from sdpo_kernels.integrations.dpo_step import dpo_step, score_pairs
from sdpo_kernels.integrations.router_loss import find_router_loss, router_coefficient, unused_coefficient
from tests.integrations.test_dpo_step import batch
from tests.integrations.tiny_models import CONFIGS, packed, padded, sequences, tiny_model

RELEASE = tuple(int(part) for part in tf.__version__.split(".")[:2])
NOT_RECORDED = pytest.mark.skipif(RELEASE < (5, 18), reason="GraniteMoe returns no router logits in transformers 5.17")
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", pytest.param("granitemoe", marks=NOT_RECORDED), "olmoe"]


def mixture(family, **overrides):
    """A tiny model whose config switches the auxiliary loss on."""
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.5} | overrides
    if family in CONFIGS:
        model = tiny_model(family, **options)
    else:
        kind = {"granitemoe": tf.GraniteMoeConfig, "olmoe": tf.OlmoeConfig}[family]
        experts = {"num_experts" if family == "olmoe" else "num_local_experts": 4, "num_experts_per_tok": 2}
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = tf.AutoModelForCausalLM.from_config(
            kind(vocab_size=61, pad_token_id=0, **shape, **experts, **options),
            attn_implementation="eager",
            experts_implementation="eager",
        )
    disable_dropout(model)
    return model


def routers(model):
    return {name: p for name, p in model.named_parameters() if "gate." in name or "router" in name}


@pytest.mark.parametrize("family", MIXTURES)
def test_the_value_and_gradient_of_the_models_own_forward(family):
    """On the same rows, padded with a mask and packed without."""
    model = mixture(family)
    twin = copy.deepcopy(model)
    attach_fused_head(model)
    ids = sequences(12, 7, 9)
    inputs, targets = padded(ids)
    for given, wanted in ((inputs | {"logp_targets": targets}, inputs), (packed(ids), None)):
        if wanted is None:
            wanted = {name: given[name] for name in ("input_ids", "position_ids")}
        model.zero_grad()
        twin.zero_grad()
        fused, own = model(**given).aux_loss, twin(**wanted, use_cache=False).aux_loss
        assert float(own) > 1
        torch.testing.assert_close(fused, own)
        fused.backward()
        own.backward()
        theirs = routers(twin)
        assert theirs
        for name, router in routers(model).items():
            assert router.grad.abs().max() > 0
            torch.testing.assert_close(router.grad, theirs[name].grad)


def test_a_model_that_fsdp2_has_sharded():
    """`fully_shard` makes the model's class a subclass of one of its own, in another module."""
    model = mixture(MIXTURES[0])
    own = type(model)
    model.__class__ = type(f"FSDP{own.__name__}", (FSDPModule, own), {"__module__": FSDPModule.__module__})
    attach_fused_head(model)
    inputs, targets = padded(sequences(12, 7))
    assert float(model(**inputs, logp_targets=targets).aux_loss) > 1
    assert find_router_loss(model).function.__module__ == own.__module__


@pytest.mark.parametrize("family", MIXTURES)
def test_check_head_compares_it(family, monkeypatch):
    model = attach_fused_head(mixture(family))
    check_head(model, sequences(12)[0])
    genuine = causal_lm.find_router_loss

    def other(*args):
        balance = genuine(*args)
        return lambda logits, mask: 1.1 * balance(logits, mask)

    monkeypatch.setattr(causal_lm, "find_router_loss", other)
    with pytest.raises(ValueError, match=r"auxiliary loss was \d\.\d+, must be \d\.\d+ as in the model's own forward"):
        check_head(model, sequences(12)[0])


@pytest.mark.parametrize("family", MIXTURES)
def test_without_the_switch_there_is_none(family):
    model = attach_fused_head(mixture(family, output_router_logits=False))
    inputs = packed(sequences(9))
    assert model(**inputs).aux_loss is None
    assert model(**inputs, output_router_logits=True).aux_loss > 1  # as in the model's own forward
    assert attach_fused_head(mixture(family))(**inputs, output_router_logits=False).aux_loss is None
    assert dpo_step(model, *batch(), ref_logps=torch.zeros(4)).aux_loss is None


REFUSED = (
    rf"config\.output_router_logits: was true, must be false for a \w+ForCausalLM of transformers {tf.__version__},"
)


def test_a_model_that_records_no_router_logits_is_refused(monkeypatch):
    """As GraniteMoe of transformers 5.17, whose own loss then lacks the term without a word."""
    kind = tf.GraniteMoeForCausalLM
    recorded = {name: what for name, what in kind._can_record_outputs.items() if name != "router_logits"}
    monkeypatch.setattr(tf.GraniteMoePreTrainedModel, "_can_record_outputs", recorded)
    with pytest.raises(ValueError, match=REFUSED):
        attach_fused_head(mixture("granitemoe"))
    attach_fused_head(mixture("granitemoe", output_router_logits=False))


def test_a_body_that_returns_no_router_logits_is_refused():
    model = attach_fused_head(mixture("mixtral"))
    model.model.register_forward_hook(lambda _body, _args, out: out.__setitem__("router_logits", None))
    inputs = packed(sequences(9))
    with pytest.raises(ValueError, match=REFUSED):
        model(**inputs)
    assert model(**inputs, output_router_logits=False).aux_loss is None


def test_layers_without_a_router_have_no_auxiliary_loss():
    model = attach_fused_head(mixture("qwen3_moe", mlp_only_layers=[0, 1]))
    assert model(**packed(sequences(9))).aux_loss is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_dpo_step_adds_it(family):
    results = {}
    for name, options in {
        "off": {"output_router_logits": False},
        "0": {"router_aux_loss_coef": 0.0},
        "10": {"router_aux_loss_coef": 10.0},
    }.items():
        model = attach_fused_head(mixture(family, **options))
        out = dpo_step(model, *batch(), ref_logps=score_pairs(model, *batch()) + torch.arange(4.0))
        out.loss.backward()
        results[name] = out, [p.grad for p in routers(model).values()]
    off, zero, ten = (results[name][0] for name in ("off", "0", "10"))
    assert off.loss == zero.loss
    assert ten.aux_loss == zero.aux_loss > 1
    assert not ten.aux_loss.requires_grad
    torch.testing.assert_close(ten.loss, off.loss + 10 * ten.aux_loss)
    assert torch.equal(ten.margins, off.margins)
    assert len(ten) == len(off) == len(DPOOutput._fields)  # the tuple itself is the one of other losses
    for without, none, with_it in zip(*(results[name][1] for name in ("off", "0", "10")), strict=True):
        torch.testing.assert_close(without, none)
        assert not torch.allclose(without, with_it)


def test_with_an_adapter():
    model = attach_fused_head(mixture("mixtral"))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    out = dpo_step(adapted, *batch(), ref_logps=torch.zeros(4))
    assert out.aux_loss > 1
    assert router_coefficient(adapted) == 0.5


def test_models_without_one():
    llama = tiny_model("llama", output_router_logits=True)
    assert find_router_loss(llama) is None
    assert attach_fused_head(llama)(**packed(sequences(9))).aux_loss is None
    assert router_coefficient(llama) == 0.0


def test_one_that_takes_other_arguments_is_refused():
    config = tf.DogeConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, is_moe=True,
                           num_attention_heads=4, num_experts=16, output_router_logits=True)  # fmt: skip
    with pytest.raises(
        ValueError, match=r"config\.output_router_logits: was true, must be false for a DogeForCausalLM"
    ):
        attach_fused_head(tf.AutoModelForCausalLM.from_config(config))


def test_the_warning_about_a_coefficient_that_is_not_used():
    def warning(family, **options):
        return unused_coefficient(tiny_model(family, **options).config)

    assert "router_aux_loss_coef is 0.001 but output_router_logits is false" in warning("mixtral")
    assert "router_aux_loss_coef is 10 " in warning("qwen3_moe", router_aux_loss_coef=10.0)
    assert warning("mixtral", output_router_logits=True) is None
    assert warning("mixtral", router_aux_loss_coef=0.0) is None
    assert warning("llama") is None
    dense = SimpleNamespace(router_aux_loss_coef=0.001, num_local_experts=0)  # as Granite 4's dense models
    assert unused_coefficient(SimpleNamespace(get_text_config=lambda: dense)) is None
