"""Several references as one: MRPO's mixture of their log-probs (arXiv 2405.16388).

    combined = combine(torch.stack([base, other]), epsilon=0.1)      # [n, 2], in place of one reference's

The closed form of a KL penalty to K references at once is a policy tied to one virtual reference, their weighted
harmonic mean: π̃ = (Σ_k α_k / π_k)⁻¹. References other than the base are first clipped to its neighbourhood, as a
reference that finds an answer impossible would otherwise decide alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TINY = 1e-6  # of the adaptive weights; the published code's


def combine(
    logps: Tensor,
    *,
    epsilon: float,
    alpha: Literal["adaptive"] | Sequence[float] = "adaptive",
    convention: Literal["formula", "published"] = "formula",
) -> Tensor:
    """log π̃ [n, 2] float32 of reference log-probs [K, n, 2] (chosen, rejected), the base's first; K ≥ 2.

    log π̃ = −logsumexp_k(log α_k − ℓ_k), in float64. `published` gives each of two references the other's weight: the
    authors' code (trainer_mref.py) computes π_1 π_2 / (α_1 π_1 + α_2 π_2), which is that.
    """
    if logps.dim() != 3 or logps.shape[0] < 2 or logps.shape[2] != 2:
        raise ValueError(f"logps: was of shape {list(logps.shape)}, must be [K, n, 2] with K of 2 or more")
    if convention == "published" and logps.shape[0] != 2:
        raise ValueError(f"convention: was 'published', must be 'formula' with {logps.shape[0]} references")
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
    """α [K, n] of log-probs [K, n, 2], before any clipping: how sure each reference is of the order of the pair.

    α_k = |γ_k| / (Σ|γ| + 1e-6) with γ = log π(chosen) − log π(rejected); the base has what is left, as in the published
    code, so that they sum to 1 and the base stands alone where no reference is sure of anything.
    """
    sure = (logps[..., 0] - logps[..., 1]).abs()
    sure = torch.cat([sure[:1] + TINY, sure[1:]])
    return sure / sure.sum(0)


def clip_to_base(logps: Tensor, epsilon: float) -> Tensor:
    """Log-probs [K, n, 2], each but the base's within [ℓ_base(1 + ε_y), ℓ_base(1 − ε_y)].

    Log-probs are negative, so 1 + ε_y gives the lower end. ε is shared out between the two answers of a pair by the
    size of their log-probs, the mean over references: ε_w = ε |m_w| / (|m_w| + |m_l|), ε_l = ε − ε_w.
    """
    size = logps.mean(0).abs()  # [n, 2]
    total = size.sum(1, keepdim=True)
    share = torch.where(total > 0, size / total.clamp(min=torch.finfo(size.dtype).tiny), 0.5)
    base = logps[0]
    bounds = torch.stack([base * (1 + epsilon * share), base * (1 - epsilon * share)])
    clipped = torch.maximum(logps, bounds.amin(0)).minimum(bounds.amax(0))
    return torch.cat([logps[:1], clipped[1:]])
