"""Weights that two losses need in addition to summed log-probs: of tokens (ld_dpo) and of pairs (wpo)."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_kernels.rows import ScoredRows, segment_sum


def length_weights(rows: ScoredRows, ld_alpha: float, scored: Tensor | None = None) -> Tensor:
    """Each row's weight, float64 [N_scored]: 1 up to the pair's shorter length, `ld_alpha` beyond (arXiv 2409.06411).

    Args:
        rows: of 2B sequences, chosen half first; a sequence's rows are in ascending order.
        scored: bool [N_scored], needed if `rows` also has unscored rows; `rows.counts` counts the scored ones.
    """
    segment, counts = rows.segment, rows.counts

    # rank of each scored row within its sequence, from 1; rows may not be grouped by sequence, so sort first
    order = segment.argsort(stable=True)
    ones = torch.ones_like(segment) if scored is None else scored.long()
    before = counts.cumsum(0) - counts
    ranks = ones[order].cumsum(0) - before[segment[order]]

    shorter = torch.minimum(*counts.chunk(2)).repeat(2)
    beyond = torch.empty_like(segment, dtype=torch.bool).index_put((order,), ranks > shorter[segment[order]])
    return torch.where(beyond, ld_alpha, 1.0).double()


def agreement_weights(logps: Tensor, log_sum_sq_probs: Tensor, rows: ScoredRows) -> Tensor:
    """WPO's weight of each pair [B], without gradient (arXiv 2406.11827, as TRL 1.16 computes it).

    exp of the chosen's plus the rejected's mean over tokens of log p(y_t) − log Σ_v p_v²; both inputs are [N].
    """
    aligned = (logps - log_sum_sq_probs).detach().index_select(0, rows.index).double()
    means = segment_sum(aligned, rows.segment, rows.counts.shape[0]) / rows.counts
    chosen, rejected = means.chunk(2)
    return (chosen + rejected).exp().to(logps.dtype)
