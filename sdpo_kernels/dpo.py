"""The fused loss: log-probs of policy and reference through one primitive, then a pair loss on [B]-sized tensors.

    out = fused_linear_dpo(hidden, weight, labels, ref_logps=cached, beta=0.1)
    out.loss.backward()

Every batch holds the chosen sequences first and the rejected ones, in the same order, after them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdpo_kernels import epilogue_op
from sdpo_kernels.dpo_checks import check_batch, check_counts, check_device, check_reference
from sdpo_kernels.logps import linear_logps
from sdpo_kernels.losses import LossSum, LossType, PairLogps, check_loss, loss_sum
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, segment_sum, sequence_of_rows
from sdpo_kernels.token_weights import agreement_weights, length_weights


class DPOOutput(NamedTuple):
    """`loss` carries the gradient; the rest is detached, [B] float32 (float64 for float64 inputs)."""

    loss: Tensor  # scalar, mean over pairs
    chosen_logps: Tensor  # sums over scored tokens, nats
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_rewards: Tensor  # beta · (policy − reference)
    rejected_rewards: Tensor
    margins: Tensor  # chosen_rewards − rejected_rewards
    accuracy: Tensor  # 1 where the chosen reward is above the rejected one, else 0


def fused_linear_dpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    rows: ScoredRows | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    **loss_options: Any,
) -> DPOOutput:
    """DPO's loss of B pairs straight from hidden states, without logits of size tokens × vocab.

    Args:
        hidden: [2B, T, H], chosen half first; or packed [N, H] with `cu_seqlens`.
        weight: [V, H], the head; `bias`: [V].
        labels: [2B, T], packed [N], int64; `labels[:, t]` is what `hidden[:, t]` predicts (already shifted); −100 is
            not scored.
        cu_seqlens: [2B+1] int, borders of the packed sequences, from 0 to N.
        rows: the scored rows, where they are known (see `ScoredRows`): then nothing synchronises with the host.
        ref_logps: [2B] the reference's summed log-probs; or
        ref_hidden, ref_weight, ref_bias: the reference's hidden states (of hidden's shape, its own H) and head, scored
            here without gradient; where ref_weight is weight itself, in one pass with the policy.
        temperature, logit_scale, softcap, backend, stash_bytes: as in `linear_logps`.
        beta: above 0.
        loss_type: a name of `losses.loss_names()`, its options as further keywords; or a list of
            {"name": …, "weight": 1.0, "options": {}}. A reference-free loss (simpo, cpo, orpo, sft) needs no reference:
            rewards are then β times the policy's log-probs. With ld_dpo all sums are of weighted tokens, and cached
            `ref_logps` must be sums weighted with the same ld_alpha.

    Raises:
        ValueError: naming the argument, what it was and what it should be. A pair without a scored token is an error.

    Example:
        >>> import torch
        >>> from sdpo_kernels import fused_linear_dpo
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(100, 8)
        >>> labels = torch.tensor([[4, 5, -100], [6, 7, 8]])
        >>> fused_linear_dpo(hidden, weight, labels, ref_hidden=hidden, ref_weight=weight).loss
        tensor(0.6931)
    """
    wanted = _checked(loss_type, beta, loss_options)
    n_sequences = check_batch(hidden, labels, weight.shape[0], cu_seqlens, rows)
    check_reference(
        hidden, weight, n_sequences, ref_logps, ref_hidden, ref_weight, ref_bias, needed=not wanted.reference_free
    )
    if rows is None and not torch.compiler.is_compiling():
        rows = ScoredRows.from_labels(labels, cu_seqlens)
    summed = (
        _all_rows(labels, cu_seqlens) if rows is None else rows
    )  # under compile the op itself finds the scored ones
    check_counts(summed.counts)
    targets = labels.reshape(-1)
    token_weights = None
    if wanted.ld_alpha is not None:
        token_weights = length_weights(summed, wanted.ld_alpha, targets[summed.index] != IGNORE_INDEX)
    options: dict[str, Any] = {
        "rows": rows, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "backend": backend,
    }  # fmt: skip

    if ref_hidden is not None:
        ref_hidden = ref_hidden.reshape(-1, ref_hidden.shape[-1])
    same_head = (
        ref_weight is weight and ref_bias is bias and ref_hidden is not None and ref_hidden.dtype == hidden.dtype
    )
    if ref_hidden is not None and ref_weight is not None and not same_head:
        with torch.no_grad():
            ref = linear_logps(ref_hidden, ref_weight, targets, bias=ref_bias, stash_bytes=0, **options)
            ref_logps = sequence_logps(ref.logps, summed, token_weights)
    policy = linear_logps(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets, bias=bias, stash_bytes=stash_bytes,
        ref_hidden=ref_hidden if same_head else None,
        outputs=("log_sum_sq_probs",) if wanted.weighs_pairs else (), **options,
    )  # fmt: skip
    logps = policy.logps
    if policy.ref_logps is not None:
        ref_logps = sequence_logps(policy.ref_logps, summed, token_weights)
    if ref_logps is None:
        ref_logps = logps.new_zeros(n_sequences)
    plain = _pair_op_loss(wanted)
    if plain is not None and (chosen := epilogue_op.serves(backend, logps, n_sequences // 2, plain[0])) is not None:
        return _epilogue(logps, summed, ref_logps, summed.counts, chosen, beta, *plain)
    pair_weights = None
    if policy.log_sum_sq_probs is not None:
        pair_weights = agreement_weights(logps, policy.log_sum_sq_probs, summed)
    sums = sequence_logps(logps, summed, token_weights)
    return _autograd_output(sums, ref_logps, summed.counts, wanted, beta, pair_weights)


def _checked(loss_type: LossType, beta: float, options: dict[str, Any]) -> LossSum:
    """The loss, checked; ValueError also where it does not take log-probs."""
    check_loss(loss_type, beta, **options)
    wanted = loss_sum(loss_type, options)
    if wanted.of_errors:
        raise ValueError(
            f"loss_type: was {wanted.label!r}, which takes denoising errors, must be a loss of log-probs here; "
            "call losses.pair_loss for it"
        )
    return wanted


def _pair_op_loss(wanted: LossSum) -> tuple[str, float] | None:
    """Name and label_smoothing of a single loss without other options, which the pair op may serve; else None."""
    loss, weight, options = wanted.terms[0]
    special = [name for name, value in options.items() if name != "label_smoothing" and value != loss.options[name]]
    if len(wanted.terms) > 1 or weight != 1 or special:
        return None
    return loss.name, float(options.get("label_smoothing", 0.0))


class FusedLinearDPOLoss(nn.Module):
    """`fused_linear_dpo` with its settings held, for trainers that keep a loss as a module.

    >>> import torch
    >>> from sdpo_kernels import FusedLinearDPOLoss
    >>> loss = FusedLinearDPOLoss(beta=0.2, loss_type="sigmoid", label_smoothing=0.1)
    >>> hidden, weight, labels = torch.zeros(2, 3, 8), torch.zeros(100, 8), torch.ones(2, 3, dtype=torch.int64)
    >>> out = loss(hidden, weight, labels, ref_logps=torch.zeros(2))
    >>> out.margins
    tensor([0.])
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        backend: str = "auto",
        stash_bytes: int | str = "auto",
        beta: float = 0.1,
        loss_type: LossType = "sigmoid",
        **loss_options: Any,
    ) -> None:
        super().__init__()
        _checked(loss_type, beta, loss_options)
        self.settings: dict[str, Any] = {
            "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "backend": backend,
            "stash_bytes": stash_bytes, "beta": beta, "loss_type": loss_type, **loss_options,
        }  # fmt: skip

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **inputs: Any) -> DPOOutput:
        """Tensors as in `fused_linear_dpo`: cu_seqlens, rows, bias, ref_logps or ref_hidden, ref_weight, ref_bias."""
        clash = sorted(inputs.keys() & self.settings.keys())
        if clash:
            raise ValueError(f"{clash[0]}: was given to the call, must be given to FusedLinearDPOLoss(...) itself")
        return fused_linear_dpo(hidden, weight, labels, **self.settings, **inputs)

    def extra_repr(self) -> str:
        """The settings, as print(module) shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def sequence_logps(logps: Tensor, rows: ScoredRows, weights: Tensor | None = None) -> Tensor:
    """Sum per-token `logps` [N] over the scored rows of each sequence into [S], in logps' dtype.

    `weights` [N_scored] float64 weigh the rows. The sum is taken in float64, so that packed and padded batches agree
    and long sequences lose nothing.
    """
    scored = logps.index_select(0, rows.index).double()
    if weights is not None:
        scored = scored * weights
    return segment_sum(scored, rows.segment, rows.counts.shape[0]).to(logps.dtype)


def pair_output(
    policy_logps: Tensor,
    ref_logps: Tensor,
    counts: Tensor,
    *,
    pair_weights: Tensor | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    **loss_options: Any,
) -> DPOOutput:
    """Loss and metrics from summed log-probs: policy [2B], reference [2B], counts of scored tokens [2B].

    `pair_weights` [B] are for wpo alone (see `token_weights.agreement_weights`). For ld_dpo both sums are weighted
    already; for a reference-free loss the reference serves only the rewards, and may be zeros.
    """
    wanted = _checked(loss_type, beta, loss_options)
    if (pair_weights is not None) != wanted.weighs_pairs:
        need = "must be [B], which" if wanted.weighs_pairs else "must be None, as only"
        raise ValueError(f"pair_weights: was {'given' if pair_weights is not None else None}, {need} 'wpo' needs")
    if policy_logps.dim() != 1 or policy_logps.shape[0] < 2 or policy_logps.shape[0] % 2:
        raise ValueError(f"policy_logps: was of shape {list(policy_logps.shape)}, must be [2B], chosen half first")
    for name, tensor in {"ref_logps": ref_logps, "counts": counts}.items():
        if tensor.shape != policy_logps.shape:
            raise ValueError(
                f"{name}: was of shape {list(tensor.shape)}, must be {list(policy_logps.shape)} as policy_logps is"
            )
        check_device(name, tensor, policy_logps)
    plain, n_pairs = _pair_op_loss(wanted), policy_logps.shape[0] // 2
    if plain is not None and (chosen := epilogue_op.serves("auto", policy_logps, n_pairs, plain[0])) is not None:
        return _epilogue(policy_logps, None, ref_logps, counts, chosen, beta, *plain)
    return _autograd_output(policy_logps, ref_logps, counts, wanted, beta, pair_weights)


def _epilogue(
    logps: Tensor,
    rows: ScoredRows | None,
    ref_logps: Tensor,
    counts: Tensor,
    backend: str,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> DPOOutput:
    """All in one op, from log-probs of tokens with `rows`, else from sums."""
    ref_logps = ref_logps.detach().to(logps.dtype)
    loss, sums, metrics = epilogue_op.pair_epilogue(
        logps, rows, ref_logps, counts, backend=backend, loss_type=loss_type, beta=beta, smoothing=label_smoothing
    )
    return DPOOutput(loss, *sums.chunk(2), *ref_logps.chunk(2), *metrics.unbind(0))


def _autograd_output(
    policy_logps: Tensor,
    ref_logps: Tensor,
    counts: Tensor,
    wanted: LossSum,
    beta: float,
    pair_weights: Tensor | None,
) -> DPOOutput:
    """The same from sums, for every loss, by autograd through losses/."""
    chosen, rejected = policy_logps.chunk(2)
    ref_chosen, ref_rejected = ref_logps.detach().to(policy_logps.dtype).chunk(2)
    chosen_counts, rejected_counts = counts.chunk(2)
    pair = PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_counts, rejected_counts, pair_weights)
    loss = wanted.of(pair, beta).mean()
    chosen_rewards = beta * pair.chosen_logratio.detach()
    rejected_rewards = beta * pair.rejected_logratio.detach()
    margins = chosen_rewards - rejected_rewards
    accuracy = (chosen_rewards > rejected_rewards).to(margins.dtype)
    return DPOOutput(
        loss,
        chosen.detach(),
        rejected.detach(),
        ref_chosen,
        ref_rejected,
        chosen_rewards,
        rejected_rewards,
        margins,
        accuracy,
    )


def _all_rows(labels: Tensor, cu_seqlens: Tensor | None) -> ScoredRows:
    """Every row, scored or not (its log-prob is 0 then), with true counts: shapes that do not depend on data."""
    n_sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segments = sequence_of_rows(labels, cu_seqlens)
    counts = segment_sum((labels.reshape(-1) != IGNORE_INDEX).long(), segments, n_sequences)
    return ScoredRows(torch.arange(segments.shape[0], device=labels.device), segments, counts)
