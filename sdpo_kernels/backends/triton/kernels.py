"""The Triton kernels: target logits, tiles of logits with their epilogue, finalising rows, rows out of range.

The arithmetic is exp-direct (docs/architecture.md): with k = z_y, E_j = 2⁻⁵⁸·exp(z_j − k) for every column but the
target's, o = ΣE, S = E·c with c = dz/da, at the target −o·c. `launch.py` calls these. Row and column offsets are int64.
`UPCAST` is set by tests alone: the interpreter's dot multiplies the bit patterns of bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SHIFT_BITS = tl.constexpr(58.0)
SHIFT = tl.constexpr(40.202536192073015)  # 58·ln 2
LARGEST_SUM = tl.constexpr(1e20)  # above it (log-prob below about −86) a row is done again with k = logsumexp
PARTS = tl.constexpr(4)  # of the extras: Σ E·(z − k), 2⁵⁸·Σ E², Σ z, max z without the target


@triton.jit
def tanh_and_slope(u):
    """tanh(u) and 1 − tanh²(u), neither by a difference of near numbers; libdevice is not there in the interpreter."""
    q = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
    far = (1.0 - q) / (1.0 + q)
    square = u * u
    near = 1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315 - square * (62.0 / 2835))))
    tanh = tl.where(tl.abs(u) < 0.25, u * near, tl.where(u < 0, -far, far))
    return tanh, 4.0 * q / ((1.0 + q) * (1.0 + q))


@triton.jit
def transform(a, before, after, CAPPED: tl.constexpr):
    """The logit z of a = x·w + b, and its slope up to the factor scale/temperature."""
    if CAPPED:
        tanh, slope = tanh_and_slope(a * before)
        return tanh * after, slope
    return a * before, tl.full(a.shape, 1.0, tl.float32)


@triton.jit
def target_logits_kernel(
    x, w, bias, targets, target_logits,  # [N, H], [V, H], [V], [N] int64 → [N] float32
    width, x_stride, w_stride, before, after,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """z_y of one row a program, by a dot product in float32: bfloat16 products are exact there."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        left = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
        total += left * tl.load(w + target * w_stride + columns, inside, other=0.0).to(x.dtype.element_ty).to(
            tl.float32
        )
    a = tl.sum(total, 0)
    if HAS_BIAS:
        a += tl.load(bias + target).to(tl.float32)
    if CAPPED:
        tanh, _ = tanh_and_slope(a * before)
        z = tanh * after
    else:
        z = a * before
    tl.store(target_logits + row, z)


@triton.jit
def products(
    x, w, row_start, column_start, n_rows, n_columns, width, x_stride, w_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The products [BM, BN] of a tile, summed in float32. Out of range rows and columns are 0."""
    acc = tl.zeros([BM, BN], tl.float32)
    rows = (row_start + tl.arange(0, BM)).to(tl.int64)
    columns = (column_start + tl.arange(0, BN)).to(tl.int64)
    for k in range(0, width, BK):
        if DESCRIPTORS:
            left = x.load([row_start, k])
            right = w.load([column_start, k])
        else:
            depth = k + tl.arange(0, BK)
            inside = depth[None, :] < width
            left = tl.load(x + rows[:, None] * x_stride + depth[None, :], (rows[:, None] < n_rows) & inside, other=0.0)
            right = tl.load(
                w + columns[:, None] * w_stride + depth[None, :], (columns[:, None] < n_columns) & inside, other=0.0
            )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right.T, acc, input_precision="ieee")
    return acc


# without this each kind of batch size would be compiled anew
@triton.jit(do_not_specialize=["n_rows", "n_columns", "stash_rows", "first_tile"])
def logits_kernel(
    x, w, bias, targets, shift,  # [N, H], [C, H], [C], [N] int64 relative to this chunk, [N] float32: k
    sums, parts, gemm_target, stash,  # [tiles of all chunks, N], [tiles of this one, 4, N], [N], [N, stash_stride]
    n_rows, n_columns, width, x_stride, w_stride, stash_rows, stash_columns, stash_stride, stash_start, first_tile,
    before, after,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, SUMS: tl.constexpr, EXTRAS: tl.constexpr, STORE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of logits of a chunk of C columns: its row sums of E, what the extras need, and S."""
    row_tiles, column_tiles = tl.cdiv(n_rows, BM), tl.cdiv(n_columns, BN)
    program = tl.program_id(0)
    in_group = GROUP * column_tiles  # GROUP row tiles share their columns of w in the second-level cache
    first_row_tile = program // in_group * GROUP
    height = tl.minimum(row_tiles - first_row_tile, GROUP)
    row_tile = first_row_tile + program % in_group % height
    column_tile = program % in_group // height
    acc = products(
        x, w, row_tile * BM, column_tile * BN, n_rows, n_columns, width, x_stride, w_stride,
        BM, BN, BK, DESCRIPTORS, UPCAST,
    )  # fmt: skip
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    there, inside = rows < n_rows, columns < n_columns
    if HAS_BIAS:
        acc += tl.load(bias + columns, inside, other=0.0).to(tl.float32)[None, :]
    z, slope = transform(acc, before, after, CAPPED)
    target = tl.load(targets + rows, there, other=-1)
    k = tl.load(shift + rows, there, other=0.0)
    at_target = columns[None, :] == target[:, None]
    counted = inside[None, :] & (columns[None, :] != target[:, None])
    e = tl.where(counted, tl.exp2((z - k[:, None]) * LOG2E - SHIFT_BITS), 0.0)
    out = (first_tile + column_tile).to(tl.int64)
    if SUMS:
        tl.store(sums + out * n_rows + rows, tl.sum(e, 1), there)
    if EXTRAS:
        to = parts + column_tile.to(tl.int64) * PARTS * n_rows + rows
        # where E is 0 the logit may be −inf: 0·(−inf) is no number
        tl.store(to, tl.sum(tl.where(e == 0.0, 0.0, e * (z - k[:, None])), 1), there)
        squares = tl.where(counted, tl.exp2(2.0 * (z - k[:, None]) * LOG2E - SHIFT_BITS), 0.0)
        tl.store(to + n_rows, tl.sum(squares, 1), there)
        tl.store(to + 2 * n_rows, tl.sum(tl.where(inside[None, :], z, 0.0), 1), there)
        tl.store(to + 3 * n_rows, tl.max(tl.where(counted, z, float("-inf")), 1), there)
        mine = there & (target >= column_tile * BN) & (target < column_tile * BN + BN)
        tl.store(gemm_target + rows, tl.sum(tl.where(at_target, z, 0.0), 1), mine)
    if STORE:
        to = stash + rows.to(tl.int64)[:, None] * stash_stride + (stash_start + columns)[None, :]
        tl.store(
            to,
            (e * slope).to(stash.dtype.element_ty),
            (rows < stash_rows)[:, None] & ((stash_start + columns)[None, :] < stash_columns),
        )


@triton.jit
def log1p_of(x):
    """log(1 + x), x ≥ 0, in float64."""
    return tl.where(x < 1e-5, x * (1.0 - x * (0.5 - x / 3.0)), tl.log(1.0 + x))


@triton.jit
def logp_of(target, rest):
    """−log(1 + e^(rest − target)) in float64."""
    d = rest - target
    return -log1p_of(tl.exp(tl.minimum(d, -d))) - tl.maximum(d, 0.0)


@triton.jit(do_not_specialize=["n_rows", "n_tiles", "n_columns"])  # else each kind of batch size is compiled anew
def finalize_kernel(
    sums, parts, target_logits,  # [tiles, N], [4, N] float64, [N]
    logps, state, entropy, log_sum_sq, mean_logits, redo,  # [N], [N, 2], [N] each, [N] int8
    n_rows, n_tiles, n_columns,
    BLOCK: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """Row numbers in float64: log-prob, logsumexp and k, the extras; and which rows left the range."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < n_rows
    k = tl.load(target_logits + rows, there, other=0.0)
    o = tl.zeros([BLOCK], tl.float64)
    mean, squares, total = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for tile in range(n_tiles):
        o += tl.load(sums + tl.cast(tile, tl.int64) * n_rows + rows, there, other=0.0).to(tl.float64)
    if EXTRAS:
        mean = tl.load(parts + rows, there, other=0.0)
        squares = tl.load(parts + n_rows + rows, there, other=0.0)
        total = tl.load(parts + 2 * n_rows + rows, there, other=0.0)
    target = k.to(tl.float64)
    rest = tl.log(o) + target + SHIFT
    logp = logp_of(target, rest)
    lse = target - logp
    tl.store(logps + rows, logp.to(tl.float32), there)
    tl.store(state + 2 * rows, lse, there)
    tl.store(state + 2 * rows + 1, target, there)
    infinite = (tl.abs(k) == float("inf")) | (squares == float("inf"))
    tl.store(redo + rows, ((o > LARGEST_SUM) | infinite).to(tl.int8), there)
    if EXTRAS:
        share = tl.exp(target - lse + SHIFT)  # p_j = share·E_j
        p = tl.exp(logp)
        h = tl.where(p > 0, -p * logp, 0.0) - share * (mean + (target - lse) * o)
        tl.store(entropy + rows, h.to(tl.float32), there)
        square_sum = p * p + squares * tl.exp(2.0 * (target - lse) + SHIFT)
        tl.store(log_sum_sq + rows, tl.log(square_sum).to(tl.float32), there)
        tl.store(mean_logits + rows, (total / n_columns).to(tl.float32), there)


@triton.jit(do_not_specialize=["n_rows", "n_columns"])  # else each kind of batch size is compiled anew
def set_targets_kernel(
    stash, targets, logps, state,  # [N, stash_stride]; targets relative to its first column
    n_rows, n_columns, stash_stride, to_tanh,  # tanh = z·to_tanh
    BLOCK: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """S's entries at the targets of a chunk: −o·c, with o = 2⁻⁵⁸·(1 − p)·e^(lse − k)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + rows, rows < n_rows, other=-1)
    inside = (target >= 0) & (target < n_columns)
    logp = tl.load(logps + rows, inside, other=0.0).to(tl.float64)
    lse = tl.load(state + 2 * rows, inside, other=0.0)
    k = tl.load(state + 2 * rows + 1, inside, other=0.0)
    rest = rest_probability(logp)
    value = tl.where(rest == 0.0, 0.0, rest * tl.exp(lse - k - SHIFT))
    if CAPPED:
        tanh = (lse + logp) * to_tanh
        value *= tl.maximum((1.0 - tanh) * (1.0 + tanh), 0.0)
    tl.store(
        stash + rows.to(tl.int64) * stash_stride + target, (-value).to(tl.float32).to(stash.dtype.element_ty), inside
    )


@triton.jit
def rest_probability(logp):
    """1 − p = −expm1(logp), in float64."""
    series = -logp * (1.0 + logp * (0.5 + logp * (1.0 / 6 + logp / 24.0)))
    return tl.where(logp > -1e-3, series, 1.0 - tl.exp(logp))


@triton.jit(do_not_specialize=["n_columns", "kept_rows"])  # else each kind of batch size is compiled anew
def redo_kernel(
    redo, x, w, bias, targets, target_logits,  # whole V here
    logps, state, entropy, log_sum_sq, mean_logits, stash, direction,  # direction [N, width]: Σ 2⁻⁵⁸·p_j·c_j·W_j
    n_columns, width, x_stride, w_stride, kept_rows, stash_columns, stash_stride, before, after,
    BJ: tl.constexpr, BH: tl.constexpr, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRAS: tl.constexpr,
    STORE: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """Rows out of range, one a program, with a running maximum and then k = logsumexp; others leave at once."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(redo + row) == 0:
        return
    target = tl.load(targets + row)
    hidden = tl.arange(0, BH)
    left = tl.load(x + row * x_stride + hidden, hidden < width, other=0.0).to(tl.float32)
    top, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    mean, squares, z_sum = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32), tl.zeros([1], tl.float64)
    for start in range(0, n_columns, BJ):
        z, _, _, counted = few_logits(
            w, bias, left, start, target, n_columns, width, w_stride, before, after, BJ, BH, CAPPED, HAS_BIAS,
            x.dtype.element_ty,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(tl.where(counted, z, float("-inf")), 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        e = tl.where(counted, tl.exp2((z - base) * LOG2E), 0.0)
        shrink = tl.where(top == float("-inf"), 0.0, tl.exp2((top - base) * LOG2E))
        if EXTRAS:
            moved = tl.where(top == float("-inf"), 0.0, top - base)
            mean = (mean + moved * total) * shrink + tl.sum(tl.where(e == 0.0, 0.0, e * (z - base)), 0)
            squares = squares * shrink * shrink + tl.sum(e * e, 0)
            columns = start + tl.arange(0, BJ)
            z_sum += tl.sum(tl.where(columns < n_columns, z, 0.0), 0).to(tl.float64)
        total = total * shrink + tl.sum(e, 0)
        top = new
    at_target = tl.load(target_logits + row).to(tl.float64)
    rest = tl.log(total.to(tl.float64)) + top.to(tl.float64)
    logp = tl.where(at_target == float("inf"), float("nan"), logp_of(at_target, rest))
    logp = tl.where(at_target == float("-inf"), tl.where(rest == float("-inf"), float("nan"), at_target), logp)
    lse = tl.where(at_target == float("-inf"), rest, at_target - logp)
    k = lse.to(tl.float32)
    one = tl.arange(0, 1)
    tl.store(logps + row + one, logp.to(tl.float32))
    tl.store(state + 2 * row + one, lse)
    tl.store(state + 2 * row + 1 + one, k.to(tl.float64))
    if EXTRAS:
        p, base = tl.exp(logp), top.to(tl.float64)
        share = tl.exp(base - lse)
        h = tl.where(p > 0, -p * logp, 0.0) - share * (mean.to(tl.float64) + (base - lse) * total.to(tl.float64))
        tl.store(entropy + row + one, h.to(tl.float32))
        tl.store(log_sum_sq + row + one, tl.log(p * p + squares.to(tl.float64) * share * share).to(tl.float32))
        tl.store(mean_logits + row + one, (z_sum / n_columns).to(tl.float32))
    if (STORE or DIRECTION) and row < kept_rows:
        gathered = tl.zeros([BH], tl.float32)
        for start in range(0, n_columns, BJ):
            z, slope, right, counted = few_logits(
                w, bias, left, start, target, n_columns, width, w_stride, before, after, BJ, BH, CAPPED, HAS_BIAS,
                x.dtype.element_ty,
            )  # fmt: skip
            s = tl.where(counted, tl.exp2((z - k) * LOG2E - SHIFT_BITS) * slope, 0.0)
            columns = start + tl.arange(0, BJ)
            if STORE:
                to = stash + row * stash_stride + columns
                tl.store(to, s.to(stash.dtype.element_ty), columns < tl.minimum(stash_columns, n_columns))
            if DIRECTION:
                gathered += tl.sum(s[:, None] * right, 0)
        if DIRECTION:
            tl.store(direction + row * width + hidden, gathered, hidden < width)


@triton.jit
def few_logits(
    w, bias, left, start, target, n_columns, width, w_stride, before, after,
    BJ: tl.constexpr, BH: tl.constexpr, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Logits [BJ] of one row, their slopes, the rows of w behind them, and which count."""
    columns = (start + tl.arange(0, BJ)).to(tl.int64)
    hidden = tl.arange(0, BH)
    inside = columns < n_columns
    at = w + columns[:, None] * w_stride + hidden[None, :]
    right = tl.load(at, inside[:, None] & (hidden[None, :] < width), other=0.0).to(DTYPE).to(tl.float32)
    a = tl.sum(right * left[None, :], 1)
    if HAS_BIAS:
        a += tl.load(bias + columns, inside, other=0.0).to(tl.float32)
    z, slope = transform(a, before, after, CAPPED)
    return z, slope, right, inside & (columns != target)
