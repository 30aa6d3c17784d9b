"""What the twelve steps do not reach of OpenRLHF's own Actor: PPO's call, mixtures of experts, LoRA on the head.

Loss and gradients of one model are compared between our forward and, after `unpatch()`, OpenRLHF's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ROUNDING = 1e-5  # float32


def check_actor(folder: Path) -> None:
    """Raise RuntimeError where the adapter's values are not OpenRLHF's."""
    import transformers as tf

    torch.manual_seed(0)
    models = {"llama": tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))}
    models["mixtral"] = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    lora = {"lora_rank": 4, "target_modules": ["q_proj", "lm_head"]}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        for options in ({}, lora) if name == "llama" else ({},):
            _compare(f"{name} {options}", str(folder / name), options)


def _compare(case: str, path: str, options: dict[str, Any]) -> None:
    from openrlhf.models import Actor

    from sdpo_kernels.integrations import openrlhf

    with openrlhf.patch():
        actor = Actor(path, attn_implementation="eager", temperature=0.7, **options)
        for name, parameter in actor.named_parameters():
            if "lora_B" in name:  # 0 at the start, which would hide the adapter
                torch.nn.init.normal_(parameter, std=0.1)
        ours = _loss_and_gradients(actor)

    # OpenRLHF compiles its entropy, which takes longer than everything else here
    with torch.compiler.set_stance("force_eager"):
        theirs = _loss_and_gradients(actor)
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{case}: gradients of {sorted(ours.keys() ^ theirs.keys())} are not in both")
    for name, own in theirs.items():
        difference = float((ours[name] - own).abs().max())
        if not difference <= ROUNDING * max(1.0, float(own.abs().max())):
            raise RuntimeError(f"{case}, {name}: differs from OpenRLHF's own by {difference:.2g}")


def _loss_and_gradients(actor: Any) -> dict[str, Tensor]:
    """As PPO (log-probs and entropy of actions, prompts padded on the left) and SFT (every token) call the actor."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, -2:] = 0
    actions = mask[:, 1:][:, -6:].clone()

    logps, output = actor(ids, actions, attention_mask=mask, return_output=True, return_entropy=True)
    every = actor(ids, attention_mask=mask, return_logprobs=True) * mask[:, 1:]
    entropy = output.entropy[:, -actions.shape[1] :] * actions
    aux_loss = output.aux_loss if "aux_loss" in output else torch.zeros(())

    weights = torch.linspace(-1, 1, actions.shape[1])
    actor.zero_grad()
    ((logps * weights).sum() + 0.3 * entropy.sum() + every.sum() + aux_loss).backward()
    found = {"logps": logps, "entropy": entropy, "every": every, "aux_loss": aux_loss}
    gradients = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()} | gradients
