"""f-DPO (arXiv 2309.16240): what stands in place of a log-ratio where the regulariser is another divergence.

The option `f_divergence` of the losses that depend on the difference of the two scores: 'reverse_kl' (plain DPO),
'forward_kl', 'js' (Jensen–Shannon) and 'alpha', which `f_alpha` shapes (0 is forward_kl, 1 reverse_kl).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_kernels.losses.pair_logps import PairLogps


def scores(pair: PairLogps, f_divergence: str, f_alpha: float) -> tuple[Tensor, Tensor]:
    """f′(π/π_ref) of chosen and rejected, [B] each; their log-ratios for reverse_kl."""
    return _score(pair.chosen_logratio, f_divergence, f_alpha), _score(pair.rejected_logratio, f_divergence, f_alpha)


def _score(logratio: Tensor, f_divergence: str, f_alpha: float) -> Tensor:
    """f′(t) with log t = logratio: log t; 1 − 1/t; log(2t/(1+t)); (t^(α−1) − 1)/(α−1)."""
    if f_divergence == "js":
        return math.log(2) + F.logsigmoid(logratio)
    power = {"forward_kl": -1.0, "alpha": f_alpha - 1}.get(f_divergence, 0.0)
    if abs(power) < 1e-6:  # reverse_kl, and what alpha tends to at 1
        return logratio
    return torch.expm1(_representable(power * logratio)) / power


def _representable(exponent: Tensor) -> Tensor:
    """At most 80 in float32 (700 in float64), so that exp stays finite; no gradient beyond, as in TRL."""
    return exponent.clamp(max=700.0 if exponent.dtype == torch.float64 else 80.0)
