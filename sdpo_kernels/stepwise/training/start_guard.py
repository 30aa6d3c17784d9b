"""The checks that guard a stage's start: a failure is an error that says which pair, both numbers and likely causes.

1. before it: fused log-probs against the model's own logits (`integrations.causal_lm.check_head`);
2. at its first batch, where policy = reference: a fresh score without gradient must equal the policy's log-probs, and a
   loss that is ln 2 at equality must be ln 2 (dropout left on, a wrong adapter);
3. the cached reference against that fresh score (a stale cache).
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
SAME_PATH_TOLERANCE = 1e-6  # relative; measured on the same path: 0 to 1.9e-9


@dataclass(frozen=True)
class StartGuard:
    """Checks the first batch of a stage whose policy starts as its own reference.

    Or, with `start`, as one of several: then the policy is held to its own score, and the loss may be anything.
    """

    stage: str
    where: Sequence[str]  # 'file:line' of each pair of the stage
    start_loss: float | None  # what the loss is there: a multiple of ln 2, or None where it has no such value
    cache_tolerance: float  # relative
    start: Tensor | None = None  # [n, 2] scores of the policy's start, where they are not the reference's

    def check(self, pair_index: Tensor, policy: Tensor, fresh: Tensor, cached: Tensor, loss: float) -> None:
        """policy, fresh, cached: summed log-probs [2B], chosen first; pair_index [B]. UserError where they disagree."""
        if self.start is not None:
            cached = self.start[pair_index.cpu()].T.reshape(-1)
        self._compare(
            pair_index,
            policy,
            fresh,
            SAME_PATH_TOLERANCE,
            "the policy in training mode gives {a:.6f}, the same weights without gradient {b:.6f}",
            "dropout or another random layer left on, or an adapter that is not neutral at its start",
        )
        self._compare(
            pair_index,
            fresh,
            cached,
            self.cache_tolerance,
            "scored afresh it gives {a:.6f}, the reference cache holds {b:.6f}",
            "a stale reference cache (delete the stage's hidden folder in output_dir), or scores that depend on the "
            "batch's composition (batching: padded, or attention kernels that are not exact)",
        )
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
    """How far a cached score may lie from a fresh one, relative; tight where scores do not depend on the batch."""
    if by_sequence:
        return 1e-5
    low_precision = autocast is not None or weights != torch.float32
    return 5e-2 if low_precision else 1e-3  # only indicative: bf16 noise reaches 1.2 nat a sequence
