"""Checks at a stage's start. An error names the pair, both numbers and the usual causes.

1. Before training, fused log-probs must match the model's own logits (`integrations.causal_lm.check_head`).
2. At the first batch, where policy = reference, the policy's log-probs must match a score of the same weights without
   gradient, and a loss that is ln 2 (0.6931) at equality must be ln 2. Finds dropout left on and wrong adapters.
3. That score must match the cached reference. Finds stale caches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_kernels.stepwise.common.errors import UserError

LN2 = math.log(2)
LN2_TOLERANCE = 1e-3
SAME_PATH_TOLERANCE = 1e-6  # relative; measured between training and scoring: 0 to 1.9e-9


@dataclass(frozen=True)
class StartGuard:
    """Checks the first batch of a stage whose policy starts as its own reference.

    With `start`, as one of several references: the policy is compared with the cached scores of its own start, and the
    loss may be anything.
    """

    stage: str
    where: Sequence[str]  # 'file:line' of each pair of the stage
    start_loss: float | None  # the loss if policy = reference: a multiple of ln 2, or None if it has no fixed value
    cache_tolerance: float  # relative
    start: Tensor | None = None  # [n, 2] scores of the policy's start, if they are not the reference's

    def check(self, pair_index: Tensor, policy: Tensor, fresh: Tensor, cached: Tensor, loss: float) -> None:
        """Compare summed log-probs [2B], chosen first, of the pairs `pair_index` [B]; UserError if they disagree.

        `policy` is in training mode, `fresh` the same weights without gradient, `cached` the cached reference's.
        """
        if self.start is not None:
            cached = self.start[pair_index.cpu()].T.reshape(-1)

        # the same weights, with and without gradient
        self._compare(
            pair_index,
            policy,
            fresh,
            SAME_PATH_TOLERANCE,
            "the policy in training mode gives {a:.6f}, the same weights without gradient {b:.6f}",
            "dropout or another random layer left on, or an adapter that is not neutral at its start",
        )

        # the same weights, now and when the cache was written
        self._compare(
            pair_index,
            fresh,
            cached,
            self.cache_tolerance,
            "rescoring gives {a:.6f}, the reference cache holds {b:.6f}",
            "a stale reference cache (delete the stage's hidden folder in output_dir, and the folder of "
            "reference_cache if it is set), or scores that depend on the rest of the batch (batching: padded, or "
            "attention kernels that are not exact)",
        )

        # at equality every margin is 0, and such a loss does not depend on the data
        start_loss = self.start_loss if self.start is None else None
        if start_loss is not None and not abs(loss - start_loss) <= LN2_TOLERANCE * start_loss / LN2:
            times = start_loss / LN2
            wanted = f"{'' if times == 1 else f'{times:g} '}ln 2 = {start_loss:.6f}"
            raise UserError(
                f"stage {self.stage}: the first loss was {loss:.6f}, must be {wanted} as the policy starts as "
                "its own reference; usual causes: a wrong reference or dropout left on"
            )

    def _compare(self, pair_index: Tensor, a: Tensor, b: Tensor, tolerance: float, text: str, causes: str) -> None:
        a, b = a.detach().double().cpu(), b.detach().double().cpu()

        # relative, but absolute below 1 nat: a tiny log-prob cannot be held to a fraction of itself
        off = (a - b).abs() / b.abs().clamp(min=1.0)
        worst = int(torch.nan_to_num(off, nan=math.inf).argmax())
        if bool(off[worst] <= tolerance):
            return

        half = len(a) // 2
        pair = int(pair_index[worst % half])
        side = "chosen" if worst < half else "rejected"
        raise UserError(
            f"stage {self.stage}: log-prob of the {side} answer of pair {self.where[pair]}: "
            f"{text.format(a=float(a[worst]), b=float(b[worst]))}; they may differ by {tolerance:g} (relative). "
            f"Usual causes: {causes}"
        )


def cache_tolerance(by_sequence: bool, autocast: torch.dtype | None, weights: torch.dtype) -> float:
    """How far a cached score may be from a new one, relative; tight if scores do not depend on the batch."""
    if by_sequence:
        return 1e-5
    low_precision = autocast is not None or weights != torch.float32
    return 5e-2 if low_precision else 1e-3  # a rough bound: bf16 noise reaches 1.2 nat per sequence
