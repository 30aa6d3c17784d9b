"""How near gradients are to those of exact logits: their errors as multiples of the least that their dtypes allow.

    check_exact(exact_cases(backend="native", stash_bytes=0), stashed=False)

Ideal gradients come from float64 logits of the rounded operands, and are rounded once, into their tensor's dtype. One
more rounding is allowed: coefficients dL/da of all columns but the target's are operands of products, so they are
rounded once to the dtype in which operands are multiplied. The target's coefficient is not.

A multiple is ‖found − truth‖ ÷ ‖ideal − truth‖, where truth has no rounding at all: over d_hidden, over the rows of
d_weight that are a target, and over its other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.rows import IGNORE_INDEX
from tests.reference import Case, Found, logits_of, random_case

HIDDEN = TARGETS = 1.1
OTHERS = 1.25  # where S is stashed before r is known, r ⊙ X is rounded, too: √(3/2) = 1.22 for three roundings, not two
OTHERS_OF_TWO = 1.6  # float32 gradients of bfloat16 operands with a stash: √2, and what few rows vary; also of targets


@dataclass
class Multiples:
    """Errors as multiples of the ideal's."""

    hidden: float
    targets: float
    others: float


def rounded(tensor: Tensor) -> Tensor:
    """float64 numbers rounded once to bfloat16."""
    return to_dtype(tensor, torch.bfloat16)


def to_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 numbers rounded once to `dtype`, still float64."""
    return tensor.to(dtype).double()


def coefficients(case: Case, operands: torch.dtype) -> Tensor:
    """dL/da [N, V] in float64, a = x·w + b of operands rounded to `operands`; rows that are not scored are 0."""
    x, w = (to_dtype(t, operands) for t in (case.hidden, case.weight))
    a = logits_of(x, w, None if case.bias is None else case.bias.double()).requires_grad_()
    z = case.logit_scale * a
    z = (z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)) / case.temperature

    # 1 − p as the share of all other columns: no digits are lost where p is near 1
    scored, y = case.targets != IGNORE_INDEX, case.targets.clamp(min=0).unsqueeze(1)
    is_target = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y, True)
    others = z.detach().masked_fill(is_target, -torch.inf).logsumexp(1)
    p = z.detach().softmax(1)
    dz = torch.where(is_target, (others - z.detach().logsumexp(1)).exp().unsqueeze(1), -p)

    g = torch.ones(len(y), dtype=torch.float64) if case.grad is None else case.grad
    (da,) = torch.autograd.grad(z, a, dz * (g * scored).unsqueeze(1))
    return da


def multiples(case: Case, found: Found, operands: torch.dtype, rounds: Callable[[Tensor], Tensor] | None) -> Multiples:
    """`rounds` rounds the coefficients of columns other than the target's; None: the ideal does not."""
    exact = coefficients(case, operands)
    kept = exact if rounds is None else rounds(exact)
    scored = (case.targets != IGNORE_INDEX).nonzero().squeeze(1)
    kept[scored, case.targets[scored]] = exact[scored, case.targets[scored]]

    x, w = (to_dtype(t, operands) for t in (case.hidden, case.weight))
    is_target = torch.zeros(len(w), dtype=torch.bool)
    is_target[case.targets[scored]] = True

    def multiple(name: str, truth: Tensor, ideal: Tensor, rows: Tensor | slice) -> float:
        mine = found[name]
        if mine is None or not truth[rows].numel():
            return 0.0
        least = to_dtype(ideal, mine.dtype)[rows] - truth[rows]
        return ((mine.double()[rows] - truth[rows]).norm() / least.norm()).item()

    dw, ideal_dw = exact.T @ x, kept.T @ x
    return Multiples(
        hidden=multiple("d_hidden", exact @ w, kept @ w, slice(None)),
        targets=multiple("d_weight", dw, ideal_dw, is_target),
        others=multiple("d_weight", dw, ideal_dw, ~is_target),
    )


def check_exact(
    cases: Iterable[Case], *, stashed: bool, rounds: Callable[[Tensor], Tensor] | None = rounded,
    operands: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """The bars above for the gradients of `linear_logps`; for the rows of dW the root mean square over the cases."""
    found = [(case, multiples(case, case.ours(), operands, rounds)) for case in cases]
    two = stashed and found[0][0].weight.dtype != operands
    for case, errors in found:
        assert errors.hidden <= HIDDEN, (case, errors)
    assert root_mean_square(errors.targets for _, errors in found) <= (OTHERS_OF_TWO if two else TARGETS), found
    assert root_mean_square(errors.others for _, errors in found) <= (OTHERS_OF_TWO if two else OTHERS), found


def root_mean_square(numbers: Iterable[float]) -> float:
    """√(mean of squares)."""
    return float(torch.tensor(list(numbers)).square().mean().sqrt())


ROWS, WIDTH, COLUMNS = 96, 64, 1010  # the last tile of every backend is a partial one
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "logit_scale": 1.5},
    "softcap": {"bias": True, "softcap": 4.0, "temperature": 0.8, "scale": 2.0},
    "peaked": {"scale": 5.0},
    "ignored": {"masked": 0.3},
}


def exact_case(head: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Case:
    """A case with targets that occur many times, and targets in the last tile."""
    case = random_case(ROWS, WIDTH, COLUMNS, dtype=dtype, **HEADS[head], trains=("hidden", "weight"))
    case.hidden += 0.5  # hidden states of a model have a common part, which does not cancel in sums of many rows
    case.targets[3:60:3] = 7
    case.targets[[1, 61, 70]] = torch.tensor([COLUMNS - 1, COLUMNS - 1, COLUMNS - 2])
    case.settings = settings
    return case


def exact_cases(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Iterator[Case]:
    """A case of every head."""
    return (exact_case(head, dtype, **settings) for head in HEADS)
