"""The arithmetic of a chunk of logits, in plain torch: running sums for the forward, dL/dlogits for the backward.

The target's own column is left out of the running logsumexp, so that with d = lse_rest − z_target both ends are exact:
logp = −log(1 + e^d) = -log1p(exp(d)) and 1 − p = -expm1(logp) lose no digits as p → 1 or p → 0. Everything is kept
relative to the running logsumexp `rest`, so nothing overflows. [N]-sized vectors are float64: the cost is negligible
next to the [N, chunk] work, and hundreds of chunks add no rounding of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_kernels.backends.base import SHIFT, HeadForward, Saved, SliceForward

_LOWEST = -1e30  # used for −inf in products with a probability of 0


class RunningSums:
    """Takes chunks of logits by `add`; `finish` returns the log-probs and the requested extras."""

    def __init__(self, n_rows: int, device: torch.device, dtype: torch.dtype, outputs: tuple[str, ...]) -> None:
        def vector(value: float) -> Tensor:
            return torch.full((n_rows,), value, dtype=torch.float64, device=device)

        self.dtype = dtype  # of the results
        self.outputs = outputs
        self.rest = vector(-torch.inf)  # logsumexp over the columns seen, without the target's
        self.z_target = vector(-torch.inf)
        self.has_target = torch.zeros(n_rows, dtype=torch.bool, device=device)
        self.max_rest = vector(-torch.inf)
        self.sum_logits = vector(0.0)
        self.sum_sq_probs = vector(0.0)  # Σ q², q = softmax over the rest
        self.mean_log_prob = vector(0.0)  # Σ q log q

    def add(self, z: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Add a chunk of logits `z` [N, C] with target columns `columns` [N] (outside 0 … C−1: in another chunk).

        1. take the targets' logits out of z
        2. sum exp(z − top) over the chunk, with top its own maximum
        3. merge that into the running logsumexp
        4. rescale everything summed before to the new logsumexp

        Returns the chunk's probabilities [N, C] among the rest seen so far (0 at the target) and the factor [N] by
        which probabilities of earlier chunks have shrunk. The target's entry of `z` is −inf afterwards.
        """
        if "mean_logits" in self.outputs:
            self.sum_logits += z.sum(1, dtype=torch.float64)
        self._take_target_(z, columns)

        # a chunk whose logits are all −inf would give −inf − (−inf) = NaN
        top = z.amax(1)
        shift = torch.where(top == -torch.inf, 0.0, top)
        probs = (z - shift.unsqueeze(1)).exp_()
        total = probs.sum(1).double()

        before, self.rest = self.rest, torch.logaddexp(self.rest, shift.double() + total.log())
        if "is_top1" in self.outputs:
            self.max_rest = torch.maximum(self.max_rest, top.double())

        # both factors are at most 1; where nothing was seen yet every term is 0, not NaN
        rest = torch.where(self.rest == -torch.inf, 0.0, self.rest)
        shrink, into = (before - rest).exp(), (shift.double() - rest).exp()
        self._add_extras(z, probs, shift, total, shrink, into, before, rest)
        return probs.mul_(into.unsqueeze(1).to(z.dtype)), shrink.to(z.dtype)

    def _take_target_(self, z: Tensor, columns: Tensor) -> None:
        """Move the targets' logits from `z` to `self.z_target`, leaving −inf."""
        inside = (columns >= 0) & (columns < z.shape[1])
        column = columns.clamp(0, z.shape[1] - 1).unsqueeze(1)
        value = z.gather(1, column).squeeze(1)
        self.z_target = torch.where(inside, value.double(), self.z_target)
        self.has_target |= inside
        z.scatter_(1, column, torch.where(inside, -torch.inf, value).unsqueeze(1))

    def _add_extras(
        self,
        z: Tensor,
        probs: Tensor,
        shift: Tensor,
        total: Tensor,
        shrink: Tensor,
        into: Tensor,
        before: Tensor,
        rest: Tensor,
    ) -> None:
        """Merge the chunk's Σ q² and Σ q log q into the running ones."""
        if "log_sum_sq_probs" in self.outputs:
            self.sum_sq_probs = self.sum_sq_probs * shrink.square() + probs.square().sum(1).double() * into.square()

        # q log q: log q = z − rest here; for earlier chunks it moves by before − rest
        if "entropy" in self.outputs:
            centred = (z - shift.unsqueeze(1)).clamp_(min=_LOWEST)
            here = (probs * centred).sum(1).double() + (shift.double() - rest) * total
            earlier = self.mean_log_prob + (before - rest).clamp(min=_LOWEST)
            self.mean_log_prob = earlier * shrink + here * into

    def of_slice(self, kept: Tensor | None) -> SliceForward:
        """What a slice answers: its sums relative to its own logsumexp."""
        k = torch.where(self.rest.abs() == torch.inf, 0.0, self.rest)
        answers = {
            "mean_log_prob": (self.mean_log_prob, "entropy"),
            "sum_sq_probs": (self.sum_sq_probs, "log_sum_sq_probs"),
            "sum_logits": (self.sum_logits, "mean_logits"),
            "max_rest": (self.max_rest, "is_top1"),
            "target_z": (self.z_target.where(self.has_target, 0.0), "is_top1"),
        }
        extras = {name: value for name, (value, output) in answers.items() if output in self.outputs}
        return SliceForward((self.rest - k - SHIFT).exp(), k, kept, **extras)

    def finish(self, n_columns: int, kept: Tensor | None) -> HeadForward:
        """The log-probs and the requested extras; `kept` is passed through."""
        # logp = -log1p(exp(rest - z_target)): exact as p → 1 and as p → 0
        zero = torch.zeros_like(self.rest)
        z_target = self.z_target.masked_fill(self.z_target == torch.inf, torch.nan)  # as log_softmax has it
        logps = -torch.logaddexp(self.rest - z_target, zero)
        lse = torch.logaddexp(self.rest, z_target)

        # extras that were not requested were not summed either: their values here mean nothing
        answers = {
            "entropy": entropy_of(logps, self.mean_log_prob),
            "log_sum_sq_probs": log_sum_sq_of(logps, self.sum_sq_probs),
            "mean_logits": self.sum_logits / n_columns,
        }
        extras = {name: value.to(self.dtype) for name, value in answers.items() if name in self.outputs}
        if "is_top1" in self.outputs:
            extras["is_top1"] = self.z_target >= self.max_rest

        return HeadForward(
            logps=logps.to(self.dtype),
            state=lse.unsqueeze(1),
            entropy=extras.get("entropy"),
            log_sum_sq_probs=extras.get("log_sum_sq_probs"),
            mean_logits=extras.get("mean_logits"),
            is_top1=extras.get("is_top1"),
            kept=kept,
        )


def entropy_of(logps: Tensor, mean_log_prob: Tensor) -> Tensor:
    """Entropy [N] from the target's log-prob and Σ q log q of the rest, q its softmax; float64."""
    p, r = logps.exp(), -torch.expm1(logps)
    # −p log p − r log r + r·H(q): no term is negative, so nothing cancels
    return -p * logps.clamp(min=_LOWEST) - torch.xlogy(r, r) - r * mean_log_prob


def log_sum_sq_of(logps: Tensor, sum_sq_probs: Tensor) -> Tensor:
    """log Σ p² [N] from the target's log-prob and Σ q² of the rest; float64."""
    return (logps.exp().square() + torch.expm1(logps).square() * sum_sq_probs).log()


def dlogits(z: Tensor, columns: Tensor, saved: Saved, coefficient: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """dL/dz of a chunk: g(1[j = y] − p) − h·p(log p + H), with 1 − p = -expm1(logp) taken from the log-prob itself."""
    exact_lse = saved.state[:, 0]
    lse = exact_lse.to(z.dtype)
    tail = (exact_lse - lse).to(z.dtype)  # lost by rounding the logsumexp; put back per row, at no cost

    # at the target 1 − p cancels as p → 1, unless it is taken from the log-prob
    log_probs = z - lse.unsqueeze(1)
    probs = log_probs.exp()
    at_target = -torch.expm1(saved.logps) * coefficient
    coefficient = coefficient * (-tail).exp()

    if grad_entropy is None:
        grad = probs.mul_(-coefficient.unsqueeze(1))
    else:
        assert saved.entropy is not None
        h = grad_entropy.to(probs.dtype)
        finite = log_probs.clamp_(min=_LOWEST)  # 0·(−inf) would be NaN where a column is masked out
        slope = h * (-tail).exp()
        grad = probs * -(coefficient.unsqueeze(1) + slope.unsqueeze(1) * (finite + (saved.entropy - tail).unsqueeze(1)))
        at_target = at_target - h * saved.logps.exp() * (saved.logps.clamp(min=_LOWEST) + saved.entropy)

    # rows whose target is in another chunk write back what they already have
    inside = (columns >= 0) & (columns < z.shape[1])
    column = columns.clamp(0, z.shape[1] - 1).unsqueeze(1)
    value = torch.where(inside, at_target, grad.gather(1, column).squeeze(1))
    return grad.scatter_(1, column, value.unsqueeze(1))
