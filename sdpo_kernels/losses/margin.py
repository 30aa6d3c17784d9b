"""Losses of the difference between chosen and rejected: DPO's, and its variants.

z is the margin that a loss is a function of; a, b and Δ = a − b are the log-ratios of `PairLogps`, |w| and |l| the
token counts. Losses with z = 0 at policy = reference start at ln 2. Penalties have slope 0 at their kink, where every
stage of a stepwise run starts; the one exception, minor_dpo, says so.

f-DPO (arXiv 2309.16240) replaces the log-ratios of the losses that have the option `f_divergence`: 'reverse_kl' (plain
DPO), 'forward_kl', 'js' (Jensen-Shannon) and 'alpha', shaped by `f_alpha` (0 is forward_kl, 1 is reverse_kl).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_kernels.losses.options import Between
from sdpo_kernels.losses.pair_logps import PairLogps
from sdpo_kernels.losses.registry import register


def smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    """−(1−ε) log σ(z) − ε log σ(−z), [B]; −log σ(z) is log1p(exp(-z))."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def _margin(pair: PairLogps, beta: float, f_divergence: str, f_alpha: float) -> Tensor:
    """β(f′_w − f′_l); βΔ for reverse_kl."""
    chosen, rejected = _scores(pair, f_divergence, f_alpha)
    return beta * (chosen - rejected)


def _mean_margin(pair: PairLogps, f_divergence: str, f_alpha: float) -> Tensor:
    """f′_w/|w| − f′_l/|l|; a/|w| − b/|l| for reverse_kl."""
    chosen, rejected = _scores(pair, f_divergence, f_alpha)
    return chosen / pair.chosen_counts - rejected / pair.rejected_counts


def _scores(pair: PairLogps, f_divergence: str, f_alpha: float) -> tuple[Tensor, Tensor]:
    """f′(π/π_ref) of chosen and rejected, [B] each; their log-ratios for reverse_kl (f-DPO, arXiv 2309.16240)."""
    return _score(pair.chosen_logratio, f_divergence, f_alpha), _score(pair.rejected_logratio, f_divergence, f_alpha)


def _score(logratio: Tensor, f_divergence: str, f_alpha: float) -> Tensor:
    """f′(t) with log t = logratio: log t; 1 − 1/t; log(2t/(1+t)); (t^(α−1) − 1)/(α−1)."""
    if f_divergence == "js":
        return math.log(2) + F.logsigmoid(logratio)
    power = {"forward_kl": -1.0, "alpha": f_alpha - 1}.get(f_divergence, 0.0)
    if abs(power) < 1e-6:  # reverse_kl, and the limit of alpha at 1
        return logratio
    return torch.expm1(_representable(power * logratio)) / power


def _representable(exponent: Tensor) -> Tensor:
    """Clamp to 80 in float32 (700 in float64), so that exp stays finite; no gradient beyond, as in TRL."""
    return exponent.clamp(max=700.0 if exponent.dtype == torch.float64 else 80.0)


@register("sigmoid", ln2_at_start=True)
def sigmoid(
    pair: PairLogps,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:
    """−log σ(βΔ) (DPO, arXiv 2305.18290, eq. 7); label_smoothing ε gives cDPO: −(1−ε) log σ(z) − ε log σ(−z)."""
    return smoothed(_margin(pair, beta, f_divergence, f_alpha), label_smoothing)


@register("robust", ln2_at_start=True)
def robust(
    pair: PairLogps,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:
    """[−(1−ε) log σ(z) + ε log σ(−z)] / (1−2ε), z = βΔ: unbiased under labels flipped at rate ε (arXiv 2403.00409).

    It may be negative.
    """
    z = _margin(pair, beta, f_divergence, f_alpha)
    kept = -(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)
    return kept / (1 - 2 * label_smoothing)


@register("hinge")
def hinge(pair: PairLogps, beta: float, *, f_divergence: str = "reverse_kl", f_alpha: float = 0.5) -> Tensor:
    """max(0, 1 − βΔ), with slope 0 at the kink (SLiC, arXiv 2305.10425, as DPO trainers use it)."""
    return F.relu(1 - _margin(pair, beta, f_divergence, f_alpha))


@register("ipo")
def ipo(pair: PairLogps, beta: float, *, f_divergence: str = "reverse_kl", f_alpha: float = 0.5) -> Tensor:
    """(a/|w| − b/|l| − 1/(2β))² on log-probs averaged over tokens, as in TRL (IPO, arXiv 2310.12036, eq. 17)."""
    return (_mean_margin(pair, f_divergence, f_alpha) - 1 / (2 * beta)).square()


@register("sigmoid_norm", ln2_at_start=True)
def sigmoid_norm(pair: PairLogps, beta: float, *, f_divergence: str = "reverse_kl", f_alpha: float = 0.5) -> Tensor:
    """−log σ(β(a/|w| − b/|l|)): DPO on log-ratios averaged over tokens (Tülu 3, arXiv 2411.15124).

    Averages are smaller than sums, so it needs a larger β.
    """
    return -F.logsigmoid(beta * _mean_margin(pair, f_divergence, f_alpha))


@register("minor_dpo", ln2_at_start=True)
def minor_dpo(pair: PairLogps, beta: float) -> Tensor:
    """−log σ(β(a − max(0, b))): rejected answers are pushed no further below the reference (arXiv 2408.09834).

    The push is on at exactly b = 0: with policy = reference b is 0 everywhere, and training could not start otherwise.
    """
    push = torch.where(pair.rejected_logratio >= 0, pair.rejected_logratio, 0.0)
    return -F.logsigmoid(beta * (pair.chosen_logratio - push))


@register("length_dpo", "lr_dpo", "r_dpo")
def length_dpo(pair: PairLogps, beta: float, *, length_alpha: float = 0.02, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(βΔ + α(|w| − |l|)), α = length_alpha in nats per token: pairs explained by length count less.

    R-DPO (arXiv 2403.19159) and iLR-DPO (arXiv 2406.11817). The default of α is ours (we could not verify theirs).
    """
    longer = (pair.chosen_counts - pair.rejected_counts).to(pair.chosen.dtype)
    return smoothed(beta * pair.delta + length_alpha * longer, label_smoothing)


@register("dpop", ln2_at_start=True)
def dpop(pair: PairLogps, beta: float, *, dpop_lambda: float = 50.0) -> Tensor:
    """−log σ(β(Δ − λ max(0, −a))): a chosen answer must not lose likelihood (Smaug, arXiv 2402.13228).

    The paper uses β = 0.3 and λ = 50; β is the caller's (default 0.1). The penalty's slope at a = 0 is 0.
    """
    penalty = F.relu(-pair.chosen_logratio)
    return -F.logsigmoid(beta * (pair.delta - dpop_lambda * penalty))


@register("exo_pair", allowed={"label_smoothing": Between("above 0 and below 0.5", 0, 0.5, True, True)})
def exo_pair(
    pair: PairLogps,
    beta: float,
    *,
    label_smoothing: float = 1e-3,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:
    """KL from (σ(z), σ(−z)) to (1−ε, ε), z = βΔ, ε = label_smoothing above 0 (EXO, arXiv 2402.00856, eq. 16).

    TRL's default ε = 0 is an error, in TRL too.
    """
    z = _margin(pair, beta, f_divergence, f_alpha)
    chosen = z.sigmoid() * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return chosen + (-z).sigmoid() * (F.logsigmoid(-z) - math.log(label_smoothing))


@register("discopop")
def discopop(
    pair: PairLogps,
    beta: float,
    *,
    discopop_tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Tensor:
    """(1−m)(−log σ(z)) + m exp(−z), m = σ(z/τ), z = βΔ (DiscoPOP, arXiv 2406.08414, eq. 5); its τ is 0.05.

    Finite for every z; TRL's is NaN far below 0.
    """
    z = _margin(pair, beta, f_divergence, f_alpha)
    # m·exp(−z) in one exponential: separately, they overflow and vanish for z far below 0
    return -F.logsigmoid(z) * (-z / discopop_tau).sigmoid() + (F.logsigmoid(z / discopop_tau) - z).exp()


@register("aot", ln2_at_start=True)
def aot(pair: PairLogps, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss of the sorted log π(y_w)/π(y_l) minus the reference's sorted ones (AOT, arXiv 2406.05882).

    Sorted over the batch, so a value belongs to a position in the order, not to a pair; with one pair it is DPO. It
    compares distributions, so it needs large batches.
    """
    policy = (pair.chosen - pair.rejected).sort().values
    reference = (pair.ref_chosen - pair.ref_rejected).sort().values
    return smoothed(beta * (policy - reference), label_smoothing)


@register("aot_unpaired", ln2_at_start=True)
def aot_unpaired(pair: PairLogps, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss of the sorted a minus the sorted b, each sorted over the batch (AOT, arXiv 2406.05882)."""
    chosen, rejected = pair.chosen_logratio.sort().values, pair.rejected_logratio.sort().values
    return smoothed(beta * (chosen - rejected), label_smoothing)


@register("ld_dpo", ln2_at_start=True, weighs_tokens=True)
def ld_dpo(pair: PairLogps, beta: float, *, ld_alpha: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(βΔ) where tokens beyond the pair's shorter length weigh α = ld_alpha, 0 … 1 (arXiv 2409.06411).

    `pair` holds weighted sums, of the policy and of the reference: `fused_linear_dpo` and the driver compute them. The
    default of α is ours; 1 is DPO. It must be the only loss.
    """
    return smoothed(beta * pair.delta, label_smoothing)


@register("wpo", weighs_pairs=True)
def wpo(pair: PairLogps, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """w·(−log σ(βΔ)), w = exp(mean_w + mean_l) of log p(y_t) − log Σ_v p_v² over tokens (WPO, arXiv 2406.11827).

    The weights are `pair.weights`, without gradient; `fused_linear_dpo` and the driver compute them, from one more
    output of the head.
    """
    assert pair.weights is not None
    return pair.weights * smoothed(beta * pair.delta, label_smoothing)


@register("diffusion_dpo", beta=5000.0, ln2_at_start=True, of_errors=True)
def diffusion_dpo(pair: PairLogps, beta: float = 5000.0) -> Tensor:
    """−log σ(−(β/2)[(m_w − m_l) − (r_w − r_l)]) (Diffusion-DPO, arXiv 2311.12908; β = 5000).

    `pair` holds denoising errors [B] in place of log-probs, squared and averaged over a sample's elements, of the
    policy (m) and the reference (r); chosen and rejected share timestep and noise. The counts are not read: pass ones.
    Only `losses.pair_loss` takes it.
    """
    return -F.logsigmoid(-(beta / 2) * pair.delta)
