"""Losses without a reference: they read only the policy's log-probs and the token counts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_kernels.losses.margin import smoothed
from sdpo_kernels.losses.pair_logps import PairLogps
from sdpo_kernels.losses.registry import register


@register("sft", reference_free=True)
def sft(pair: PairLogps, beta: float) -> Tensor:
    """Negative log-likelihood of the chosen answers, mean over the batch's chosen tokens, as in TRL; β is not read.

    A pair's value is −log π(y_w)·B/Σ|w|, so the mean over pairs is the mean over tokens. For sums such as MPO's.
    """
    return -pair.chosen * pair.chosen.shape[0] / pair.chosen_counts.sum()


@register("simpo", reference_free=True)
def simpo(pair: PairLogps, beta: float, *, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(β(log π(y_w)/|w| − log π(y_l)/|l|) − γ) (SimPO, arXiv 2405.14734).

    The paper uses β from 2 to 2.5 and γ from 0.3 to 1.6; β is the caller's (default 0.1).
    """
    means = pair.chosen / pair.chosen_counts - pair.rejected / pair.rejected_counts
    return smoothed(beta * means - simpo_gamma, label_smoothing)


@register("cpo", reference_free=True)
def cpo(pair: PairLogps, beta: float, *, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(β(log π(y_w) − log π(y_l))) + α·sft, α = cpo_alpha (CPO, arXiv 2401.08417).

    sft is over completions; TRL's is over prompt and completion.
    """
    return smoothed(beta * (pair.chosen - pair.rejected), label_smoothing) + cpo_alpha * sft(pair, beta)


@register("orpo", reference_free=True)
def orpo(pair: PairLogps, beta: float) -> Tensor:
    """sft − β log σ(log odds_w − log odds_l), odds = p/(1−p), p = exp(mean log-prob) (ORPO, arXiv 2403.07691).

    β is the paper's λ. sft is over completions; TRL's is over prompt and completion.
    """
    chosen, rejected = pair.chosen / pair.chosen_counts, pair.rejected / pair.rejected_counts
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return sft(pair, beta) - beta * F.logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) = log(-expm1(x)) for x < 0; constant above −1e-6, as the odds of a certain answer are unbounded."""
    x = x.clamp(max=-1e-6)

    # torch.where adds the gradients of both sides, so both must be finite everywhere
    near, far = x.clamp(min=-math.log(2)), x.clamp(max=-math.log(2))
    return torch.where(x > -math.log(2), (-torch.expm1(near)).log(), torch.log1p(-far.exp()))
