"""Losses that compare each answer with its reference separately: a and b are the log-ratios of chosen and rejected."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sdpo_kernels.losses.pair_logps import PairLogps
from sdpo_kernels.losses.registry import register


@register("nca_pair")
def nca_pair(pair: PairLogps, beta: float) -> Tensor:
    """−log σ(βa) − ½ log σ(−βa) − ½ log σ(−βb) (NCA, arXiv 2402.05369)."""
    chosen, rejected = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register("bco_pair")
def bco_pair(pair: PairLogps, beta: float) -> Tensor:
    """−log σ(βa) − log σ(−βb): BCO (arXiv 2404.04656) without its running mean of rewards, as TRL's pair form."""
    return -F.logsigmoid(beta * pair.chosen_logratio) - F.logsigmoid(-beta * pair.rejected_logratio)


@register("sppo_hard")
def sppo_hard(pair: PairLogps, beta: float) -> Tensor:
    """(a − 1/(2β))² + (b + 1/(2β))²: SPPO (arXiv 2405.00675, eq. 4.7) with wins of probability 1 and 0.

    Of sums over tokens, so its values are large at a small β.
    """
    return (pair.chosen_logratio - 0.5 / beta).square() + (pair.rejected_logratio + 0.5 / beta).square()


@register("apo_zero")
def apo_zero(pair: PairLogps, beta: float) -> Tensor:
    """σ(−βa) + σ(βb), for chosen answers better than the model's own (APO, arXiv 2408.06266, eq. 7)."""
    return (-beta * pair.chosen_logratio).sigmoid() + (beta * pair.rejected_logratio).sigmoid()


@register("apo_down")
def apo_down(pair: PairLogps, beta: float) -> Tensor:
    """σ(βa) + σ(−βΔ), for chosen answers worse than the model's own (APO, arXiv 2408.06266, eq. 8)."""
    return (beta * pair.chosen_logratio).sigmoid() + (-beta * pair.delta).sigmoid()
