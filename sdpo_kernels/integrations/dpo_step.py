"""DPO in your own training loop with a Hugging Face causal LM: score pairs, take a step, without logits.

    model = attach_fused_head(AutoModelForCausalLM.from_pretrained(...))      # before PEFT, DDP or FSDP wrap it
    ref_logps = score_pairs(model, input_ids, labels, attention_mask)         # [2B], once, before training
    out = dpo_step(model, input_ids, labels, attention_mask, ref_logps=ref_logps, beta=0.1)
    out.loss.backward(); optimizer.step()

A batch holds the chosen sequences first, then the rejected ones in the same order. `labels` are those of transformers:
the input ids, −100 for tokens that are not scored, not shifted.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdpo_kernels.dpo_output import DPOOutput, pair_output
from sdpo_kernels.integrations.causal_lm import evaluating, is_attached, unwrap
from sdpo_kernels.integrations.packed_attention import shares_prefixes
from sdpo_kernels.integrations.positions import padded_positions
from sdpo_kernels.integrations.router_loss import router_coefficient
from sdpo_kernels.integrations.shared_prefix import share_prefixes
from sdpo_kernels.losses import LossSum, LossType, loss_sum
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, sequence_logps
from sdpo_kernels.token_weights import agreement_weights, length_weights


class DPOStepOutput(DPOOutput):
    """The fields of `DPOOutput`, and an attribute of its own, which is not one of the tuple's fields."""

    # scalar, detached: of a mixture of experts; `loss` contains it, times its coefficient
    aux_loss: Tensor | None = None


def score_pairs(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    without_adapter: bool = False,
    ld_alpha: float | None = None,
    prefix_sharing: bool = False,
) -> Tensor:
    """Summed log-probs [2B] float32 of the scored tokens, without gradient, in evaluation mode.

    Args:
        model: with its fused head attached (`attach_fused_head`), wrapped or not.
        input_ids: [2B, T] int64, chosen half first.
        labels: [2B, T] int64, as transformers has them: not shifted, −100 for tokens that are not scored.
        attention_mask: [2B, T], 0 for padding, on either side; None: no padding.
        without_adapter: score a PEFT model with its adapter off: the reference of a LoRA run.
        ld_alpha: the weight of tokens beyond the pair's shorter answer, for the reference of the loss ld_dpo.
        prefix_sharing: what both answers of a pair begin with goes through the model once; `use_packed_attention` and
            then `use_shared_prefixes` must have returned None for the model. The values differ by rounding only,
            without dropout; with it both answers get the same masks in their prompt.

    Raises:
        ValueError: naming the argument, what it was and what it should be.
    """
    if without_adapter and not hasattr(model, "disable_adapter"):
        raise ValueError(f"model: was a {type(model).__name__} with without_adapter, must be a PEFT model")
    base = model.disable_adapter() if without_adapter else nullcontext()  # type: ignore[operator]
    with evaluating(model), base:
        return _score(model, input_ids, labels, attention_mask, None, ld_alpha, prefix_sharing).sums


def dpo_step(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    prefix_sharing: bool = False,
    **loss_options: Any,
) -> DPOStepOutput:
    """The loss of B pairs, which carries the gradient into `model`, and their metrics (see `DPOOutput`).

    If the config of a mixture of experts sets `output_router_logits`, the loss contains `router_aux_loss_coef` times
    the router's auxiliary loss, which is `aux_loss` of the result.

    Args as `score_pairs`, and
        ref_logps: [2B] of the reference, scored with the same `prefix_sharing`; optional for losses that read none
            (simpo, cpo, orpo, sft).
        beta, loss_type and its options: as in `fused_linear_dpo`.
    """
    wanted = loss_sum(loss_type, loss_options)
    if ref_logps is None and not wanted.reference_free:
        raise ValueError(f"ref_logps: was None, must be given: the loss {wanted.label!r} reads the reference")

    if not isinstance(ref_logps, Tensor | None):
        raise ValueError(f"ref_logps: was a {type(ref_logps).__name__}, must be a tensor [2B]")

    scored = _score(model, input_ids, labels, attention_mask, wanted, wanted.ld_alpha, prefix_sharing)
    ref_logps = torch.zeros_like(scored.sums) if ref_logps is None else ref_logps
    out = pair_output(
        scored.sums, ref_logps, scored.rows.counts, pair_weights=scored.pair_weights, loss_type=wanted, beta=beta
    )
    if scored.aux_loss is None:
        return DPOStepOutput(*out)

    loss = out.loss + router_coefficient(model) * scored.aux_loss.to(out.loss)
    step = DPOStepOutput(loss, *out[1:])
    step.aux_loss = scored.aux_loss.detach()
    return step


class _Scored(NamedTuple):
    """A batch, scored by the model."""

    sums: Tensor  # [2B]
    rows: ScoredRows
    pair_weights: Tensor | None  # [B], if the loss needs them
    aux_loss: Tensor | None  # of the router, if the model computes it


def _score(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    wanted: LossSum | None,
    ld_alpha: float | None,
    prefix_sharing: bool,
) -> _Scored:
    _check(model, input_ids, labels, attention_mask, prefix_sharing)
    end = labels.new_full((len(labels), 1), IGNORE_INDEX)
    targets = torch.cat([labels[:, 1:], end], 1)  # position t predicts token t + 1
    if attention_mask is not None:
        # padding predicts nothing, and is not predicted
        padding = attention_mask == 0
        targets = targets.masked_fill(padding | padding.roll(-1, 1), IGNORE_INDEX)
    rows = ScoredRows.from_labels(targets)
    if bool((rows.counts == 0).any()):
        sequence = int((rows.counts == 0).nonzero()[0])
        raise ValueError(f"labels: sequence {sequence} has no scored token after its first, must have at least one")

    # one forward for both halves of the batch
    weighs_pairs = wanted is not None and wanted.weighs_pairs
    outputs = ("log_sum_sq_probs",) if weighs_pairs else ()
    inputs: dict[str, Any]
    if prefix_sharing:
        inputs, expand, rows = share_prefixes(input_ids, labels, attention_mask)
    else:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "logp_targets": targets, "logp_rows": rows}
        positions = padded_positions(model, attention_mask)
        if positions is not None:
            inputs["position_ids"] = positions
    out = model(**inputs, use_cache=False, logp_outputs=outputs)

    # each scored token of each sequence, whatever it shared
    found = {name: getattr(out, name) for name in ("logps", *outputs)}
    if prefix_sharing:
        found = {name: values.index_select(0, expand) for name, values in found.items()}
    token_weights = None if ld_alpha is None else length_weights(rows, ld_alpha)
    sums = sequence_logps(found["logps"], rows, token_weights)
    pair_weights = agreement_weights(**found, rows=rows) if weighs_pairs else None
    return _Scored(sums, rows, pair_weights, out.aux_loss)


def _check(
    model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None, prefix_sharing: bool
) -> None:
    if prefix_sharing and not shares_prefixes(model):
        raise ValueError(
            f"prefix_sharing: was True for a {type(unwrap(model)).__name__} that is not ready for it; call "
            "use_packed_attention(model), then use_shared_prefixes(model): both must return None"
        )
    if not is_attached(model):
        raise ValueError(f"model: was a {type(unwrap(model)).__name__} without a fused head; call attach_fused_head")
    for name, value in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: was a {type(value).__name__}, must be an int64 tensor [2B, T]")
    if not isinstance(attention_mask, Tensor | None):
        raise ValueError(f"attention_mask: was a {type(attention_mask).__name__}, must be a tensor [2B, T]")
    if input_ids.dim() != 2 or len(input_ids) < 2 or len(input_ids) % 2:
        raise ValueError(f"input_ids: was of shape {list(input_ids.shape)}, must be [2B, T], chosen half first")
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels: was of shape {list(labels.shape)}, must be {list(input_ids.shape)} as input_ids is")
