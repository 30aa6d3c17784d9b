"""Tiny random models of the tested families, and batches for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HALF: dict[str, Any] = {"head_dim": 8}
_SLIDE: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# Gemma 3 turns by its own angles in each type of layer; transformers 5.17 takes them in no other form
_TWO_ROPES: dict[str, Any] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "router_jitter_noise": 0.0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _COMMON),
    "qwen2": ("Qwen2", _COMMON | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}),
    "qwen3": ("Qwen3", _COMMON | _HALF),
    "gemma2": ("Gemma2", _COMMON | _HALF | _SLIDE | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3Text",
        _COMMON | _HALF | _SLIDE | {"final_logit_softcapping": 3.0, "rope_parameters": _TWO_ROPES},
    ),
    "mistral": ("Mistral", _COMMON | {"sliding_window": 4}),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "phi3": ("Phi3", _COMMON | {"sliding_window": 4}),
    "granite": ("Granite", _COMMON | {"logits_scaling": 0.25, "attention_multiplier": 0.3, "residual_multiplier": 0.7}),
    "cohere": ("Cohere", _COMMON | {"logit_scale": 4.0}),
    "mixtral": ("Mixtral", _COMMON | _EXPERTS | {"num_local_experts": 4, "sliding_window": 4}),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}),
    "olmo2": ("Olmo2", _COMMON),
    "qwen3_moe": (
        "Qwen3Moe",
        _COMMON | _HALF | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "gpt_oss": ("GptOss", _COMMON | _HALF | _SLIDE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
FAMILIES = sorted(CONFIGS)


def tiny_model(family: str, **overrides: Any) -> Any:
    """A random model in training mode with eager attention, whose logits spread over a few units."""
    kind, options = CONFIGS[family]
    config = getattr(tf, f"{kind}Config")(**copy.deepcopy(options) | overrides)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
            elif "norm" not in name and "ln_" not in name:
                parameter.normal_(0.0, 0.1)
    return model.train()


def sequences(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def packed(ids: list[Tensor]) -> dict[str, Tensor]:
    """The batch as one row, the first two tokens of each sequence unscored."""
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in ids])[None],
        "logp_targets": torch.cat([shifted(s) for s in ids])[None],
    }


def shifted(ids: Tensor) -> Tensor:
    targets = torch.cat([ids[1:], ids.new_tensor([-100])])
    targets[0] = -100
    return targets


def padded(ids: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The batch padded on the right with its mask; and the targets [S, T]."""
    rows = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=0)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in ids], batch_first=True)
    targets = nn.utils.rnn.pad_sequence([shifted(s) for s in ids], batch_first=True, padding_value=-100)
    return {"input_ids": rows, "attention_mask": mask}, targets


def own_logps(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Log-probs of the scored tokens [N_scored], in the order of the rows, from the model's own logits."""
    logits = model(**inputs, use_cache=False).logits
    scored = targets != -100
    return logits[scored].double().log_softmax(-1).gather(1, targets[scored][:, None]).squeeze(1)
