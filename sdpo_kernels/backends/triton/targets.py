"""The targets' own terms of dW and db, which are never rounded to bfloat16.

With t = g·gain·(1 − p)·c of a row, row y of dW gets t·x and db_y gets t. Rows that share a target are summed in
ascending order, so that a repeated run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo_kernels.backends.triton.launch import COMPILED

BLOCK = 1024  # columns of H that a program adds


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
