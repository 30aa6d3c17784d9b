"""The Triton kernels: target logits, tiles of logits with their epilogue, finalising rows; redo.py has one more.

The arithmetic is exp-direct (docs/architecture.md), with y a row's target column and z its logits:

    1. k = z_y, by a dot product of its own                                       target_logits_kernel
    2. E_j = 2**-58 · exp(z_j − k) for every column but the target's (2⁻⁵⁸),
       S_j = E_j · c_j with c = dz/da; a tile stores S and its rows' sums of E    logits_kernel
    3. o = Σ E over all tiles, logp = -log1p(2**58 · o), logsumexp, extras        finalize_kernel
    4. rows whose o is above LARGEST_SUM again, with k = their logsumexp          redo.py
    5. S_y = 0: the target's own term is added outside of S, in float32           targets.py

No maximum is needed for rows in range, so one pass over the products is enough, and 1 − p comes from o without
cancellation. `launch.py` calls these. Row and column offsets are int64. Only tests set `UPCAST`: the interpreter's dot
multiplies the bit patterns of bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SHIFT_BITS = tl.constexpr(58.0)
SHIFT = tl.constexpr(40.202536192073015)  # 58 · ln 2 = 58 * log(2)
LARGEST_SUM = tl.constexpr(1e20)  # above it (log-prob below about −86) a row is recomputed with k = logsumexp
PARTS = tl.constexpr(4)  # for the extras: Σ E·(z − k), 2**58 · Σ E² (2⁵⁸), Σ z, max z without the target


@triton.jit
def tanh_and_slope(u):
    """tanh(u) and 1 − tanh(u)**2, neither by a difference of near numbers; the interpreter has no libdevice."""
    # 1 − q cancels near u = 0: a Taylor series there
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
    """z_y of one row per program, by a dot product in float32, in which bfloat16 products are exact.

    0 where the target is -1, a column of another slice.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target < 0:
        tl.store(target_logits + row, 0.0)
        return
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        # w is rounded to x's dtype first, as in the tiles
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
    """The products [BM, BN] of a tile, summed in float32; 0 for rows and columns out of range."""
    # "ieee": no TF32 for float32 operands
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


@triton.jit
def tile_of(program, n_rows, n_columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column tile of a program: GROUP row tiles share their columns of w in the second-level cache."""
    row_tiles, column_tiles = tl.cdiv(n_rows, BM), tl.cdiv(n_columns, BN)
    in_group = GROUP * column_tiles
    first_row_tile = program // in_group * GROUP
    height = tl.minimum(row_tiles - first_row_tile, GROUP)
    return first_row_tile + program % in_group % height, program % in_group // height


@triton.jit
def store_parts(parts, gemm_target, e, z, k, rows, row_there, target, at_target, inside, counted, first_column, n_rows,
                BN: tl.constexpr):  # fmt: skip
    """What the extras need of a tile, for each row: PARTS, and the target's logit if it is in this tile."""
    # where E is 0 the logit may be −inf, and 0 · (−inf) is NaN
    to = parts + rows
    tl.store(to, tl.sum(tl.where(e == 0.0, 0.0, e * (z - k[:, None])), 1), row_there)
    squares = tl.where(counted, tl.exp2(2.0 * (z - k[:, None]) * LOG2E - SHIFT_BITS), 0.0)
    tl.store(to + n_rows, tl.sum(squares, 1), row_there)
    tl.store(to + 2 * n_rows, tl.sum(tl.where(inside[None, :], z, 0.0), 1), row_there)
    tl.store(to + 3 * n_rows, tl.max(tl.where(counted, z, float("-inf")), 1), row_there)
    in_tile = row_there & (target >= first_column) & (target < first_column + BN)
    tl.store(gemm_target + rows, tl.sum(tl.where(at_target, z, 0.0), 1), in_tile)


# otherwise every kind of batch size is compiled separately
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
    row_tile, column_tile = tile_of(tl.program_id(0), n_rows, n_columns, BM, BN, GROUP)
    acc = products(
        x, w, row_tile * BM, column_tile * BN, n_rows, n_columns, width, x_stride, w_stride,
        BM, BN, BK, DESCRIPTORS, UPCAST,
    )  # fmt: skip

    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    row_there, inside = rows < n_rows, columns < n_columns
    if HAS_BIAS:
        acc += tl.load(bias + columns, inside, other=0.0).to(tl.float32)[None, :]
    z, slope = transform(acc, before, after, CAPPED)

    # E, without the target's column and without padding; at_target is compared here because doing it in store_parts,
    # after its stores, makes the compiler spill registers
    target = tl.load(targets + rows, row_there, other=-1)
    k = tl.load(shift + rows, row_there, other=0.0)
    at_target = columns[None, :] == target[:, None]
    counted = inside[None, :] & (columns[None, :] != target[:, None])
    e = tl.where(counted, tl.exp2((z - k[:, None]) * LOG2E - SHIFT_BITS), 0.0)

    if SUMS:
        out = (first_tile + column_tile).to(tl.int64)
        tl.store(sums + out * n_rows + rows, tl.sum(e, 1), row_there)
    if EXTRAS:
        store_parts(
            parts + column_tile.to(tl.int64) * PARTS * n_rows, gemm_target, e, z, k, rows, row_there, target, at_target,
            inside, counted, column_tile * BN, n_rows, BN,
        )  # fmt: skip
    # S, up to the stash's last column
    if STORE:
        to = stash + rows.to(tl.int64)[:, None] * stash_stride + (stash_start + columns)[None, :]
        tl.store(
            to,
            (e * slope).to(stash.dtype.element_ty),
            (rows < stash_rows)[:, None] & ((stash_start + columns)[None, :] < stash_columns),
        )


@triton.jit
def log1p_of(x):
    """log1p(x), x ≥ 0, in float64; Triton has none."""
    return tl.where(x < 1e-5, x * (1.0 - x * (0.5 - x / 3.0)), tl.log(1.0 + x))


@triton.jit
def logp_of(target, rest):
    """-log1p(exp(rest - target)) in float64, without overflow."""
    d = rest - target
    return -log1p_of(tl.exp(tl.minimum(d, -d))) - tl.maximum(d, 0.0)


# otherwise every kind of batch size is compiled separately
@triton.jit(do_not_specialize=["n_rows", "n_tiles", "n_columns"])
def finalize_kernel(
    sums, parts, target_logits,  # [tiles, N], [4, N] float64, [N]
    logps, state, entropy, log_sum_sq, mean_logits, redo,  # [N], [N, 2], [N] each, [N] int8
    n_rows, n_tiles, n_columns,
    BLOCK: tl.constexpr, EXTRAS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Each row's results, in float64: log-prob, logsumexp and k, the extras; and which rows are out of range.

    A slice answers o and k instead, and the fields of base.SliceForward in place of the extras, in float64.

    The target's column is not in o, so with rest = log Σ of the others, logp = -log1p(exp(rest - z_y)) is exact at both
    ends: as p → 1 and as p → 0.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < n_rows
    k = tl.load(target_logits + rows, there, other=0.0)

    # every sum over tiles has a fixed order: no atomics
    o = tl.zeros([BLOCK], tl.float64)
    mean, squares, total = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for tile in range(n_tiles):
        o += tl.load(sums + tl.cast(tile, tl.int64) * n_rows + rows, there, other=0.0).to(tl.float64)
    if EXTRAS:
        mean = tl.load(parts + rows, there, other=0.0)
        squares = tl.load(parts + n_rows + rows, there, other=0.0)
        total = tl.load(parts + 2 * n_rows + rows, there, other=0.0)

    # o overflowed, or k is no finite number: redo_kernel recomputes the row
    target = k.to(tl.float64)
    infinite = (tl.abs(k) == float("inf")) | (squares == float("inf"))
    tl.store(redo + rows, ((o > LARGEST_SUM) | infinite).to(tl.int8), there)

    if SLICE:
        tl.store(state + 2 * rows, o, there)
        tl.store(state + 2 * rows + 1, target, there)
        if EXTRAS:  # q_j = E_j/o
            some = o > 0
            tl.store(entropy + rows, tl.where(some, mean / o - tl.log(o) - SHIFT, 0.0 * o), there)
            tl.store(log_sum_sq + rows, tl.where(some, squares * tl.exp(-SHIFT) / (o * o), 0.0 * o), there)
            tl.store(mean_logits + rows, total, there)
        return

    rest = tl.log(o) + target + SHIFT
    logp = logp_of(target, rest)
    lse = target - logp
    tl.store(logps + rows, logp.to(tl.float32), there)
    tl.store(state + 2 * rows, lse, there)
    tl.store(state + 2 * rows + 1, target, there)

    # the target's own terms are added to those of the rest
    if EXTRAS:
        share = tl.exp(target - lse + SHIFT)  # p_j = share·E_j
        p = tl.exp(logp)
        h = tl.where(p > 0, -p * logp, 0.0) - share * (mean + (target - lse) * o)
        tl.store(entropy + rows, h.to(tl.float32), there)
        square_sum = p * p + squares * tl.exp(2.0 * (target - lse) + SHIFT)
        tl.store(log_sum_sq + rows, tl.log(square_sum).to(tl.float32), there)
        tl.store(mean_logits + rows, (total / n_columns).to(tl.float32), there)
