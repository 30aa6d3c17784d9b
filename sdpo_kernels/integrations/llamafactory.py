"""LLaMA-Factory's DPO and KTO trainers without logits.

    python -m sdpo_kernels.integrations.llamafactory train run.yaml    # instead of: llamafactory-cli train run.yaml

    from sdpo_kernels.integrations import llamafactory as fused        # or in a program of your own
    with fused.patch():  # or patch() … unpatch()
        llamafactory.train.tuner.run_exp(settings)

`patch` replaces four methods: `__init__` of `CustomDPOTrainer` and `CustomKTOTrainer` attaches the fused head to policy
and reference first, `CustomDPOTrainer.concatenated_forward` and `CustomKTOTrainer.forward` take log-probs from it.
Losses, metrics, data and everything else stay the trainers' own. What differs:

- Log-probs are exact to float32 for a bfloat16 model, too; stock's logits are rounded to bfloat16 first.
- The logged `logits/chosen` and `logits/rejected` are of the scored tokens; stock's are of all positions, prompt and
  padding included. For DPO that is the mean logit; for KTO, as in stock, the sum of all logits of an example.

A trainer keeps its own way, with a warning that names the reason, if its batches have images, video or audio; if the
head was not found, is quantized, or was partitioned by DeepSpeed ZeRO-3; if FSDP1 hides it; if `use_liger_kernel` (of
transformers) would replace the model's forward. `enable_liger_kernel` (LLaMA-Factory's own) does not in these stages.
As in stock, the auxiliary loss of a mixture of experts is not part of the loss.

Written from LLaMA-Factory's source, 0.9.5: train/dpo/trainer.py, train/kto/trainer.py, train/trainer_utils.py.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from sdpo_kernels.integrations.causal_lm import attach_fused_head, detach_fused_head, is_attached, unwrap
from sdpo_kernels.integrations.head_settings import checked_settings
from sdpo_kernels.integrations.method_patch import MethodPatch, undo
from sdpo_kernels.integrations.token_logps import TokenLogps, token_logps

logger = logging.getLogger("sdpo_kernels.integrations.llamafactory")  # the same name if this file is __main__

__all__ = ["patch", "unpatch"]

Method = Callable[..., Any]

TRIED = ("0.9.5",)
INIT = ("self", "model", "ref_model", "finetuning_args", "processor", "disable_dropout", "kwargs")
TEXT = {"input_ids", "attention_mask", "position_ids", "labels"}
KTO_TEXT = {"input_ids", "attention_mask", "labels", "kl_input_ids", "kl_attention_mask", "kl_labels", "kto_tags"}
AVERAGED = ("ipo", "orpo", "simpo")  # losses of the mean log-prob of an answer's tokens
ELSEWHERE = {
    "USE_RAY": "Ray trains in processes of its own, which are not patched",
    "USE_MCA": "Megatron's trainers have no adapter",
    "USE_V1": "LLaMA-Factory's v1 has no DPO trainer",
}


def patch(
    *,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
    grad_tol: float = 0.0,
    grad_tol_relative: bool = False,
) -> MethodPatch:
    """Let the DPO and KTO trainers that are made from now on score tokens without logits.

    It ends with `unpatch()` or the `with patch():` block; trainers made before that go on with logits. A second call
    replaces the first one's settings. What was replaced is logged (level INFO).

    Args:
        backend, stash_bytes, grad_tol, grad_tol_relative: as in `linear_logps`.

    Raises:
        ImportError: LLaMA-Factory is not installed.
        RuntimeError: its trainers are missing or take other arguments, or USE_RAY, USE_MCA or USE_V1 leads elsewhere.
            Nothing stays replaced. Other versions than 0.9.5 with the same arguments are patched, with a warning.
        ValueError: an unknown backend, stash_bytes that is neither "auto" nor at least 0, or a grad_tol outside [0, 1).
    """
    settings = checked_settings(backend, stash_bytes, grad_tol, grad_tol_relative)
    for name, why in ELSEWHERE.items():
        if os.environ.get(name, "0").lower() in ("true", "y", "1"):
            raise RuntimeError(f"{name}: was {os.environ[name]}, must be 0: {why}")

    adapter = MethodPatch("llamafactory", TRIED)
    dpo, kto = _trainer("dpo", "CustomDPOTrainer"), _trainer("kto", "CustomKTOTrainer")
    attach = partial(attach_fused_head, **settings)
    attaching = partial(_attaching, attach=attach)
    for trainer, name, parameters, ours in (
        (dpo, "__init__", INIT, attaching),
        (dpo, "concatenated_forward", ("self", "model", "batch", "is_ref_model"), _scoring_pairs),
        (kto, "__init__", INIT, attaching),
        (kto, "forward", ("self", "model", "batch", "prefix"), _scoring_answers),
    ):
        original: Any = getattr(trainer, name, None)  # None is refused by replace()
        adapter.replace(trainer, name, parameters, ours(original))

    adapter.activate()
    return adapter


def unpatch() -> None:
    """Restore the trainers' own methods; does nothing if they are not replaced."""
    undo("llamafactory")


def _trainer(stage: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"llamafactory.train.{stage}.trainer"), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"llamafactory: train.{stage}.trainer.{name} was missing: {error}") from error


def _attaching(original: Method, attach: Callable[[Any], Any]) -> Method:
    """`__init__` that attaches the fused head first, because accelerate wraps the reference in it."""

    @wraps(original)
    def __init__(self: Any, model: Any, ref_model: Any, *args: Any, **kwargs: Any) -> None:
        attached = []
        try:
            if getattr(kwargs.get("args"), "use_liger_kernel", False):
                raise ValueError("use_liger_kernel: was true, must be false (enable_liger_kernel may be true)")
            if is_deepspeed_zero3_enabled():  # it partitions the head later, so find_head may see it whole
                raise ValueError("DeepSpeed: was ZeRO-3, which partitions the head, must be ZeRO-2 or less")
            for each in (model, ref_model):
                if each is None:
                    continue
                if is_attached(each):  # by an earlier trainer, perhaps with other settings
                    detach_fused_head(each)
                attached.append(attach(each))
        except ValueError as error:
            self._sdpo_reason = str(error)
            _warn_once(self._sdpo_reason)
            for each in attached:
                detach_fused_head(each)
        original(self, model, ref_model, *args, **kwargs)

    return __init__


def _scoring_pairs(original: Method) -> Method:
    """`CustomDPOTrainer.concatenated_forward`; chosen answers are the first half of the batch."""

    @wraps(original)
    def concatenated_forward(self: Any, model: Any, batch: Any, is_ref_model: bool = False) -> dict[str, Tensor]:
        if _keeps_logits(self, model, batch, TEXT):
            return original(self, model, batch, is_ref_model)

        logps, mask, extras = _score(model, **batch)
        if self.ld_alpha is not None and not is_ref_model:
            logps = logps * _length_weights(mask, self.ld_alpha)
        sums = logps.sum(-1)
        averages = sums / mask.sum(-1)

        chosen, rejected = (averages if self.loss_type in AVERAGED else sums).chunk(2)
        chosen_mask, rejected_mask = mask.chunk(2)
        chosen_logits, rejected_logits = extras["mean_logits"].chunk(2)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": chosen_logits[chosen_mask],  # the trainer logs their mean
            "rejected_logits": rejected_logits[rejected_mask],
            "chosen_logps_avg": averages.chunk(2)[0],
        }

    return concatenated_forward


def _scoring_answers(original: Method) -> Method:
    """`CustomKTOTrainer.forward`: logits, summed log-probs and their means, of answers or of the KL term's."""

    @wraps(original)
    def forward(self: Any, model: Any, batch: Any, prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        if _keeps_logits(self, model, batch, KTO_TEXT):
            return original(self, model, batch, prefix)

        inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask", "labels")}
        logps, mask, extras = _score(model, **inputs)
        sums = logps.sum(-1)
        # [B, T], at each scored position the sum of its logits: the trainer logs the sum of an example's
        config: Any = unwrap(model).config
        logits = extras["mean_logits"] * config.get_text_config().vocab_size
        return logits, sums, sums / mask.sum(-1)

    return forward


def _score(model: Any, labels: Tensor, **inputs: Any) -> TokenLogps:
    # the same outputs for policy and reference: with others another kernel may run, and equal models would differ
    return token_logps(model, labels, outputs=["mean_logits"], output_router_logits=False, **inputs)


def _length_weights(mask: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO's weights [2B, T]: 1 up to the shorter answer's length, `ld_alpha` beyond (arXiv 2409.06411)."""
    shorter = torch.minimum(*mask.sum(-1).chunk(2)).repeat(2)
    end = mask.int().argmax(-1) + shorter
    beyond = torch.arange(mask.shape[1], device=mask.device) >= end[:, None]
    return torch.where(beyond, ld_alpha, 1.0)


def _keeps_logits(trainer: Any, model: Any, batch: Any, known: set[str]) -> bool:
    """Whether the trainer's own way is taken; warns once of each reason."""
    other = sorted(set(batch) - known)
    if not is_attached(model):
        hidden = f"model: was a {type(model).__name__} without a fused head: made before patch(), or wrapped by FSDP1"
        _warn_once(getattr(trainer, "_sdpo_reason", hidden))
    elif other:
        _warn_once(f"batch: had {', '.join(other)}, must have text only")
    else:
        return False
    return True


@lru_cache
def _warn_once(reason: str) -> None:
    logger.warning("llamafactory: the trainer keeps its own way, with logits. %s", reason)


def main() -> None:
    """LLaMA-Factory's command `train`, patched; also in the processes that it starts by torchrun.

    LLaMA-Factory starts torchrun if there are several GPUs or FORCE_TORCHRUN is 1. A torchrun of your own works, too:
    `torchrun --nproc_per_node 8 -m sdpo_kernels.integrations.llamafactory train run.yaml`.
    """
    if sys.argv[1:2] != ["train"]:
        sys.exit("usage: python -m sdpo_kernels.integrations.llamafactory train run.yaml [name=value …]")
    logging.basicConfig()
    logging.getLogger("sdpo_kernels").setLevel(logging.INFO)
    patch()

    # torchrun sets LOCAL_RANK; LLaMA-Factory's command would start torchrun once more
    if "LOCAL_RANK" in os.environ:
        del sys.argv[1]
        importlib.import_module("llamafactory.train.tuner").run_exp()
        return

    # what its command lets torchrun run, and splits at spaces: this module instead of its own file
    importlib.import_module("llamafactory.launcher").__file__ = "-m sdpo_kernels.integrations.llamafactory train"
    importlib.import_module("llamafactory.cli").main()


if __name__ == "__main__":
    main()
