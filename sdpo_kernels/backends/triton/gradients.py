"""The rows' factors of a backward, and what is left to do after its products: a launch each.

With r and t of a row, dX = r ⊙ (S·W) + t ⊙ W[y] and dW = Sᵀ·(r ⊙ X) + the terms of targets.py. A frozen head keeps
d logp / d hidden, which is the same with a gradient of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo_kernels.backends.base import HeadCall, Saved
from sdpo_kernels.backends.triton.kernels import SHIFT
from sdpo_kernels.backends.triton.launch import COMPILED

BLOCK = 1024  # columns of H at a time
FROM_SQRT_2 = tl.constexpr(0x800000 - 0x3504F3)  # added to a float's bits: from √2 on, up to the next power of 2
POWERS = tl.constexpr(-0x800000)  # the bits of sign and exponent


@dataclass
class Factors:
    """Of each row [N]: dX = r ⊙ (S·W) + t ⊙ W[y], with S relative to k."""

    r: Tensor  # float32
    k: Tensor  # float64
    t: Tensor  # float32
    scaled_x: Tensor | None  # r ⊙ X in X's dtype, if it was asked for


def factors_of(call: HeadCall, saved: Saved, grad_logps: Tensor | None, x: Tensor | None) -> Factors:
    """The factors of a backward with `grad_logps` [N], None for ones; r ⊙ X of `x` (columns of hidden) is added.

    If nothing is stashed, r is a power of 2, so that r ⊙ X is exact in bfloat16.
    """
    n_rows, head = call.hidden.shape[0], call.head
    r, t = (saved.logps.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    k = r.new_empty(n_rows, dtype=torch.float64)
    scaled_x = None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if n_rows == 0:
        return Factors(r, k, t, scaled_x)

    # the stash has been stored with the forward's k
    is_power = call.dtype == torch.bfloat16 and saved.keep.n_columns == 0 and not saved.keep.is_direction
    factors_kernel[(n_rows,)](
        saved.state.contiguous(), saved.logps.contiguous(), None if grad_logps is None else grad_logps.contiguous(),
        call.targets.contiguous(), x, r, k, t, scaled_x, *((0, 0) if x is None else (x.shape[1], x.stride(0))),
        head.logit_scale / head.temperature, 0.0 if head.softcap is None else head.temperature / head.softcap,
        BLOCK=BLOCK, CAPPED=head.softcap is not None, POWER=is_power, HAS_GRAD=grad_logps is not None,
        SCALES=x is not None, **COMPILED,
    )  # fmt: skip
    return Factors(r, k, t, scaled_x)


@triton.jit
def factors_kernel(
    state, logps, grad, targets, x,  # [N, 2] float64, [N], [N], [N] int64, [N, width]
    r_out, k_out, t_out, scaled,  # [N] float32, float64 and float32, [N, width]
    width, x_stride, gain, inverse_cap,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, POWER: tl.constexpr, HAS_GRAD: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """r, k and t of one row per program, in float64, and the row of r ⊙ X."""
    row = tl.program_id(0).to(tl.int64)
    at = row + tl.arange(0, 1)
    lse, k, logp = tl.load(state + 2 * at), tl.load(state + 2 * at + 1), tl.load(logps + at).to(tl.float64)
    steep = tl.zeros([1], tl.float64) + gain
    if HAS_GRAD:
        steep *= tl.load(grad + at).to(tl.float64)
    r = (-steep * tl.exp(k - lse + SHIFT)).to(tl.float32)

    # 1 − p by its series where p is near 1
    rest = tl.where(logp > -1e-5, -logp * (1.0 + logp * (0.5 + logp / 6.0)), 1.0 - tl.exp(logp))
    if CAPPED:  # dz/da = 1 − tanh², read back from z
        tanh = (lse + logp) * inverse_cap
        rest *= tl.maximum((1.0 - tanh) * (1.0 + tanh), 0.0)
    t = tl.where(tl.load(targets + at) < 0, 0.0, (steep * rest).to(tl.float32))

    # k moves with r, so that r·S stays the same; not if r is 0 or NaN
    if POWER:
        power = ((r.to(tl.int32, bitcast=True) + FROM_SQRT_2) & POWERS).to(tl.float32, bitcast=True)
        usual = (tl.abs(r) > 1e-30) & (tl.abs(r) < 1e30)
        k = tl.where(usual, k + tl.log(power.to(tl.float64) / r.to(tl.float64)), k)
        r = tl.where(usual, power, r)

    tl.store(r_out + at, r)
    tl.store(k_out + at, k)
    tl.store(t_out + at, t)
    if SCALES:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            value = tl.load(x + row * x_stride + columns, columns < width, other=0.0).to(tl.float32) * r
            tl.store(scaled + row * width + columns, value.to(scaled.dtype.element_ty), columns < width)


def finish(call: HeadCall, products: Tensor, by: Factors, out: Tensor) -> Tensor:
    """out = r ⊙ products + t ⊙ W[y], [N, H], rounded once; `products` [N, H] float32 is S·W, and may be `out`."""
    n_rows, width = products.shape
    weight = call.weight if call.weight.stride(1) == 1 else call.weight.contiguous()
    if n_rows:
        finish_kernel[(n_rows, triton.cdiv(width, BLOCK))](
            products, weight, call.targets.contiguous(), by.r, by.t, out, width, weight.stride(0),
            BLOCK=min(BLOCK, max(16, triton.next_power_of_2(width))), BF16=call.dtype == torch.bfloat16, **COMPILED,
        )  # fmt: skip
    return out


@triton.jit
def finish_kernel(
    products, w, targets, r, t, out,  # [N, width] float32, [V, width], [N] int64, [N], [N], [N, width]
    width, w_stride,
    BLOCK: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """One row and BLOCK columns per program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(products + row * width + columns, inside, other=0.0) * tl.load(r + row)

    # w is rounded as in the tiles; a target of -1 is in another slice
    target = tl.load(targets + row)
    if target >= 0:
        at_target = tl.load(w + target * w_stride + columns, inside, other=0.0)
        if BF16:
            at_target = at_target.to(tl.bfloat16)
        value += tl.load(t + row) * at_target.to(tl.float32)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), inside)
