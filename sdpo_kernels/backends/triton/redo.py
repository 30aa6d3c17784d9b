"""The Triton kernel for rows out of range, which exp-direct (kernels.py) cannot represent: rare, one row per program.

A row is out of range if its target is very unlikely (a log-prob below about −86) or infinite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo_kernels.backends.triton.kernels import LN2, SHIFT, k_of, logp_of, shift_of, transform


@triton.jit
def row_result(target, rest):
    """logp and logsumexp in float64, also of infinite logits: a target of +inf gives NaN, as in log_softmax."""
    logp = tl.where(target == float("inf"), float("nan"), logp_of(target, rest))
    logp = tl.where(target == float("-inf"), tl.where(rest == float("-inf"), float("nan"), target), logp)
    return logp, tl.where(target == float("-inf"), rest, target - logp)


# otherwise every kind of batch size is compiled separately
@triton.jit(do_not_specialize=["n_columns", "kept_rows"])
def redo_kernel(
    redo, x, w, bias, targets, target_logits,  # all V columns here
    logps, state, entropy, log_sum_sq, mean_logits, stash, direction,  # direction [N, width]: Σ 2⁻⁵⁸·p_j·c_j·W_j
    n_columns, width, x_stride, w_stride, kept_rows, stash_columns, stash_stride, before, by,
    BJ: tl.constexpr, BH: tl.constexpr, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRAS: tl.constexpr,
    STORE: tl.constexpr, DIRECTION: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Recompute a row out of range, one row per program; programs of other rows return at once.

    1. one walk with a running maximum: the logsumexp without the target
    2. log-prob, logsumexp, extras
    3. a second walk with k = logsumexp: S, and the direction of a frozen head

    A slice answers as in finalize_kernel, with the log-sum of its own columns as k.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(redo + row) == 0:
        return

    target = tl.load(targets + row)
    hidden = tl.arange(0, BH)
    left = tl.load(x + row * x_stride + hidden, hidden < width, other=0.0).to(tl.float32)
    top, total, mean, squares, z_sum = online_sums(
        w, bias, left, target, n_columns, width, w_stride, before, by, BJ, BH, CAPPED, HAS_BIAS, EXTRAS,
        x.dtype.element_ty,
    )  # fmt: skip

    at_target = tl.load(target_logits + row)
    base = top.to(tl.float64) * LN2
    rest = tl.log(total.to(tl.float64)) + base
    one = tl.arange(0, 1)
    if SLICE:
        c = store_slice(
            state + 2 * row, entropy + row if EXTRAS else None, log_sum_sq + row if EXTRAS else None,
            mean_logits + row if EXTRAS else None, rest, total, mean, squares, z_sum, EXTRAS,
        )  # fmt: skip
    else:
        logp, lse = row_result(at_target, rest)
        c = shift_of(lse)
        tl.store(logps + row + one, logp.to(tl.float32))
        tl.store(state + 2 * row + one, lse)
        tl.store(state + 2 * row + 1 + one, k_of(c))

    # as in finalize_kernel, relative to the maximum instead of k
    if EXTRAS and not SLICE:
        p = tl.exp(logp)
        share = tl.exp(base - lse)
        h = tl.where(p > 0, -p * logp, 0.0) - share * (mean.to(tl.float64) + (base - lse) * total.to(tl.float64))
        tl.store(entropy + row + one, h.to(tl.float32))
        tl.store(log_sum_sq + row + one, tl.log(p * p + squares.to(tl.float64) * share * share).to(tl.float32))
        tl.store(mean_logits + row + one, (z_sum / n_columns).to(tl.float32))

    # rows of a reference, which follow the policy's, keep nothing
    if (STORE or DIRECTION) and row < kept_rows:
        gathered = stored_row(
            stash + row * stash_stride if STORE else None, w, bias, left, target, c, n_columns, width, w_stride,
            stash_columns, before, by, BJ, BH, CAPPED, HAS_BIAS, STORE, DIRECTION, x.dtype.element_ty,
        )  # fmt: skip
        if DIRECTION:
            tl.store(direction + row * width + hidden, gathered, hidden < width)


@triton.jit
def store_slice(
    state, mean_log_prob, sum_sq_probs, sum_logits, rest, total, mean, squares, z_sum, EXTRAS: tl.constexpr
):
    """A slice's o and k of one row, and the fields of base.SliceForward; returns c, as slice_row of row_math.h."""
    one = tl.arange(0, 1)
    finite = (tl.abs(rest) < float("inf")) & (rest == rest)
    k = tl.where(finite, rest, tl.where(rest == -float("inf"), -1e30, 0.0))
    c = shift_of(k)
    tl.store(state + one, tl.exp(rest - k_of(c) - SHIFT))
    tl.store(state + 1 + one, k_of(c))
    if EXTRAS:
        some, sum_ = total > 0.0, total.to(tl.float64)
        tl.store(mean_log_prob + one, tl.where(some, mean.to(tl.float64) / sum_ - tl.log(sum_), 0.0 * sum_))
        tl.store(sum_sq_probs + one, tl.where(some, squares.to(tl.float64) / (sum_ * sum_), 0.0 * sum_))
        tl.store(sum_logits + one, z_sum)
    return c


@triton.jit
def online_sums(
    w, bias, left, target, n_columns, width, w_stride, before, by,
    BJ: tl.constexpr, BH: tl.constexpr, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRAS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """max z, Σ e, Σ e·(z − max), Σ e² with e = exp(z − max) over one row without the target, and Σ z with it.

    The maximum is in units of ln 2, as all z are here.
    """
    top, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    mean, squares, z_sum = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32), tl.zeros([1], tl.float64)
    for start in range(0, n_columns, BJ):
        z, _, _, counted = few_logits(
            w, bias, left, start, target, n_columns, width, w_stride, before, by, BJ, BH, CAPPED, HAS_BIAS, DTYPE,
        )  # fmt: skip

        # what was summed so far is relative to the old maximum: rescale it to the new one
        new = tl.maximum(top, tl.max(tl.where(counted, z, float("-inf")), 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        e = tl.where(counted, tl.exp2(z - base), 0.0)
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp2(top - base))
        if EXTRAS:
            moved = tl.where(top == float("-inf"), 0.0, top - base)
            mean = (mean + moved * total) * shrink + tl.sum(tl.where(e == 0.0, 0.0, e * (z - base)), 0)
            squares = squares * shrink * shrink + tl.sum(e * e, 0)
            columns = start + tl.arange(0, BJ)
            z_sum += tl.sum(tl.where(columns < n_columns, z, 0.0), 0).to(tl.float64)
        total = total * shrink + tl.sum(e, 0)
        top = new
    return top, total, mean * LN2, squares, z_sum * LN2


@triton.jit
def stored_row(
    stash, w, bias, left, target, c, n_columns, width, w_stride, stash_columns, before, by,
    BJ: tl.constexpr, BH: tl.constexpr, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, STORE: tl.constexpr,
    DIRECTION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store one row of S with the shift c to its row `stash`; returns Σ S_j·W_j [BH], 0 without DIRECTION."""
    gathered = tl.zeros([BH], tl.float32)
    for start in range(0, n_columns, BJ):
        z, slope, right, counted = few_logits(
            w, bias, left, start, target, n_columns, width, w_stride, before, by, BJ, BH, CAPPED, HAS_BIAS, DTYPE,
        )  # fmt: skip
        s = tl.where(counted, tl.exp2(z - c) * slope, 0.0)
        columns = start + tl.arange(0, BJ)
        if STORE:
            tl.store(stash + columns, s.to(stash.dtype.element_ty), columns < tl.minimum(stash_columns, n_columns))
        if DIRECTION:
            gathered += tl.sum(s[:, None] * right, 0)
    return gathered


@triton.jit
def few_logits(
    w, bias, left, start, target, n_columns, width, w_stride, before, by,
    BJ: tl.constexpr, BH: tl.constexpr, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """BJ logits of one row in units of ln 2, their slopes, their rows of w [BJ, BH], and which count.

    Those count that are in range and not the target.
    """
    columns = (start + tl.arange(0, BJ)).to(tl.int64)
    hidden = tl.arange(0, BH)
    inside = columns < n_columns
    at = w + columns[:, None] * w_stride + hidden[None, :]
    right = tl.load(at, inside[:, None] & (hidden[None, :] < width), other=0.0).to(DTYPE).to(tl.float32)
    a = tl.sum(right * left[None, :], 1)
    if HAS_BIAS:
        a += tl.load(bias + columns, inside, other=0.0).to(tl.float32)
    u, slope = transform(a, before, CAPPED)
    return u * by, slope, right, inside & (columns != target)
