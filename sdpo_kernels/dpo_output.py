"""From log-probs to the loss and metrics of B pairs: one fused op where a backend has it, else autograd over losses/.

out = pair_output(policy_logps, ref_logps, counts, beta=0.1)     # sums over tokens, [2B], chosen half first
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sdpo_kernels import epilogue_op
from sdpo_kernels.dpo_checks import check_device
from sdpo_kernels.losses import LossSum, LossType, PairLogps, check_loss, loss_sum
from sdpo_kernels.rows import ScoredRows, sequence_logps


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

    `pair_weights` [B] are for wpo alone (see `token_weights.agreement_weights`). For ld_dpo both sums are already
    weighted; a reference-free loss uses the reference for the rewards only, and it may be zeros.
    """
    wanted = checked_loss(loss_type, beta, loss_options)
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

    return loss_and_metrics(policy_logps, None, ref_logps, counts, wanted, beta, pair_weights=pair_weights)


def checked_loss(loss_type: LossType, beta: float, options: dict[str, Any]) -> LossSum:
    """The loss, checked; ValueError also if it does not take log-probs."""
    check_loss(loss_type, beta, **options)
    wanted = loss_sum(loss_type, options)
    if wanted.of_errors:
        raise ValueError(
            f"loss_type: was {wanted.label!r}, which takes denoising errors, must be a loss of log-probs here; "
            "call losses.pair_loss for it"
        )
    return wanted


def loss_and_metrics(
    logps: Tensor,
    rows: ScoredRows | None,
    ref_logps: Tensor,
    counts: Tensor,
    wanted: LossSum,
    beta: float,
    *,
    backend: str = "auto",
    token_weights: Tensor | None = None,
    pair_weights: Tensor | None = None,
) -> DPOOutput:
    """From log-probs of tokens with `rows`, or from sums [2B] with rows None; `ref_logps` [2B] are sums.

    `token_weights` [N_scored] weigh the tokens in the sums, `pair_weights` [B] the pairs in the loss.
    """
    ref_logps = ref_logps.detach().to(logps.dtype)

    # the fast path: one op computes sums, loss, slopes and metrics
    plain = _plain_loss(wanted)
    if plain is not None:
        serving_backend = epilogue_op.serving_backend(backend, logps, counts.shape[0] // 2, plain.name)
        if serving_backend is not None:
            return _by_epilogue(logps, rows, ref_logps, counts, plain, beta, serving_backend)

    # every other loss: autograd over tensors of size B
    sums = logps if rows is None else sequence_logps(logps, rows, token_weights)
    return _by_autograd(sums, ref_logps, counts, wanted, beta, pair_weights)


class _PlainLoss(NamedTuple):
    """A single loss of weight 1 whose only option is label_smoothing, as the epilogue's op takes it."""

    name: str
    label_smoothing: float


def _plain_loss(wanted: LossSum) -> _PlainLoss | None:
    """`wanted` as a plain loss; None if it is a sum or has other options set."""
    loss, weight, options = wanted.terms[0]
    special = [name for name, value in options.items() if name != "label_smoothing" and value != loss.options[name]]
    if len(wanted.terms) > 1 or weight != 1 or special:
        return None
    return _PlainLoss(loss.name, float(options.get("label_smoothing", 0.0)))


def _by_epilogue(
    logps: Tensor,
    rows: ScoredRows | None,
    ref_logps: Tensor,
    counts: Tensor,
    plain: _PlainLoss,
    beta: float,
    backend: str,
) -> DPOOutput:
    """All in one op of `backend`."""
    out = epilogue_op.pair_epilogue(
        logps, rows, ref_logps, counts, backend=backend, loss_type=plain.name, beta=beta,
        smoothing=plain.label_smoothing,
    )  # fmt: skip
    return DPOOutput(out.loss, *out.sums.chunk(2), *ref_logps.chunk(2), *out.metrics.unbind(0))


def _by_autograd(
    policy_logps: Tensor,
    ref_logps: Tensor,
    counts: Tensor,
    wanted: LossSum,
    beta: float,
    pair_weights: Tensor | None,
) -> DPOOutput:
    """The same from sums, for every loss, by autograd through losses/."""
    chosen, rejected = policy_logps.chunk(2)
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    chosen_counts, rejected_counts = counts.chunk(2)
    pair = PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_counts, rejected_counts, pair_weights)

    # metrics carry no gradient; the reference never does
    chosen_rewards = beta * pair.chosen_logratio.detach()
    rejected_rewards = beta * pair.rejected_logratio.detach()
    margins = chosen_rewards - rejected_rewards
    return DPOOutput(
        loss=wanted.of(pair, beta).mean(),
        chosen_logps=chosen.detach(),
        rejected_logps=rejected.detach(),
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        margins=margins,
        accuracy=(chosen_rewards > rejected_rewards).to(margins.dtype),
    )
