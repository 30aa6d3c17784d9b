"""A quantised base beside the same model in plain float32: codes, log-probs, gradients, the hash, the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig
from transformers.utils import is_bitsandbytes_available

from sdpo_kernels.integrations import packed_attention
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models import load as load_module
from sdpo_kernels.stepwise.models import quantized
from sdpo_kernels.stepwise.models.load import add_adapter, load_model, weights_hash
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.models.trial import try_run
from tests.stepwise import runs

pytestmark = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="needs bitsandbytes (pip install sdpo-kernels[qlora])"
)

LORA = {"r": 4, "target_modules": "all-linear"}
EXACT = {"compute_dtype": "float32", "double": False}
IDS = torch.tensor([[1, 5, 9, 4, 7, 3, 8, 6, 2, 11, 30]])
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def in_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of 16 multiples of the largest weight of each block of 64 (QLoRA, section 3)."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (NF4[((blocks / largest)[..., None] - NF4).abs().argmin(-1)] * largest).reshape(weight.shape)


def in_int8(weight: torch.Tensor) -> torch.Tensor:
    """127 steps up to the largest weight of each row (LLM.int8)."""
    largest = weight.half().float().abs().amax(1, keepdim=True)
    return (weight.half().float() * (127 / largest)).round() * largest / 127


WIDE = {"hidden_size": 64, "intermediate_size": 128, "spread": 0.15}
WAYS = {"4 bits": (EXACT, in_nf4), "8 bits": ({"bits": 8}, in_int8)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Wide enough for bitsandbytes' packed CPU kernel, which scoring must not use."""
    return runs.make_model(tmp_path_factory.mktemp("wide") / "model", **WIDE)


def loaded(folder: Path, model: Path, quantization: dict, **settings):
    config = runs.configured(folder, model, lora=LORA, quantization=quantization, **settings)
    return config, load_model(str(model), config, Precision(torch.device("cpu")))


def rounded(model: Path, to) -> nn.Module:
    """The model in float32 with every linear layer of its body rounded by `to`."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(to(module.weight))
    return plain


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of the adapter, by the log-prob of IDS."""
    model.train()
    logits = model(IDS, use_cache=False).logits
    logits[0, :-1].float().log_softmax(-1).gather(1, IDS[0, 1:, None]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", WAYS)
def test_scoring_and_training_compute_with_the_rounded_weights(tmp_path, wide, way):
    """Scored first, in eval mode, as a stage does: neither values nor gradients may depend on it."""
    settings, to = WAYS[way]
    plain = rounded(wide, to)
    config, found = loaded(tmp_path, wide, settings)
    with torch.no_grad():
        wanted = plain(IDS, use_cache=False).logits
        for mode in (False, True):
            logits = found.model.train(mode)(IDS, use_cache=False).logits
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)

    add_adapter(found, config.lora)
    plain = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear"))
    torch.manual_seed(0)
    ours, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (found.model, plain))
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            theirs[name].copy_(parameter.normal_(0, 0.1))

    with torch.no_grad():
        found.model.eval()(IDS, use_cache=False)
    ours, theirs = gradients(found.model), gradients(plain)
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_merging_starts_from_the_weights_that_were_trained_on(tmp_path, wide, way):
    settings, to = WAYS[way]
    config, found = loaded(tmp_path, wide, settings)
    add_adapter(found, config.lora)
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    quantized.copy_dequantized(found.model, model)
    wanted = rounded(wide, to).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-5, atol=1e-6)


def test_gpt2s_layers_are_transposed_back(tmp_path):
    """Its linear layers are Conv1D, whose weights are the other way round."""
    config = GPT2Config(vocab_size=len(runs.VOCABULARY), n_embd=64, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    runs.make_tokenizer().save_pretrained(tmp_path / "m")
    _, found = loaded(tmp_path, tmp_path / "m", EXACT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    weight = model.transformer.h[0].mlp.c_fc.weight
    wanted = in_nf4(weight.detach().T.contiguous()).T
    quantized.copy_dequantized(found.model, model)
    torch.testing.assert_close(weight.detach(), wanted, rtol=1e-5, atol=1e-6)


def test_widths_that_bitsandbytes_gets_wrong_on_a_cpu_are_an_error(tmp_path, model):
    with pytest.raises(UserError, match=r"^quantization: 4 bits on a CPU need .* multiple of 64, .*q_proj has 16; use"):
        loaded(tmp_path, model, {})
    loaded(tmp_path, model, {"bits": 8})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_head_and_embedding_stay_as_they_are(tmp_path, tied, bits):
    folder = runs.make_model(tmp_path / "m", tie_word_embeddings=tied, **WIDE)
    _, found = loaded(tmp_path, folder, {"bits": bits})
    head, embedding = found.model.lm_head, found.model.get_input_embeddings()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(head) is nn.Linear
    assert (head.weight is embedding.weight) == tied
    assert torch.equal(head.weight, plain.lm_head.weight)
    assert torch.equal(embedding.weight, plain.get_input_embeddings().weight)
    names = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert {name for name, _ in quantized.quantized_layers(found.model)} == names
    assert (found.packed, found.shared, found.by_sequence) == (True, True, True)


DTYPES = [({}, torch.bfloat16), ({"compute_dtype": "float32"}, torch.float32), ({"bits": 8}, torch.float16)]


@pytest.mark.parametrize(("quantization", "dtype"), DTYPES, ids=str)
def test_the_probe_of_packed_sequences_expects_the_rounding_of_the_products(tmp_path, wide, quantization, dtype):
    """Hidden states are float32 in all of them. On a GPU the products of a packed row round otherwise."""
    _, found = loaded(tmp_path, wide, quantization)
    hidden = found.model.model(IDS, use_cache=False).last_hidden_state
    assert hidden.dtype == torch.float32
    assert packed_attention._compute_dtype(found.model, hidden) == dtype


def test_the_hash_is_of_what_was_loaded(tmp_path, wide):
    """Codes, scales and their kind; two loads agree. test_qlora compares it between processes."""
    kinds = [
        None,
        {"double": True},
        {"double": False},
        {"type": "fp4"},
        {"type": "fp4", "double": False},
        {"bits": 8},
    ]
    seen = set()
    for kind in kinds:
        config = runs.configured(tmp_path, wide, lora=LORA, quantization=kind)
        found = {weights_hash(load_model(str(wide), config, Precision(torch.device("cpu"))).model) for _ in range(2)}
        assert len(found) == 1
        seen |= found
    assert len(seen) == len(kinds)

    # one code, and one scale
    _, found = loaded(tmp_path, wide, {"double": False})
    _, layer = next(quantized.quantized_layers(found.model))
    layer.weight.data[0] ^= 1
    changed = weights_hash(found.model)
    layer.weight.quant_state.absmax[0] *= 2
    assert len(seen | {changed, weights_hash(found.model)}) == len(kinds) + 2


def test_a_quantised_layer_cannot_be_trained_whole(tmp_path, wide):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]}
    config = runs.configured(tmp_path, wide, lora=settings, quantization={})
    with pytest.raises(UserError, match=r"^lora\.modules_to_save: names up_proj, which quantization quantises and"):
        try_run(config, load_module.load_tokenizer(config), AutoModelForCausalLM.from_pretrained(wide).config)


@pytest.mark.parametrize("part", ["norm", "lm_head"])
def test_what_is_not_quantised_can_be_trained_whole(tmp_path, wide, part):
    settings = {"target_modules": ["q_proj"], "modules_to_save": [part]}
    runs.train(runs.configured(tmp_path, wide, (4,), lora=settings, quantization={}))
    assert (tmp_path / "run" / "stage-1-s1" / "adapter").is_dir()


def test_experts_are_no_linear_layers_and_the_run_says_so(tmp_path, wide):
    """What is loaded has them in the run's dtype. Of a Llama only the norms are left."""
    options = {"vocab_size": len(runs.VOCABULARY), "num_hidden_layers": 1, "num_attention_heads": 2}
    mixture = MixtralConfig(hidden_size=64, intermediate_size=64, num_key_value_heads=2, num_local_experts=4, **options)
    AutoModelForCausalLM.from_config(mixture).save_pretrained(tmp_path / "m")
    runs.make_tokenizer().save_pretrained(tmp_path / "m")
    config, found = loaded(tmp_path, tmp_path / "m", {})
    kept = sum(w.numel() for n, w in found.model.model.layers.named_parameters() if w.dtype == torch.float32)
    kept += found.model.model.norm.weight.numel()
    (warning,) = try_run(config, load_module.load_tokenizer(config), mixture)
    assert warning.startswith(f"quantization: {kept:,} of ")
    assert "weights between embedding and head stay in float32: only linear layers are quantised" in warning

    config = runs.configured(tmp_path, wide, lora=LORA, quantization={})
    assert try_run(config, load_module.load_tokenizer(config), AutoModelForCausalLM.from_pretrained(wide).config) == []
