"""The targets' own terms of the backward, which are never rounded to bfloat16: the factors of rows, and dW's terms.

With t = g·gain·(1 − p)·c of a row, dX gets t·W[y], row y of dW gets t·x and db_y gets t. Rows that share a target are
summed in ascending order, so that a repeated run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo_kernels.backends.base import SHIFT, HeadCall, Saved
from sdpo_kernels.backends.triton.launch import COMPILED

BLOCK = 1024  # columns of H that a program adds
FROM_SQRT_2 = 0x800000 - 0x3504F3  # added to a float's bits: mantissas from √2 on round up to the next power of 2


@dataclass
class Factors:
    """Of each row [N]: dX = r ⊙ (S·W) + t ⊙ W[y], with S relative to k."""

    r: Tensor  # float32
    k: Tensor  # float64
    t: Tensor  # float32


def factors_of(call: HeadCall, saved: Saved, grad_logps: Tensor) -> Factors:
    """The factors of a backward; if nothing is stashed, r is a power of 2, so that r ⊙ X is exact in bfloat16."""
    gain, lse, k = call.head.logit_scale / call.head.temperature, saved.state[:, 0], saved.state[:, 1]
    grad, logps = grad_logps.double(), saved.logps.double()
    r = (-gain * grad * (k - lse + SHIFT).exp()).float()
    t = (gain * grad * -torch.expm1(logps) * target_slope(call, lse + logps)).float()
    if call.is_slice:
        t = t.masked_fill(call.targets < 0, 0.0)

    # the stash has been stored with the forward's k
    if call.dtype == torch.bfloat16 and saved.keep.n_columns == 0:
        power = ((r.view(torch.int32) + FROM_SQRT_2) & -0x800000).view(torch.float32)
        usual = (r.abs() > 1e-30) & (r.abs() < 1e30)  # neither 0 nor NaN
        k = torch.where(usual, k + (power.double() / r).log(), k)
        r = torch.where(usual, power, r)
    return Factors(r, k.contiguous(), t)


def target_slope(call: HeadCall, target_logits: Tensor) -> Tensor:
    """dz/da at the target, read back from z: 1 − tanh², without cancellation."""
    softcap = call.head.softcap
    if softcap is None:
        return torch.ones_like(target_logits)
    tanh = target_logits * (call.head.temperature / softcap)
    return ((1 - tanh) * (1 + tanh)).clamp_(min=0)


@dataclass
class SortedRows:
    """A call's rows, sorted by target."""

    order: Tensor  # [N] int64 the rows; in ascending order where targets are equal
    first: Tensor  # [V + 1] int64: those with target v are order[first[v]:first[v + 1]]
    t: Tensor  # [N] float32

    @classmethod
    def of(cls, targets: Tensor, n_columns: int, t: Tensor) -> SortedRows:
        """Sort without waiting for the device."""
        found, order = targets.sort(stable=True)
        first = torch.searchsorted(found, torch.arange(n_columns + 1, device=targets.device))
        return cls(order, first, t.contiguous())

    def add_to(self, out: Tensor, x: Tensor, start: int) -> None:
        """out [C, H] float32, rows `start` … of dW: to each add t·x of the rows [N, H] that have it as their target."""
        n_rows, width = x.shape
        if n_rows and out.numel():
            add_kernel[(out.shape[0], triton.cdiv(width, BLOCK))](
                out, x, self.order, self.first[start:], self.t, width, out.stride(0), x.stride(0),
                BLOCK=min(BLOCK, max(16, triton.next_power_of_2(width))), **COMPILED,
            )  # fmt: skip


@triton.jit
def add_kernel(
    out, x, order, first, t,  # [C, width] float32, [N, width], [N], [C + 1] of order, [N] float32
    width, out_stride, x_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `out` and BLOCK columns per program; programs of rows that no row has as its target return at once."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(first + row), tl.load(first + row + 1)
    if begin == end:
        return

    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(begin, end):
        source = tl.load(order + place)
        total += tl.load(t + source) * tl.load(x + source * x_stride + columns, inside, other=0.0).to(tl.float32)
    to = out + row * out_stride + columns
    tl.store(to, tl.load(to, inside, other=0.0) + total, inside)
