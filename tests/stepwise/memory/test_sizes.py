"""Weights are counted exactly, and a layer's activations are those of the formula in docs/memory.md."""

from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from sdpo_kernels.stepwise.memory.batch import Lengths, longest
from sdpo_kernels.stepwise.memory.setup import _OF_STEPS, Setup
from sdpo_kernels.stepwise.memory.sizes import Measured, measure
from sdpo_kernels.stepwise.settings.lora import LoraSettings

BATCH = longest(Lengths.longest(33), 1, packed=True, shared=False)


def config(family=LlamaConfig, **options):
    settings = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return family(**settings | options)


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_once(tied):
    settings = config(tie_word_embeddings=tied)
    real = AutoModelForCausalLM.from_config(settings)
    sizes, _ = measure(settings, BATCH, Setup())
    assert sizes.numbers == sizes.trained == sum(weight.numel() for weight in real.parameters())
    assert sizes.weights == sizes.gradients == 4 * sizes.numbers
    assert sizes.states == 8 * sizes.numbers
    assert sizes.layers[0].numbers == sum(weight.numel() for weight in real.model.layers[0].parameters())
    assert sizes.tied == tied


def test_an_adapter_as_peft_adds_it():
    real = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 8}}
    wrapped = peft.get_peft_model(real, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    trained, total = wrapped.get_nb_trainable_parameters()
    sizes, _ = measure(config(), BATCH, Setup(dtype=torch.bfloat16, lora=LoraSettings(**options)))
    assert (sizes.trained, sizes.numbers) == (trained, total)
    assert sizes.weights == 2 * (total - trained) + 4 * trained
    assert (sizes.gradients, sizes.states, sizes.head_gradient) == (4 * trained, 8 * trained, 0)
    assert sizes.head_lora == 0


def test_an_adapter_on_the_head():
    lora = LoraSettings(r=4, target_modules=["q_proj", "lm_head"], rank_pattern={"lm_head": 11})
    sizes, _ = measure(config(), BATCH, Setup(dtype=torch.bfloat16, lora=lora))
    assert (sizes.head_gradient, sizes.head_lora) == (0, 16)


@pytest.mark.parametrize(
    ("settings", "a_weight"),
    [
        ({"bits": 4, "double": True}, 0.5 + 1 / 64 + 4 / (64 * 256)),
        ({"bits": 4, "double": False}, 0.5 + 4 / 64),
        ({"bits": 8}, 1 + 4 / 1024),
    ],
)
def test_quantised_linear_layers(settings, a_weight):
    """All layers have 1,024 inputs, so that every block is whole; norms, embedding and head stay in bfloat16."""
    square = config(hidden_size=1024, intermediate_size=1024, num_hidden_layers=1, num_key_value_heads=4)
    lora = LoraSettings(r=2)
    setup = Setup(dtype=torch.bfloat16, lora=lora, quantization=settings)
    whole, _ = measure(square, BATCH, Setup(dtype=torch.bfloat16, lora=lora))
    sizes, _ = measure(square, BATCH, setup)
    linear = 7 * 1024**2
    assert sizes.numbers == whole.numbers
    assert whole.weights - sizes.weights == linear * (2 - a_weight)
    assert sizes.unpacked == 2 * 1024**2
    exact, _ = measure(square, BATCH, replace(setup, quantization=settings | {"compute_dtype": "float32"}))
    assert exact.unpacked == 4 * 1024**2


@pytest.mark.parametrize("family", [LlamaConfig, MixtralConfig])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_of_a_tensor_parallel_model_has_its_part_of_every_matrix(family, tied):
    """Norms and a mixture's router are whole on each rank. Autocast's copies are of the parts."""
    settings = config(family, tie_word_embeddings=tied)
    whole, before = measure(settings, BATCH, Setup(compute=torch.bfloat16))
    part, after = measure(settings, BATCH, Setup(compute=torch.bfloat16, gpus=2, tp=2))
    real = AutoModelForCausalLM.from_config(settings)
    small = sum(w.numel() for name, w in real.named_parameters() if "norm" in name or "mlp.gate.weight" in name)
    assert part.numbers == (whole.numbers - small) / 2 + small
    assert (part.weights, part.gradients, part.states) == (4 * part.numbers, 4 * part.numbers, 8 * part.numbers)
    assert (part.vocabulary, part.head_gradient) == (50, whole.head_gradient / 2)
    assert [layer.kept for layer in after.layers] == [layer.kept for layer in before.layers]
    assert after.layers[0].copies == pytest.approx(before.layers[0].copies / 2, rel=0.02)
    assert before.backward_work - after.backward_work == whole.layers[0].gradients - part.layers[0].gradients


@pytest.mark.parametrize("family", [LlamaConfig, MixtralConfig])
def test_scoring_more_tokens_takes_more_of_what_grows_with_them(family):
    """PEFT adds their adapter's product to experts whenever they work: that does not grow, and would be most."""
    setup = Setup(dtype=torch.bfloat16, lora=LoraSettings(), compute=torch.bfloat16)
    few, many = (
        measure(config(family), longest(Lengths.longest(tokens), 1, packed=True, shared=False), setup)[1]
        for tokens in (129, 1025)
    )
    growing = few.forward_work - few.forward_fixed
    assert few.forward_fixed + 8 * growing == pytest.approx(many.forward_work, rel=0.1)
    assert (few.forward_fixed > few.forward_work / 5) == (family is MixtralConfig)


@pytest.mark.parametrize(
    ("setup", "per_token"),
    [
        (Setup(), lambda h, kv, i: 4 * (8 * h + 2 * kv + 4 * i)),
        (Setup(compute=torch.bfloat16), lambda h, kv, i: 30 * h + 4 * kv + 8 * i),
        (Setup(compute=torch.bfloat16, gpus=2, sharded=True), lambda h, kv, i: 20 * h + 4 * kv + 8 * i),
    ],
)
@pytest.mark.parametrize("shape", [(64, 192, 4, 2), (128, 256, 4, 4)])
def test_a_llamas_activations_follow_the_formula(setup, per_token, shape):
    hidden, intermediate, heads, kv_heads = shape
    settings = config(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    _, found = measure(settings, BATCH, setup)
    kv = hidden * kv_heads // heads
    numbers = 4 * (heads + 2)  # a logsumexp of each head and the two norms' scales
    for layer in found.layers:
        assert layer.kept == BATCH.tokens * (per_token(hidden, kv, intermediate) + numbers)
        assert layer.entering == BATCH.tokens * hidden * (2 if setup.sharded else 4)
    assert found.layers[0].copies == (
        2 * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * intermediate) if setup.autocast else 0
    )


@pytest.mark.parametrize("base", [Setup(compute=torch.bfloat16), Setup(compute=torch.bfloat16, gpus=4, sharded=True)])
def test_settings_of_the_steps_change_nothing_of_a_measurement(base):
    other = {
        "checkpointing": True, "pairs": 1, "accumulation": 2, "scored_pairs": 1, "evaluates": True, "max_length": 512,
        "reshards": False, "syncs_each": True, "follows": True, "grad_tol": 0.01, "gpus": 8, "memory": 2**30,
    }  # fmt: skip
    assert other.keys() == set(_OF_STEPS)
    assert measure(config(), BATCH, replace(base, **other)) == measure(config(), BATCH, base)


def test_a_measurement_is_taken_once(monkeypatch):
    from sdpo_kernels.stepwise.memory import sizes

    calls = []

    def counted(model_config, batch, setup, **options):
        calls.append((batch, setup))
        return measure(model_config, batch, setup, **options)

    monkeypatch.setattr(sizes, "measure", counted)
    model, setup = Measured(config()), Setup(compute=torch.bfloat16)
    shorter = longest(Lengths.longest(17), 1, packed=True, shared=False)
    cases = [(BATCH, setup), (BATCH, replace(setup, memory=1)), (shorter, setup), (BATCH, replace(setup, compute=None))]
    for batch, wanted in cases * 2:
        assert model.measure(batch, wanted) == measure(config(), batch, wanted)
    assert len(calls) == 3
