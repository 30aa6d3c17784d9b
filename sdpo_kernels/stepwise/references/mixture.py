"""Several references as one: MRPO's mixture of their log-probs (arXiv 2405.16388).

    combined = combine(torch.stack([base, other]), epsilon=0.1)      # [n, 2], in place of one reference's

With a KL penalty to K references at once, the optimal policy is the one for a single virtual reference, their weighted
harmonic mean: π̃ = (Σ_k α_k / π_k)⁻¹, `pi = 1 / sum_k(alpha_k / pi_k)`. References other than the base are first clipped
to a neighbourhood of the base; otherwise one reference that finds an answer impossible would decide alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TINY = 1e-6  # keeps adaptive weights finite; the value of the published code


def combine(
    logps: Tensor,
    *,
    epsilon: float,
    alpha: Literal["adaptive"] | Sequence[float] = "adaptive",
    convention: Literal["formula", "published"] = "formula",
) -> Tensor:
    """log π̃ [n, 2] float32 of reference log-probs [K, n, 2] (chosen, rejected), the base's first; K ≥ 2.

    log π̃ = −logsumexp_k(log α_k − ℓ_k), `-logsumexp(log(alpha) - logps)`, in float64:

    1. weigh the references: the given weights, or `adaptive_weights` of the log-probs before clipping;
    2. with `published`, give each of the two references the other's weight: that is what the authors' code
       (trainer_mref.py) computes, π_1 π_2 / (α_1 π_1 + α_2 π_2);
    3. clip each reference but the base to the base's neighbourhood, and mix.

    ValueError for another shape, or `published` with other than two references.
    """
    if logps.dim() != 3 or logps.shape[0] < 2 or logps.shape[2] != 2:
        raise ValueError(f"logps: was of shape {list(logps.shape)}, must be [K, n, 2] with K of 2 or more")
    if convention == "published" and logps.shape[0] != 2:
        raise ValueError(f"convention: was 'published', must be 'formula' with {logps.shape[0]} references")

    # float64: float32 is coarse for differences between log-probs of hundreds of nats
    logps = logps.double()
    if alpha == "adaptive":
        weights = adaptive_weights(logps)[..., None]  # [K, n, 1]
    else:
        weights = torch.tensor([float(a) for a in alpha], dtype=torch.float64, device=logps.device)[:, None, None]
    if convention == "published":
        weights = weights.flip(0)

    clipped = clip_to_base(logps, epsilon)
    return -torch.logsumexp(weights.log() - clipped, 0).float()


def adaptive_weights(logps: Tensor) -> Tensor:
    """α [K, n] of log-probs [K, n, 2] before clipping: how sure each reference is of the order of the pair.

    α_k = |γ_k| / (Σ|γ| + 1e-6), `abs(gamma_k) / (sum(abs(gamma)) + 1e-6)`, with γ = log π(chosen) − log π(rejected).
    The base gets the rest, as in the published code: the weights sum to 1, and if no reference is sure of anything,
    only the base counts.
    """
    sure = (logps[..., 0] - logps[..., 1]).abs()
    sure = torch.cat([sure[:1] + TINY, sure[1:]])
    return sure / sure.sum(0)


def clip_to_base(logps: Tensor, epsilon: float) -> Tensor:
    """Log-probs [K, n, 2]; all but the base's are clipped to [ℓ_base(1 + ε_y), ℓ_base(1 − ε_y)].

    Log-probs are negative, so 1 + ε_y gives the lower end. ε is split between the two answers of a pair in proportion
    to their log-probs, averaged over references: ε_w = ε |m_w| / (|m_w| + |m_l|), ε_l = ε − ε_w.
    """
    # ε_w and ε_l as shares of ε; half each if both answers have log-probs of 0
    size = logps.mean(0).abs()  # [n, 2]
    total = size.sum(1, keepdim=True)
    share = torch.where(total > 0, size / total.clamp(min=torch.finfo(size.dtype).tiny), 0.5)

    # amin and amax sort the two ends, whatever the sign of the base's log-prob
    base = logps[0]
    bounds = torch.stack([base * (1 + epsilon * share), base * (1 - epsilon * share)])
    clipped = torch.maximum(logps, bounds.amin(0)).minimum(bounds.amax(0))
    return torch.cat([logps[:1], clipped[1:]])
