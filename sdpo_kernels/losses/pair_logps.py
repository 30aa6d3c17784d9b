"""The input of every pair loss: the summed log-probs of both answers under policy and reference."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PairLogps(NamedTuple):
    """Summed log-probs [B] of chosen and rejected under policy and reference, and the counts of scored tokens [B].

    `weights` [B], without gradient, are for losses that weigh pairs (wpo); None for all others.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_counts: Tensor
    rejected_counts: Tensor
    weights: Tensor | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        """a = log π(y_w) − log π_ref(y_w), [B]."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """b = log π(y_l) − log π_ref(y_l), [B]."""
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        """Δ = a − b, [B]."""
        return self.chosen_logratio - self.rejected_logratio
