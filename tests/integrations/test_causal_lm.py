"""The fused head inside a model's own forward: found, correct, reached by gradients, and removed by detaching."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from sdpo_kernels.integrations import causal_lm
from sdpo_kernels.integrations.causal_lm import (
    LMHead,
    attach_fused_head,
    check_head,
    detach_fused_head,
    disable_dropout,
    evaluating,
    find_head,
)
from sdpo_kernels.integrations.dpo_step import dpo_step, score_pairs
from sdpo_kernels.rows import ScoredRows
from tests.integrations.tiny_models import FAMILIES, own_logps, sequences, shifted, tiny_model

IDS = sequences(12)[0]
INPUTS = {"input_ids": IDS[None], "position_ids": torch.arange(12)[None]}
TARGETS = shifted(IDS)[None]


def fused_logps(model: Any) -> Tensor:
    return model(**INPUTS, logp_targets=TARGETS).logps[TARGETS[0] != -100]


def still(family: str, **overrides: Any) -> Any:
    """A model in training mode without dropout and with the fused head."""
    model = tiny_model(family, **overrides)
    disable_dropout(model)
    return attach_fused_head(model)


# ---- find_head ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "scale", "softcap"),
    [("llama", 1.0, None), ("cohere", 4.0, None), ("granite", 4.0, None), ("gemma2", 1.0, 3.0), ("gemma3", 1.0, 3.0)],
)
def test_head_options_come_from_the_config(family: str, scale: float, softcap: float | None) -> None:
    model = tiny_model(family)
    head = find_head(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    assert head.body is model.base_model
    assert head.weight() is model.get_output_embeddings().weight
    assert head.bias() is None


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_head_of_a_multimodal_model(softcap: float | None) -> None:
    """Options come from the text config; Gemma 3's multimodal class reads no softcap there, and check_head says so."""
    text = tiny_model("gemma3", final_logit_softcapping=softcap).config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model = attach_fused_head(tf.Gemma3ForConditionalGeneration(config))
    nn.init.normal_(model.lm_head.weight, 0.0, 0.3)
    assert find_head(model).softcap == softcap
    if softcap is None:
        assert check_head(model, IDS) < 2e-5
    else:
        with pytest.raises(ValueError, match=r"found logit_scale 1, softcap 3\.0"):
            check_head(model, IDS)


def test_head_with_a_bias() -> None:
    config = tf.PhiConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = tf.PhiForCausalLM(config)
    nn.init.normal_(model.lm_head.bias)
    attach_fused_head(model)
    assert find_head(model).bias() is model.lm_head.bias
    assert check_head(model, IDS) < 1e-4


def test_models_without_a_usable_head_are_refused() -> None:
    llama = tiny_model("llama")
    with pytest.raises(ValueError, match="LlamaModel, must be a causal language model"):
        find_head(llama.model)
    with pytest.raises(ValueError, match="Linear, must be a causal language model"):
        find_head(nn.Linear(3, 3))
    llama.lm_head.weight = nn.Parameter(torch.zeros(61, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="int8 weight"):
        attach_fused_head(llama)


# ---- attach and detach ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_logps_are_the_models_own(family: str) -> None:
    model = still(family)
    assert check_head(model, IDS) < 2e-5
    own = own_logps(model, INPUTS, TARGETS)
    fused = fused_logps(model)
    assert fused.dtype == torch.float32
    assert fused.grad_fn is not None
    eps = torch.finfo(torch.float32).eps  # granite's log-probs reach −34, whose rounding alone is 2e-6
    torch.testing.assert_close(fused.double(), own, rtol=eps, atol=3e-6)


def test_without_targets_nothing_changes_and_detach_undoes_it() -> None:
    plain, model = tiny_model("llama").eval(), tiny_model("llama").eval()
    keys = list(model.state_dict())
    assert attach_fused_head(model) is model
    assert torch.equal(model(**INPUTS).logits, plain(**INPUTS).logits)
    labelled = model(**INPUTS, labels=INPUTS["input_ids"])
    assert torch.equal(labelled.loss, plain(**INPUTS, labels=INPUTS["input_ids"]).loss)
    assert list(model.state_dict()) == keys
    assert detach_fused_head(model) is model
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="without a fused head"):
        detach_fused_head(model)
    with pytest.raises(ValueError, match="without a fused head"):
        check_head(model, IDS)


def test_an_earlier_patch_of_forward_is_kept() -> None:
    model = tiny_model("llama")
    calls: list[int] = []
    own = model.forward

    def earlier(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = earlier
    attach_fused_head(model)
    model(**INPUTS)
    assert calls == [1]
    detach_fused_head(model)
    assert model.forward is earlier


def test_the_signature_names_the_new_keywords() -> None:
    """Trainer drops columns that are not in this signature, and generate() checks its arguments with it."""
    plain = list(inspect.signature(tiny_model("llama").forward).parameters)
    names = list(inspect.signature(still("llama").forward).parameters)
    new = ["logp_targets", "logp_source", "logp_rows", "logp_outputs", "logp_temperature"]
    assert names == [*plain[:-1], *new, plain[-1]]
    assert names[0] == "input_ids"


def test_wrong_calls_are_refused() -> None:
    model = still("llama")
    rows = ScoredRows.from_labels(TARGETS)
    with pytest.raises(ValueError, match="logp_outputs: was given without logp_targets"):
        model(**INPUTS, logp_outputs=("entropy",))
    with pytest.raises(ValueError, match="logp_temperature: was given without logp_targets"):
        model(**INPUTS, logp_temperature=0.5)
    with pytest.raises(ValueError, match="logp_rows: was given without logp_targets"):
        model(**INPUTS, logp_rows=rows)
    with pytest.raises(ValueError, match="labels: was given with logp_targets"):
        model(**INPUTS, logp_targets=TARGETS, labels=TARGETS)
    with pytest.raises(ValueError, match=r"logp_targets: was of shape \[1, 11\], must be \[1, 12\]"):
        model(**INPUTS, logp_targets=TARGETS[:, 1:])
    with pytest.raises(ValueError, match="2 positional arguments"):
        model(IDS[None], None, logp_targets=TARGETS)
    with pytest.raises(ValueError, match="that already has a fused head"):
        attach_fused_head(model)
    with pytest.raises(ValueError, match="backend"):
        fused_logps(attach_fused_head(tiny_model("llama"), backend="nosuch"))
    with pytest.raises(ValueError, match="stash_bytes: was -1"):
        attach_fused_head(tiny_model("llama"), stash_bytes=-1)
    with pytest.raises(ValueError, match="grad_tol: was -1"):
        attach_fused_head(tiny_model("llama"), grad_tol=-1)
    with pytest.raises(ValueError, match="grad_tol_relative: was 'yes'"):
        attach_fused_head(tiny_model("llama"), grad_tol_relative="yes")


def liger_like_forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
    """As Liger's: the body swallows keywords that it does not know."""
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)[0]
    return CausalLMOutputWithPast(logits=self.lm_head(hidden))


def test_a_forward_that_is_replaced_afterwards_is_named() -> None:
    calls: list[Callable[[Any], Any]] = [
        lambda model: model(**INPUTS, logp_targets=TARGETS),
        lambda model: check_head(model, IDS),
        lambda model: score_pairs(model, IDS[None].repeat(2, 1), IDS[None].repeat(2, 1)),
        lambda model: dpo_step(model, IDS[None].repeat(2, 1), IDS[None].repeat(2, 1), ref_logps=torch.zeros(2)),
        lambda model: Accelerator(cpu=True).prepare(model)(**INPUTS, logp_targets=TARGETS),
        lambda model: copy.deepcopy(model)(**INPUTS, logp_targets=TARGETS),
    ]
    message = (
        rf"its forward was replaced by another library \({__name__}\.liger_like_forward\) after attach_fused_head and "
        r"ignores logp_targets; patch the model first, then attach"
    )
    for call in calls:
        model = still("llama")
        call(model)
        model.forward = MethodType(liger_like_forward, model)
        with pytest.raises(ValueError, match=message):
            call(model)
        assert model(**INPUTS).logits.shape == (1, 12, 61)

    # the other order works
    model = tiny_model("llama").eval()
    expected = fused_logps(attach_fused_head(copy.deepcopy(model)))
    model.forward = MethodType(liger_like_forward, model)
    assert torch.equal(fused_logps(attach_fused_head(model)), expected)
    check_head(model, IDS)

    # detaching leaves no hook behind
    assert not hasattr(detach_fused_head(model)(**INPUTS, logp_targets=TARGETS), "logps")


def test_liger_itself_after_and_before() -> None:
    patches = pytest.importorskip("liger_kernel.transformers", reason="Liger is not importable (make bench-env)")
    only_loss = {"rope": False, "rms_norm": False, "swiglu": False}  # its other kernels need a GPU
    model = still("llama").eval()
    expected = fused_logps(model)
    patches.apply_liger_kernel_to_llama(model=model, **only_loss)
    with pytest.raises(
        ValueError, match=r"replaced by Liger \(liger_kernel\.transformers\.model\.llama\.lce_forward\)"
    ):
        fused_logps(model)

    model = tiny_model("llama").eval()
    patches.apply_liger_kernel_to_llama(model=model, **only_loss)
    assert torch.equal(fused_logps(attach_fused_head(model)), expected)


def test_a_head_that_sharding_has_emptied_is_named() -> None:
    """As DeepSpeed ZeRO-3 leaves it outside of the head's own forward, and FSDP1."""
    whole = still("llama")
    for model, call in ((tiny_model("llama"), attach_fused_head), (whole, fused_logps)):
        weight = nn.Parameter(torch.empty(0))
        model.lm_head.weight = weight
        with pytest.raises(ValueError, match=r"head was a Linear with an empty weight, as FSDP1 .* use FSDP2"):
            call(model)
        weight.ds_shape = torch.Size((61, 32))
        with pytest.raises(
            ValueError, match=r"Linear whose weight of shape \[61, 32\] DeepSpeed ZeRO-3 has partitioned"
        ):
            call(model)


def test_positional_input_ids_and_given_rows() -> None:
    model = still("llama")
    rows = ScoredRows.from_labels(TARGETS)
    logps = model(IDS[None], logp_targets=TARGETS, logp_rows=rows).logps[TARGETS[0] != -100]
    assert torch.equal(logps, fused_logps(model))


def test_no_tensor_of_vocabulary_size_comes_back() -> None:
    out = still("llama", use_cache=True)(**INPUTS, logp_targets=TARGETS)
    assert list(out) == ["logps"]
    assert out.logps.shape == (12,)


def test_deepcopy_has_a_forward_of_its_own() -> None:
    model = still("llama")
    other = copy.deepcopy(model)
    expected = fused_logps(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    uniform = torch.full((10,), -torch.tensor(61.0).log().item())
    torch.testing.assert_close(fused_logps(other), uniform)
    assert torch.equal(fused_logps(model), expected)


def test_saving_leaves_no_trace(tmp_path: Any) -> None:
    model = still("gemma2")
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert "sdpo" not in file.read_text()
        assert "logp" not in file.read_text()
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    attach_fused_head(loaded)
    assert torch.equal(fused_logps(loaded.train()), fused_logps(model))


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("adapter", [False, True])
def test_under_accelerates_bf16(accelerator: Accelerator, adapter: bool) -> None:
    model = still("llama")
    exact = fused_logps(model)
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    prepared = accelerator.prepare_model(model)
    logps = fused_logps(prepared)
    assert logps.dtype == torch.float32
    assert 1e-4 < float((logps - exact).detach().abs().max()) < 0.3  # bf16 in the body
    assert check_head(prepared, IDS) < 0.3
    logps.sum().backward()
    assert any(p.grad is not None for p in prepared.parameters())
    back = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(fused_logps(back), exact)  # the autocast is gone, the fused head is not


# ---- PEFT -----------------------------------------------------------------------------------------------------------

LORA: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head with bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rslora": {"target_modules": ["lm_head"], "use_rslora": True, "r": 4},
}


def with_adapter(model: Any, options: dict[str, Any], zero: bool = False) -> Any:
    """`model` with a LoRA whose weights are not zero (unless requested), dropout off."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "lora_dropout": 0.1} | options))
    disable_dropout(wrapped)
    if not zero:
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return wrapped.train()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", LORA.values(), ids=LORA.keys())
def test_adapters_give_peft_s_own_values_and_gradients(options: dict[str, Any], tied: bool) -> None:
    model = with_adapter(still("llama", tie_word_embeddings=tied), options)
    base = own_logps(tiny_model("llama", tie_word_embeddings=tied), INPUTS, TARGETS)
    own, fused = own_logps(model, INPUTS, TARGETS), fused_logps(model)
    assert float((own - base).detach().abs().max()) > 0.05  # the adapter has an effect
    torch.testing.assert_close(fused.double(), own, rtol=0, atol=5e-6)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    expected = torch.autograd.grad(own.sum(), [p for _, p in named])
    got = torch.autograd.grad(fused.sum(), [p for _, p in named])
    for (name, _), a, b in zip(named, got, expected, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-6, name
    assert check_head(model, IDS) < 2e-5


def test_weight_of_an_adapted_head_is_base_plus_delta() -> None:
    model = with_adapter(still("llama"), LORA["head"])
    head = find_head(model)
    hidden = torch.randn(5, 32)
    lora = model.get_base_model().lm_head
    torch.testing.assert_close(hidden @ head.weight().T, lora(hidden))
    given = head.operands(hidden)
    assert given.bias is None
    assert given.weight is lora.base_layer.weight
    assert given.lora_b.shape == (61, 8)  # a rank of 3, filled up
    torch.testing.assert_close(given.hidden @ torch.cat([given.weight, given.lora_b], 1).T, lora(hidden))
    gradient = torch.autograd.grad(head.weight().sum(), lora.lora_B["default"].weight)[0]
    assert float(gradient.abs().max()) > 0


def test_the_delta_of_an_adapted_head_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(still("llama"), LORA["head"])
    own = own_logps(model, INPUTS, TARGETS)
    monkeypatch.delattr(type(model.get_base_model().lm_head), "get_delta_weight")
    fused = fused_logps(model)
    fused.sum().backward()
    torch.testing.assert_close(fused.double(), own, rtol=0, atol=5e-6)


def test_disabled_merged_and_several_adapters() -> None:
    model = with_adapter(still("llama"), LORA["head"])
    adapted = fused_logps(model).detach()
    with model.disable_adapter():
        off = fused_logps(model)
        torch.testing.assert_close(off.double(), own_logps(model, INPUTS, TARGETS), rtol=0, atol=5e-6)
    assert float((off - adapted).detach().abs().max()) > 0.05
    model.merge_adapter()
    torch.testing.assert_close(fused_logps(model), adapted, rtol=0, atol=2e-5)
    with model.disable_adapter():
        torch.testing.assert_close(fused_logps(model), off, rtol=0, atol=2e-5)
    model.add_adapter("second", peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    disable_dropout(model)
    both = fused_logps(model)
    torch.testing.assert_close(both.double(), own_logps(model, INPUTS, TARGETS), rtol=0, atol=5e-6)
    assert float((both - adapted).detach().abs().max()) > 0.05


def test_a_small_delta_on_a_bf16_head_is_not_rounded_away() -> None:
    """Half an ulp of the weights: base + delta in bf16 would be the base again."""
    model = with_adapter(still("llama").to(torch.bfloat16), LORA["head"], zero=True)
    head = find_head(model)
    lora = head.module
    nn.init.ones_(lora.base_layer.weight)
    nn.init.constant_(lora.lora_A["default"].weight, 0.02)
    nn.init.constant_(lora.lora_B["default"].weight, 0.005)
    assert lora.lora_A["default"].weight.dtype == torch.float32
    delta = lora.get_delta_weight("default")
    assert torch.equal((lora.base_layer.weight + delta).to(torch.bfloat16), lora.base_layer.weight)
    hidden = torch.full((1, 32), 0.5, dtype=torch.bfloat16)
    given = head.operands(hidden)
    whole = torch.cat([given.weight, given.lora_b], 1)
    moved = (given.hidden.double() @ whole.double().T) - hidden.double() @ lora.base_layer.weight.double().T
    torch.testing.assert_close(moved, hidden.double() @ delta.double().T, rtol=2e-2, atol=0)
    assert check_head(model, IDS) < 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True, "target_modules": ["lm_head"]}, "must be plain LoRA"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 2]}}, "TrainableTokensWrapper"),
    ],
)
def test_adapters_that_are_not_additive_are_refused(options: dict[str, Any], says: str) -> None:
    model = peft.get_peft_model(still("llama"), peft.LoraConfig(**options))
    with pytest.raises(ValueError, match=says):
        fused_logps(model)


def test_dropout_on_the_head_is_refused_in_training() -> None:
    model = peft.get_peft_model(still("llama"), peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.1)).train()
    with pytest.raises(ValueError, match=r"lora_dropout: was 0\.1"):
        fused_logps(model)
    assert check_head(model, IDS) < 2e-5  # in eval mode it is off
    assert disable_dropout(model) == 1
    torch.testing.assert_close(fused_logps(model).double(), own_logps(model, INPUTS, TARGETS), rtol=0, atol=5e-6)


def test_attaching_through_peft() -> None:
    model = with_adapter(tiny_model("llama"), LORA["all-linear"])
    assert attach_fused_head(model) is model
    torch.testing.assert_close(fused_logps(model).double(), own_logps(model, INPUTS, TARGETS), rtol=0, atol=5e-6)


# ---- check_head -----------------------------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Make the fused forward and the check find a head with `changes`."""

    def find(model: nn.Module) -> LMHead:
        head = find_head(model)
        wrong = {name: value(head) if callable(value) else value for name, value in changes.items()}
        return LMHead(**{"body": head.body, "module": head.module, "logit_scale": head.logit_scale} | wrong)

    monkeypatch.setattr(causal_lm, "find_head", find)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"softcap": None}),
        ("gemma2", {"softcap": 30.0}),
        ("llama", {"softcap": 3.0}),
        ("cohere", {"logit_scale": 1.0}),
        ("granite", {"logit_scale": 0.25}),
        ("llama", {"module": lambda head: head.body.embed_tokens}),
        ("llama", {"body": lambda head: Unnormalised(head.body)}),
    ],
    ids=["no softcap", "other softcap", "softcap too many", "no scale", "scale upside down", "wrong head", "no norm"],
)
def test_check_head_finds(monkeypatch: pytest.MonkeyPatch, family: str, changes: Any, dtype: torch.dtype) -> None:
    model = still(family).to(dtype)
    assert check_head(model, IDS) >= 0.0
    broken(monkeypatch, **changes)
    with pytest.raises(ValueError, match="differ from its own logits by"):
        check_head(model, IDS)


class Unnormalised(nn.Module):
    """A body whose last norm was forgotten."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.inner = body

    def forward(self, **inputs: Any) -> Any:
        out = self.inner(**inputs)
        out.last_hidden_state = out.last_hidden_state * 3
        return out


@pytest.mark.parametrize(("zero", "says"), [(False, "differ from its own logits"), (True, "lora_A.*lora_B")])
def test_check_head_finds_a_dropped_adapter(monkeypatch: pytest.MonkeyPatch, zero: bool, says: str) -> None:
    """Also a new one, which adds nothing yet."""
    model = with_adapter(still("llama"), LORA["head"], zero=zero)
    assert check_head(model, IDS) < 2e-5
    monkeypatch.setattr(LMHead, "_lora_names", lambda self: [])
    with pytest.raises(ValueError, match=says):
        check_head(model, IDS)


def test_check_head_finds_a_dropped_saved_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(still("llama"), LORA["head saved"], zero=True)
    assert check_head(model, IDS) < 2e-5
    monkeypatch.setattr(LMHead, "_base", lambda self: self.module.original_module)
    with pytest.raises(ValueError, match="modules_to_save"):
        check_head(model, IDS)


def test_check_head_finds_a_head_that_is_more_than_linear() -> None:
    model = still("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out.cumsum(-1))
    with pytest.raises(ValueError, match="more than one linear layer"):
        check_head(model, IDS)


def test_check_head_finds_nan_and_too_short_a_sequence() -> None:
    model = still("llama")
    with pytest.raises(ValueError, match="input_ids: was of 1 tokens"):
        check_head(model, IDS[:1])
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="by nan nat"):
        check_head(model, IDS)


def test_check_head_leaves_the_model_as_it_was() -> None:
    model = still("llama")
    model.model.layers[1].eval()
    flags = [m.training for m in model.modules()]
    check_head(model, torch.cat([IDS] * 5)[None])
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not model.lm_head._forward_hooks


# ---- disable_dropout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rates", "modules"),
    [
        ("llama", {"attention_dropout": 0.3}, 2),
        ("gpt2", {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3, "summary_first_dropout": 0.0}, 7),
        ("gpt_neox", {"attention_dropout": 0.3, "hidden_dropout": 0.3}, 4),
        ("mixtral", {"router_jitter_noise": 0.3}, 2),
    ],
)
def test_disable_dropout(family: str, rates: dict[str, float], modules: int) -> None:
    model = tiny_model(family, **rates)

    def twice() -> list[Tensor]:
        return [model(**INPUTS).logits.detach() for _ in range(2)]

    first, second = twice()
    assert not torch.equal(first, second)
    on_config = sum(rate > 0 for rate in rates.values())
    assert disable_dropout(model) >= modules + on_config
    assert all(getattr(model.config, name) == 0.0 for name in rates)
    first, second = twice()
    assert torch.equal(first, second)
    with evaluating(model):
        torch.testing.assert_close(model(**INPUTS).logits, first, rtol=0, atol=1e-6)
    assert model.training
    assert disable_dropout(model) == 0


def test_requested_further_outputs_are_returned_with_the_log_probs() -> None:
    model = still("llama")
    plain = model(**INPUTS, logp_targets=TARGETS)
    assert plain.log_sum_sq_probs is None
    out = model(**INPUTS, logp_targets=TARGETS, logp_outputs=("log_sum_sq_probs",))
    scored = TARGETS[0] != -100
    truth = (2 * model(**INPUTS).logits[0].double().log_softmax(-1)).logsumexp(-1)
    assert torch.allclose(out.log_sum_sq_probs[scored].double(), truth[scored], atol=1e-5)
    assert torch.allclose(out.logps, plain.logps, atol=1e-5)
    assert not out.log_sum_sq_probs.requires_grad
    with pytest.raises(ValueError, match=r"^outputs: was .*'perplexity'"):
        model(**INPUTS, logp_targets=TARGETS, logp_outputs=("perplexity",))
