"""The Triton kernels: target logits, tiles of logits with their epilogue, finalising rows; redo.py has one more.

The arithmetic is exp-direct (docs/architecture.md), with y a row's target column and z its logits. A logit is
z = u·s·ln 2 with u = x·w + b, or its tanh under softcap, and s = scale·log2(e) in float32:

    1. z_y, by a dot product of its own, in float64                                 target_logits_kernel
    2. c = z_y·log2(e) + 58 in float32, and k = (c − 58)·ln 2 exactly; then with one fused multiply-add
       E_j = 2**(u_j·s − c) = 2**-58 · exp(z_j − k) (2⁻⁵⁸), for every column but the target's;
       S_j = E_j · slope; a tile stores S and its rows' sums of E                   logits_kernel
    3. o = Σ E over all tiles, logp = -log1p(2**58 · o · exp(k − z_y)), logsumexp, extras   finalize_kernel
    4. rows whose o is above LARGEST_SUM again, with k = their logsumexp            redo.py
    5. S_y = 0: the target's own term is added outside of S, in float32             targets.py

No maximum is needed for rows in range, so one pass over the products is enough, and 1 − p comes from o without
cancellation. z_y has the same rounded s as every other logit, so s costs a factor of 1 ± 6e-8 of the temperature and
nothing else. `launch.py` calls these. Row and column offsets are int64. Only tests set `UPCAST`: the interpreter's dot
multiplies the bit patterns of bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SHIFT_BITS = tl.constexpr(58.0)
SHIFT = tl.constexpr(40.202536192073015)  # 58 · ln 2 = 58 * log(2)
LARGEST_SUM = tl.constexpr(1e20)  # above it (log-prob below about −86) a row is recomputed with k = logsumexp
PART = tl.constexpr(64)  # most columns whose sums `grad_tol` asks for
# for the extras: Σ E·(z − k), 2**58 · Σ E² (2⁵⁸), Σ z, max z without the target
PARTS = tl.constexpr(4)
HALF_SHIFT = tl.constexpr(536870912.0)  # 2**29


@triton.jit
def tanh_and_slope(u):
    """tanh(u) and 1 − tanh(u)**2, neither by a difference of near numbers; the interpreter has no libdevice."""
    # tanh|u| = 1 − 2q/(1 + q); that cancels near u = 0: a Taylor series there
    q = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
    inverse = tl.rsqrt((1.0 + q) * (1.0 + q))
    part = q * inverse
    far = 1.0 - 2.0 * part
    square = u * u
    near = 1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315 - square * (62.0 / 2835))))
    tanh = tl.where(square < 0.0625, u * near, tl.where(u < 0, -far, far))
    return tanh, 4.0 * part * inverse


@triton.jit
def transform(a, before, CAPPED: tl.constexpr):
    """u of a = x·w + b, whose logit is u times a number: tanh(a·before) and its slope, or a itself and 1."""
    if CAPPED:
        return tanh_and_slope(a * before)
    return a, tl.full(a.shape, 1.0, tl.float32)


@triton.jit
def shift_of(k):
    """c of k [N] float64: k·log2(e) + 58, rounded so that float32 has both c and c − 58."""
    c = (k * LOG2E + SHIFT_BITS).to(tl.float32)
    return (c - SHIFT_BITS) + SHIFT_BITS


@triton.jit
def k_of(c):
    """The k, in float64, that the E of a tile with `c` have."""
    return (c.to(tl.float64) - SHIFT_BITS) * LN2


@triton.jit(do_not_specialize=["n_indexed", "n_columns"])
def target_logits_kernel(
    x, w, bias, targets, index, target_logits,  # [N, H], [V, H], [V], [N] and [M] int64 → [N] float64
    n_indexed, n_columns, width, x_stride, w_stride, before, by,
    BLOCK: tl.constexpr, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """z_y of one row per program, by a dot product in float32, in which bfloat16 products are exact.

    Of a slice 0 where the target is -1, a column of another slice. Asserts that targets are in range, and that `index`,
    the place in the batch of each of the first M rows, ascends.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if index is not None:
        follows = (row > 0) & (row < n_indexed)
        before_it = tl.load(index + row - 1, follows, other=-1)
        tl.device_assert(tl.load(index + row, follows, other=0) > before_it, "rows: its index must be ascending")
    tl.device_assert((target >= (-1 if SLICE else 0)) & (target < n_columns), "targets: must be in [0, V) or -100")
    one = tl.arange(0, 1)
    if target < 0:
        tl.store(target_logits + row + one, tl.zeros([1], tl.float64))
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

    a = tl.sum(total, 0) + tl.zeros([1], tl.float32)
    if HAS_BIAS:
        a += tl.load(bias + target).to(tl.float32)
    u, _ = transform(a, before, CAPPED)
    tl.store(target_logits + row + one, u.to(tl.float64) * tl.cast(by, tl.float64) * LN2)


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
def halves(tile):
    """The left and right half of a tile's columns; on Hopper none of it goes through shared memory."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def epilogue(
    acc, sums, by_part, stash,  # [BM, BC] products of a piece of the tile, 6 × [BM] what the pieces before it summed up
    bias, row_start, column_start, targets, c, plain, n_columns,  # targets [BM] int32 relative to column_start
    n_rows, first_column, stash_rows, stash_columns, stash_stride, stash_start, before, by,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, EXTRAS: tl.constexpr, STORE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """S of a piece, stored up to the stash's last row and column; returns Σ E and for the extras the PARTS and z_y.

    With `by_part` Σ E of every PART columns, or of the piece if it has fewer, is stored, too.
    """
    BM: tl.constexpr = acc.shape[0]
    BC: tl.constexpr = acc.shape[1]
    columns = tl.arange(0, BC)
    if HAS_BIAS:
        acc += tl.load(bias + column_start + columns, column_start + columns < n_columns, other=0.0).to(tl.float32)[
            None
        ]
    u, slope = transform(acc, before, CAPPED)

    # `plain`: no row's target is here, and no padding
    t = tl.fma(u, by, -c[:, None])
    e = tl.exp2(t)
    counted = (column_start + columns < n_columns)[None, :] & (columns[None, :] != targets[:, None])
    if not plain:
        e = tl.where(counted, e, 0.0)

    o, mean, squares, total, top, found = sums
    of_piece = tl.sum(e, 1)
    o += of_piece
    if by_part is not None:
        below = row_start + tl.arange(0, BM)
        to = by_part + ((first_column + column_start) // (BC if BC < PART else PART)).to(tl.int64) * n_rows + below
        if BC <= PART:
            tl.store(to, of_piece, below < n_rows)
        else:
            parts = tl.sum(tl.reshape(e, [BM, BC // PART, PART]), 2)
            at = tl.arange(0, BC // PART).to(tl.int64)[None, :] * n_rows
            tl.store(to[:, None] + at, parts, (below < n_rows)[:, None])
    if EXTRAS:
        # where E is 0 the exponent may be −inf, and 0 · (−inf) is NaN
        mean += tl.sum(e * tl.maximum(t + SHIFT_BITS, -1e30), 1)
        half = e * HALF_SHIFT
        squares += tl.sum(half * half, 1)
        total += tl.sum(u, 1)
        z = u * by
        if not plain:
            found += tl.sum(tl.where(columns[None, :] == targets[:, None], z, 0.0), 1)
            z = tl.where(counted, z, float("-inf"))
        top = tl.maximum(top, tl.max(z, 1))

    # offsets inside of a piece fit int32
    stored = stash_columns - stash_start - column_start
    if STORE and stored > 0:
        value = (e * slope).to(stash.dtype if DESCRIPTORS else stash.dtype.element_ty)
        if DESCRIPTORS:
            stash.store([row_start, stash_start + column_start], value)
        else:
            corner = stash + row_start.to(tl.int64) * stash_stride + stash_start + column_start
            rows = tl.arange(0, BM)
            there = (row_start + rows < stash_rows)[:, None] & (columns < stored)[None, :]
            tl.store(corner + rows[:, None] * stash_stride + columns[None, :], value, there)
    return o, mean, squares, total, top, found


# otherwise every kind of batch size is compiled separately
@triton.jit(do_not_specialize=["n_rows", "n_columns", "stash_rows", "first_column", "first_tile"])
def logits_kernel(
    x, w, bias, targets, shift,  # [N, H], [C, H], [C], [N] int64, [N] float64: k
    sums, parts, by_part, gemm_target, stash,  # [tiles of all chunks, N], [tiles of this one, 4, N], of PART columns
    # as `sums`, [N], [N, stash_stride]
    n_rows, n_columns, width, x_stride, w_stride, stash_rows, stash_columns, stash_stride, stash_start, first_column,
    first_tile, before, by,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr, SUMS: tl.constexpr, EXTRAS: tl.constexpr, STORE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PIECES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of logits of a chunk of C columns: its row sums of E, what the extras need, and S."""
    row_tile, column_tile = tile_of(tl.program_id(0), n_rows, n_columns, BM, BN, GROUP)
    acc = products(
        x, w, row_tile * BM, column_tile * BN, n_rows, n_columns, width, x_stride, w_stride,
        BM, BN, BK, DESCRIPTORS, UPCAST,
    )  # fmt: skip

    # the target's place in this tile, if it is here; most tiles have no row's target and no padding
    rows = row_tile * BM + tl.arange(0, BM)
    there, column = rows < n_rows, column_tile * BN
    target = (tl.load(targets + rows, there, other=-1) - first_column - column).to(tl.int32)
    c = shift_of(tl.load(shift + rows, there, other=0.0))
    here = (target >= 0) & (target < BN)
    plain = (tl.max(here.to(tl.int32), 0) == 0) & (column + BN <= n_columns)

    # a heavy epilogue goes by pieces of the tile, so that its registers hold only one piece's values
    none = tl.zeros([BM], tl.float32)
    found = (none, none, none, none, none + float("-inf"), none)
    pieces = (acc,)
    if PIECES > 1:
        pieces = halves(acc)
    if PIECES > 2:
        pieces = halves(pieces[0]) + halves(pieces[1])  # type: ignore[misc]
    if PIECES > 4:
        pieces = halves(pieces[0]) + halves(pieces[1]) + halves(pieces[2]) + halves(pieces[3])  # type: ignore[misc]
    for piece in tl.static_range(PIECES):
        at = piece * (BN // PIECES)
        found = epilogue(
            pieces[piece], found, by_part, stash, bias, row_tile * BM, column + at, target - at, c, plain, n_columns,
            n_rows, first_column, stash_rows, stash_columns, stash_stride, stash_start, before, by,
            CAPPED, HAS_BIAS, EXTRAS, STORE, DESCRIPTORS,
        )  # fmt: skip

    o, mean, squares, total, top, at_target = found
    if SUMS:
        tl.store(sums + (first_tile + column_tile).to(tl.int64) * n_rows + rows, o, there)
    if EXTRAS:
        to = parts + column_tile.to(tl.int64) * PARTS * n_rows + rows
        tl.store(to, mean * LN2, there)
        tl.store(to + n_rows, squares, there)
        tl.store(to + 2 * n_rows, total * (by * LN2), there)
        tl.store(to + 3 * n_rows, top * LN2, there)
        tl.store(gemm_target + rows, at_target * LN2, there & here)


# otherwise every kind of batch size is compiled separately
@triton.jit(do_not_specialize=["n_rows", "first_column"])
def float_rows_kernel(
    targets, shift,  # [N] int64, [N] float64: k
    c, relative,  # [N] float32 each
    n_rows, first_column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the persistent kernel takes of each row: c, and the target relative to the first column of its launch."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < n_rows
    tl.store(c + rows, shift_of(tl.load(shift + rows, there, other=0.0)), there)
    tl.store(relative + rows, (tl.load(targets + rows, there, other=0) - first_column).to(tl.float32), there)


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
    sums, parts, target_logits,  # [tiles, N], [4, N] float64, [N] float64
    logps, state, entropy, log_sum_sq, mean_logits, redo, redone,  # [N], [N, 2], [N] each, [N] int8, [1] int64
    n_rows, n_tiles, n_columns,
    BLOCK: tl.constexpr, TILES: tl.constexpr, EXTRAS: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Each row's results, in float64: log-prob, logsumexp and k, the extras; and which rows are out of range.

    A slice answers o and k instead, and the fields of base.SliceForward in place of the extras, in float64.

    The target's column is not in o, so with rest = log Σ of the others, logp = -log1p(exp(rest - z_y)) is exact at both
    ends: as p → 1 and as p → 0.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < n_rows
    target = tl.load(target_logits + rows, there, other=0.0)
    k = k_of(shift_of(target))

    # every sum over tiles has a fixed order: no atomics
    o = tl.zeros([BLOCK], tl.float64)
    mean, squares, total = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, n_tiles, TILES):
        tiles = first + tl.arange(0, TILES)
        at = sums + tiles.to(tl.int64)[:, None] * n_rows + rows[None, :]
        o += tl.sum(tl.load(at, (tiles < n_tiles)[:, None] & there[None, :], other=0.0).to(tl.float64), 0)
    if EXTRAS:
        mean = tl.load(parts + rows, there, other=0.0)
        squares = tl.load(parts + n_rows + rows, there, other=0.0)
        total = tl.load(parts + 2 * n_rows + rows, there, other=0.0)

    # o overflowed, or k is no finite number: redo_kernel recomputes the row
    infinite = (tl.abs(k) == float("inf")) | (squares == float("inf"))
    out_of_range = (((o > LARGEST_SUM) | infinite) & there).to(tl.int32)
    tl.store(redo + rows, out_of_range.to(tl.int8), there)
    count = tl.sum(out_of_range, 0)
    if count > 0:
        tl.atomic_add(redone, count.to(tl.int64))  # of integers: the order does not matter

    if SLICE:
        tl.store(state + 2 * rows, o, there)
        tl.store(state + 2 * rows + 1, k, there)
        if EXTRAS:  # q_j = E_j/o
            some = o > 0
            tl.store(entropy + rows, tl.where(some, mean / o - tl.log(o) - SHIFT, 0.0 * o), there)
            tl.store(log_sum_sq + rows, tl.where(some, squares * tl.exp(-SHIFT) / (o * o), 0.0 * o), there)
            tl.store(mean_logits + rows, total, there)
        return

    rest = tl.log(o) + k + SHIFT
    logp = logp_of(target, rest)
    lse = target - logp
    tl.store(logps + rows, logp.to(tl.float32), there)
    tl.store(state + 2 * rows, lse, there)
    tl.store(state + 2 * rows + 1, k, there)

    # the target's own terms are added to those of the rest
    if EXTRAS:
        share = tl.exp(k - lse + SHIFT)  # p_j = share·E_j
        p = tl.exp(logp)
        h = tl.where(p > 0, -p * logp, 0.0) - share * (mean + (k - lse) * o)
        tl.store(entropy + rows, h.to(tl.float32), there)
        square_sum = p * p + squares * tl.exp(2.0 * (k - lse) + SHIFT)
        tl.store(log_sum_sq + rows, tl.log(square_sum).to(tl.float32), there)
        tl.store(mean_logits + rows, (total / n_columns).to(tl.float32), there)
