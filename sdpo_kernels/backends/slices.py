"""From the slices of a vocabulary to the results of all of it: each slice answers a few sums for each row.

    1. target_logits: the slice that has a row's target computes its logit, and all slices learn it
    2. slice_forward: each slice's 2**-58 · Σ exp(z − k) without the target's column (2⁻⁵⁸), and what the extras need
    3. merge: log-probs, logsumexp and extras from the sums of all slices, in the order of the columns
    4. backward: each slice's part of dX, and its own rows of dW and db, given the results of 3

k is a slice's own: the target's logit, or for rows out of range the log-sum of its columns. `linear_logps` is the case
of one slice, which the backends compute in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdpo_kernels.backends.base import SHIFT, Backend, Gradients, HeadCall, Needs, Saved, SliceForward
from sdpo_kernels.backends.chunk_math import entropy_of, log_sum_sq_of
from sdpo_kernels.head import product_dtype

# the fields of SliceForward that an output is merged from, beside `total` and `k`
FIELDS = {
    "entropy": ("mean_log_prob",),
    "log_sum_sq_probs": ("sum_sq_probs",),
    "mean_logits": ("sum_logits",),
    "is_top1": ("max_rest", "target_z"),
}


class Merged(NamedTuple):
    """Results over all slices, [N] each; extras not requested are None."""

    logps: Tensor
    lse: Tensor  # float64
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


def merge(
    parts: Sequence[SliceForward], target_logits: Tensor, n_columns: int, outputs: Sequence[str], dtype: torch.dtype
) -> Merged:
    """The results of all columns.

    Args:
        parts: of each slice, in the order of the columns; `kept` is not read.
        target_logits: [N] float64.
        n_columns: V of all slices together.
        outputs: names from EXTRAS.
        dtype: of the log-probs and extras.
    """
    rests = [rest_of(part) for part in parts]
    rest = _log_sum(parts, rests)
    logps, lse = logps_of(target_logits, rest)

    # a slice's share of the probability without the target's; where there is none, every term is 0
    where_some = torch.where(rest == -torch.inf, 0.0, rest)
    shares = [(one - where_some).exp() for one in rests]
    answers: dict[str, Tensor] = {}
    if "entropy" in outputs:
        moved = [(one - where_some).clamp(min=-1e30) for one in rests]
        terms = [
            share * (_given(part.mean_log_prob) + by) for share, part, by in zip(shares, parts, moved, strict=True)
        ]
        answers["entropy"] = entropy_of(logps, _sum(terms)).to(dtype)
    if "log_sum_sq_probs" in outputs:
        squares = [share.square() * _given(part.sum_sq_probs) for share, part in zip(shares, parts, strict=True)]
        answers["log_sum_sq_probs"] = log_sum_sq_of(logps, _sum(squares)).to(dtype)
    if "mean_logits" in outputs:
        answers["mean_logits"] = (_sum([_given(part.sum_logits) for part in parts]) / n_columns).to(dtype)
    if "is_top1" in outputs:
        top = torch.stack([_given(part.max_rest) for part in parts]).amax(0)
        answers["is_top1"] = _sum([_given(part.target_z) for part in parts]) >= top
    return Merged(logps.to(dtype), lse, **answers)


def rest_of(part: SliceForward) -> Tensor:
    """log Σ exp(z) over the slice's columns without the target's, float64."""
    return part.total.log() + part.k + SHIFT


def _log_sum(parts: Sequence[SliceForward], rests: Sequence[Tensor]) -> Tensor:
    """The logsumexp over all slices. Where their k agree, the sums themselves are added: no rounding but theirs."""
    total, k = parts[0].total, parts[0].k
    same = torch.ones_like(total, dtype=torch.bool)
    for part in parts[1:]:
        total = total + part.total
        same &= part.k == k

    found = rests[0]
    for rest in rests[1:]:
        found = torch.logaddexp(found, rest)
    return torch.where(same, total.log() + k + SHIFT, found)


def logps_of(target: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and logsumexp, float64, as csrc/row_math.h has them: exact at both ends, also with infinite logits."""
    d = rest - target
    logps = torch.where(d <= 0, -d.exp().log1p(), -d - (-d).exp().log1p())
    logps = logps.masked_fill(target == torch.inf, torch.nan)
    return logps, torch.where(target == -torch.inf, rest, target - logps)


def state_of(backend: Backend, lse: Tensor, k: Tensor) -> Tensor:
    """The state that `backward` reads, [N, state_columns]: the logsumexp over all slices, and the slice's own k."""
    return torch.stack([lse, k], 1)[:, : backend.state_columns]


def check_first_derivative() -> None:
    """RuntimeError in a backward with create_graph, whose results would pass for constants: kernels record nothing."""
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph: was True, must be False: a head in slices has no second derivative")


def slice_backward(
    backend: Backend, call: HeadCall, saved: Saved, grad_logps: Tensor, grad_entropy: Tensor | None, needs: Needs
) -> Gradients:
    """The gradients of a slice; the slice's part of dX is in float32, since it is added to those of the others.

    A frozen head costs no product for dW. No direction is kept for it (`Keep.direction`): it would take as many
    products as a stash does, and one less only where the stash does not fit.
    """
    if needs.hidden:
        call = replace(call, hidden=call.hidden.to(product_dtype(call.dtype)))
    return backend.backward(call, saved, grad_logps, grad_entropy, needs)


def taken(rows: Tensor | None, *tensors: Any) -> list[Any]:
    """Those rows of each tensor, as `rows.busy_rows` gives them; None: all. A tensor may be None."""
    return [t if t is None or rows is None else t.index_select(0, rows) for t in tensors]


def spread(part: Tensor, rows: Tensor | None, n_rows: int) -> Tensor:
    """The inverse of `taken`: [n_rows, …] with 0 in the other rows."""
    return part if rows is None else part.new_zeros((n_rows, *part.shape[1:])).index_copy_(0, rows, part)


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
