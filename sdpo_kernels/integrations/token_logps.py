"""Token log-probs of a batch for another trainer's own loop: what it would have computed from logits, without them.

    attach_fused_head(model)                     # once, before training
    logps, mask, extras = token_logps(model, labels, input_ids=..., attention_mask=...)
    (logps * mask).sum(-1)                       # [B], the log-prob of each answer

The adapters for LLaMA-Factory, ms-swift and OpenRLHF are written on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdpo_kernels.backends.base import EXTRAS
from sdpo_kernels.integrations.causal_lm import is_attached
from sdpo_kernels.integrations.lm_head import unwrap
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows


class TokenLogps(NamedTuple):
    """What `token_logps` returns."""

    logps: Tensor  # [B, T] float32 (float64 for a float64 model), 0 where mask is False; carries the gradient
    mask: Tensor  # [B, T] bool: position t predicts a scored token
    extras: dict[str, Tensor]  # each of `outputs` [B, T], 0 where mask is False; `aux_loss`, a scalar, if there is one


def token_logps(
    model: nn.Module,
    labels: Tensor,
    *,
    shifted: bool = False,
    outputs: Sequence[str] = (),
    temperature: float = 1.0,
    **inputs: Any,
) -> TokenLogps:
    """Log-probs of the labelled tokens, by the fused head: only scored rows reach it, and no logits exist.

    `inputs` reach `model(...)` as they are, so that its hidden states are those of the trainer's own call: position
    ids are not made up here. `use_cache` and `return_dict` may be among them and have no effect.

    Args:
        model: with its fused head attached (`attach_fused_head`), wrapped by PEFT, DDP, FSDP2 or DeepSpeed or not.
        labels: [B, T] int64, −100 where nothing is scored.
        shifted: False: `labels[:, t]` is the token at position t, as transformers has them. True: it is the token
            that position t predicts. Either way the results are at the position that predicts.
        outputs: further results a token: names from entropy, log_sum_sq_probs, mean_logits, is_top1.
        temperature: divides the logits, so that `logps` and `outputs` are those of the scaled distribution.
        inputs: the model's own arguments: input_ids or inputs_embeds, attention_mask, position_ids, …

    Raises:
        ValueError: naming the argument, what it was and what it should be: labels that are not [B, T]; an unknown
            output; no fused head; a forward that another library (Liger) has put over it; a head that DeepSpeed ZeRO-3
            has partitioned; a mixture of experts whose auxiliary loss is on and cannot be computed without logits.
    """
    _check(model, labels, outputs)
    targets = labels
    if not shifted:
        end = labels.new_full((len(labels), 1), IGNORE_INDEX)
        targets = torch.cat([labels[:, 1:], end], 1)  # position t predicts token t + 1
    mask = targets != IGNORE_INDEX

    given = {name: value for name, value in inputs.items() if name not in ("use_cache", "return_dict")}
    out = model(
        **given, use_cache=False, logp_targets=targets, logp_rows=ScoredRows.from_labels(targets),
        logp_outputs=outputs, logp_temperature=temperature,
    )  # fmt: skip

    extras = {name: getattr(out, name).view(targets.shape) for name in outputs}
    if out.aux_loss is not None:
        extras["aux_loss"] = out.aux_loss
    return TokenLogps(out.logps.view(targets.shape), mask, extras)


def _check(model: nn.Module, labels: Tensor, outputs: Sequence[str]) -> None:
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.dtype != torch.int64:
        was = f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: was {was}, must be torch.int64 of shape [B, T]")
    for name in outputs:
        if name not in EXTRAS:
            raise ValueError(f"outputs: was {tuple(outputs)!r}, must be names from {', '.join(EXTRAS)}")
    if not is_attached(model):
        raise ValueError(f"model: was a {type(unwrap(model)).__name__} without a fused head; call attach_fused_head")
