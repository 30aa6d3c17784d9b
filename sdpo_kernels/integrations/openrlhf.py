"""OpenRLHF's DPO, SFT and PPO on these kernels: its actor scores tokens without logits.

    from sdpo_kernels.integrations import openrlhf

    with openrlhf.patch():            # or patch() … unpatch(); before the actors are made
        train(args)                   # of openrlhf.cli.train_dpo

and from the command line, with the arguments of `openrlhf.cli.train_dpo`, also under `deepspeed --module` and torchrun:

    python -m sdpo_kernels.integrations.openrlhf train_dpo --model.model_name_or_path … --data.dataset …

`Actor.__init__` then attaches the fused head to the model it has loaded, and `Actor.forward` scores with it wherever
log-probs are asked for; where logits are, it is OpenRLHF's own. `DPOTrainer.concatenated_forward` tells the actor how
long the prompts are, so that prompts are not scored. An actor that is not served (packed samples and ring attention,
vision-language models, ZeRO-3, tensor parallelism, DeepCompile, or a head that is not known) stays OpenRLHF's own, with
one warning that says why.

Differences: log-probs and entropies of tokens that are not scored (padding, and prompts in DPO and PPO) are 0, where
OpenRLHF computes them and then masks them; the output that comes with log-probs has `aux_loss` and `entropy` and no
logits; logits of a bfloat16 model are not rounded to bfloat16.

Written from OpenRLHF 0.11.2: openrlhf/models/actor.py, openrlhf/trainer/dpo_trainer.py.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.integrations.causal_lm import LogpsOutput, attach_fused_head, detach_fused_head, is_attached
from sdpo_kernels.integrations.head_settings import checked_settings
from sdpo_kernels.integrations.method_patch import MethodPatch, undo
from sdpo_kernels.integrations.token_logps import token_logps
from sdpo_kernels.rows import IGNORE_INDEX

logger = logging.getLogger(__name__)

TRIED = ("0.11.2",)
# parameters of Actor.__init__, Actor.forward and DPOTrainer.concatenated_forward
INIT = (
    "self", "pretrain_or_model", "attn_implementation", "param_dtype", "load_in_4bit", "lora_rank", "lora_alpha",
    "lora_dropout", "target_modules", "ds_config", "device_map", "packing_samples", "temperature", "use_liger_kernel",
    "freeze_visual_encoder", "experts_implementation", "kwargs",
)  # fmt: skip
FORWARD = (
    "self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits", "return_logprobs",
    "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs",
)  # fmt: skip
CONCATENATED = ("self", "model", "chosen_ids", "c_mask", "reject_ids", "r_mask", "prompt_id_lens")
COMMANDS = ("train_dpo", "train_sft")
USAGE = (
    "usage: python -m sdpo_kernels.integrations.openrlhf train_dpo <arguments of openrlhf.cli.train_dpo>. PPO runs in "
    "Ray's workers: docs/integrations.md has its hook"
)


def patch(
    *,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
    grad_tol: float = 0.0,
    grad_tol_relative: bool = False,
) -> MethodPatch:
    """Let OpenRLHF's actors score tokens with the fused head, until `unpatch()` or the end of a `with` block.

    Actors made before the call are not changed. A second call replaces the first one; its settings are those of actors
    made after it. Logs once which methods were replaced (level INFO).

    Args:
        backend, stash_bytes, grad_tol, grad_tol_relative: as in `linear_logps`.

    Raises:
        ImportError: OpenRLHF, or a package that it needs, is not installed.
        RuntimeError: a version whose methods take other parameters than those of 0.11.2; nothing is replaced then.
        ValueError: an unknown backend, stash_bytes that is neither "auto" nor at least 0, or a grad_tol outside [0, 1).
    """
    settings = checked_settings(backend, stash_bytes, grad_tol, grad_tol_relative)

    attach = partial(attach_fused_head, **settings)
    new = MethodPatch("openrlhf", TRIED)
    actor = importlib.import_module("openrlhf.models.actor").Actor
    trainer = importlib.import_module("openrlhf.trainer.dpo_trainer").DPOTrainer
    forward = _forward(actor.forward)
    new.replace(actor, "__init__", INIT, _attaching(actor.__init__, attach))
    new.replace(actor, "forward", FORWARD, forward)
    new.replace(trainer, "concatenated_forward", CONCATENATED, _concatenated(trainer.concatenated_forward, forward))
    new.activate()
    return new


def unpatch() -> None:
    """Put OpenRLHF's own methods back; does nothing if they are not replaced."""
    undo("openrlhf")


def _attaching(own: Callable[..., None], attach: Callable[..., Any]) -> Callable[..., None]:
    """`Actor.__init__`, which also attaches the fused head: after PEFT has wrapped the model, before DeepSpeed does."""
    signature = inspect.signature(own)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        reason = _unserved(self, signature.bind(self, *args, **kwargs).arguments)
        if reason is None:
            try:
                if is_attached(self.model):  # by an earlier actor, perhaps with other settings
                    detach_fused_head(self.model)
                attach(self.model)
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            _warn_once(f"openrlhf: an Actor stays OpenRLHF's own, which computes logits: {reason}")

    return __init__


def _unserved(actor: Any, given: Mapping[str, Any]) -> str | None:
    """Why an actor made from the arguments `given` cannot have the fused head, or None."""
    config = given.get("ds_config") or {}
    reasons = {
        "packed samples (--ds.packing_samples) and ring attention": getattr(actor, "packing_samples", False),
        "vision-language models": getattr(actor, "is_vlm", False),
        "DeepSpeed ZeRO-3, which partitions the head (ZeRO-2 does not),": _setting(config, "zero_optimization.stage")
        == 3,
        "tensor parallelism (--ds.tensor_parallel_size)": (_setting(config, "tensor_parallel.autotp_size") or 1) > 1,
        "DeepCompile (--ds.deepcompile)": _setting(config, "compile.deepcompile"),
    }
    return next((f"{name} cannot be served" for name, holds in reasons.items() if holds), None)


def _setting(config: Mapping[str, Any], path: str) -> Any:
    group, name = path.split(".")
    return config.get(group, {}).get(name)


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """`Actor.forward` for callers that want log-probs; `prompt_id_lens` [B] comes from `_concatenated`."""
    signature = inspect.signature(own)

    def forward(self: Any, *args: Any, prompt_id_lens: Sequence[int] | None = None, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        wants_logits = call.action_mask is None and not call.return_logprobs
        if wants_logits or getattr(self, "packing_samples", False) or not is_attached(self.model):
            return own(self, *args, **kwargs)

        # the model's inputs are those of OpenRLHF's own forward
        ids, mask = call.sequences, call.attention_mask
        positions = (mask.long().cumsum(-1) - 1).masked_fill_(mask == 0, 1)
        scored = _scored(mask, call.action_mask, prompt_id_lens)
        logps, _, extras = token_logps(
            self.model, torch.roll(ids, -1, 1).masked_fill_(~scored, IGNORE_INDEX), shifted=True,
            outputs=("entropy",) if call.return_entropy else (), temperature=self.temperature,
            input_ids=ids, attention_mask=mask, position_ids=positions, **call.mm_inputs,
        )  # fmt: skip

        # position t predicts token t + 1, the last position none
        logps = logps[:, :-1]
        if call.action_mask is not None:
            logps = logps[:, -call.action_mask.shape[1] :] * call.action_mask.float()
        entropy = extras["entropy"][:, :-1] if call.return_entropy else None
        output = LogpsOutput(entropy=entropy, aux_loss=extras.get("aux_loss"))
        return (logps, output) if call.return_output else logps

    return forward


def _scored(attention_mask: Tensor, action_mask: Tensor | None, prompt_id_lens: Sequence[int] | None) -> Tensor:
    """[B, T] bool: position t predicts a token that the caller wants.

    That is an action, an answer's token, or (SFT) any but padding after padding: OpenRLHF's loss mask of several turns
    can end one token late, on the first token of the padding.
    """
    scored = torch.zeros_like(attention_mask, dtype=torch.bool)
    if action_mask is not None:  # [B, A], of the last A tokens
        scored[:, -1 - action_mask.shape[1] : -1] = action_mask.bool()
        return scored

    scored[:, :-1] = attention_mask[:, 1:].bool()
    if prompt_id_lens is None:
        scored[:, :-1] |= attention_mask[:, :-1].bool()
    else:
        lengths = torch.as_tensor(prompt_id_lens, device=scored.device)
        scored &= torch.arange(1, scored.shape[1] + 1, device=scored.device) >= lengths[:, None]
    return scored


def _concatenated(own: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`DPOTrainer.concatenated_forward`, which also says where the prompts end."""

    def concatenated_forward(
        self: Any, model: Any, chosen_ids: Tensor, c_mask: Tensor, reject_ids: Tensor, r_mask: Tensor,
        prompt_id_lens: list[int],
    ) -> Any:  # fmt: skip
        # OpenRLHF's method calls `model` once, with the chosen sequences first
        scored = partial(model, prompt_id_lens=prompt_id_lens * 2) if type(model).forward is forward else model
        return own(self, scored, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)

    return concatenated_forward


def main(arguments: Sequence[str] | None = None) -> None:
    """`patch()`, then `python -m openrlhf.cli.<command>` with the other arguments."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # DeepSpeed's launcher puts --local_rank=0 before the command
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command not in COMMANDS:
        raise SystemExit(f"command: was {command!r}, must be {' or '.join(COMMANDS)}; {USAGE}")
    arguments.remove(command)

    if os.environ.get("RANK", "0") == "0":
        ours = logging.getLogger("sdpo_kernels")
        ours.setLevel(logging.INFO)
        if not ours.hasHandlers():
            ours.addHandler(logging.StreamHandler())
    patch()
    sys.argv = [command, *arguments]
    runpy.run_module(f"openrlhf.cli.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # not this copy of the module, which nobody else could import
    from sdpo_kernels.integrations.openrlhf import main as imported_main

    imported_main()
