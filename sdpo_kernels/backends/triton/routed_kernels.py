"""The Triton kernels of a backward that takes the listed rows of each tile; `routed.py` says how they fit together.

`words` [words, N] int64 has a bit for every tile and row, rows in the order of `order` [N]; a tile has 64 columns.
`s` has row i of a chunk's tile t at t·tile_step + i·row_step: the same for the stash and for scratch memory. Only what
is kept is ever written to scratch memory or read from it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo_kernels.backends.triton.kernels import shift_of, transform

TILE = tl.constexpr(64)


@triton.jit(do_not_specialize=["n_rows"])
def counts_kernel(words, counts, n_rows, n_words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """How many tiles each row keeps [N] int32, from its bits [N, n_words]."""
    rows, places = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WORDS)
    at = rows.to(tl.int64)[:, None] * n_words + places[None, :]
    x = tl.load(words + at, (rows < n_rows)[:, None] & (places < n_words)[None, :], other=0)

    # bits of pairs, of fours, of bytes, of the word
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    x = (x + (x >> 32)) & 0x7F
    tl.store(counts + rows, tl.sum(x, 1).to(tl.int32), rows < n_rows)


@triton.jit(do_not_specialize=["n_rows", "first_tile"])
def lists_kernel(
    words, order, lists, counts,  # [words, N], [N] int64 → [tiles, N] int32, [tiles] int32
    n_rows, first_tile,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of one tile per program."""
    tile = tl.program_id(0)
    word_at = words + ((first_tile + tile) // 64).to(tl.int64) * n_rows
    bit, total = (first_tile + tile) % 64, 0
    for start in range(0, n_rows, BLOCK):
        places = start + tl.arange(0, BLOCK)
        there = places < n_rows
        kept = ((tl.load(word_at + places, there, other=0) >> bit) & 1).to(tl.int32)
        to = lists + tile.to(tl.int64) * n_rows + total + tl.cumsum(kept, 0) - kept
        tl.store(to, tl.load(order + places, there, other=0).to(tl.int32), kept != 0)
        total += tl.sum(kept, 0)
    tl.store(counts + tile, total)


@triton.jit
def either(a, b):
    """The bits of both."""
    return a | b


@triton.jit(do_not_specialize=["n_rows", "first_tile", "n_tiles", "span"])
def unions_kernel(
    words, unions, counts,  # [words, N] → [blocks, SPANS, span] int32, [blocks, SPANS] int32
    n_rows, first_tile, n_tiles, span,
    BM: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """The tiles of a chunk that any of BM rows keeps, relative to the chunk, ascending; a chunk has SPANS spans."""
    block, part = tl.program_id(0), tl.program_id(1)
    rows = block * BM + tl.arange(0, BM)
    begin = first_tile + part * span
    end, total = tl.minimum(begin + span, first_tile + n_tiles), 0
    to = unions + (block.to(tl.int64) * SPANS + part) * span
    for word in range(begin // 64, tl.cdiv(end, 64)):
        bits = tl.reduce(tl.load(words + tl.cast(word, tl.int64) * n_rows + rows, rows < n_rows, other=0), 0, either)
        tiles = word * 64 + tl.arange(0, 64)
        kept = (((bits >> tl.arange(0, 64)) & 1) != 0) & (tiles >= begin) & (tiles < end)
        tl.store(to + total + tl.cumsum(kept.to(tl.int32), 0) - 1, tiles - first_tile, kept)
        total += tl.sum(kept.to(tl.int32), 0)
    tl.store(counts + block * SPANS + part, total)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "first_column"])
def kept_logits_kernel(
    x, w, bias, targets, shift, lists, counts, s,  # [N, H], [C, H], [C], [N] int64, [N] float64: k, [tiles, N], [tiles]
    n_rows, n_columns, width, x_stride, w_stride, first_column, before, by,
    BM: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, CAPPED: tl.constexpr, HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """S of a tile's listed rows, BM at a time; PARTS programs share a tile."""
    tile = tl.program_id(0) // PARTS
    column = tl.arange(0, TILE)
    columns = tile * TILE + column
    inside = columns < n_columns
    count, listed = tl.load(counts + tile), lists + tile.to(tl.int64) * n_rows
    for start in range(tl.program_id(0) % PARTS * BM, count, PARTS * BM):
        places = start + tl.arange(0, BM)
        there = places < count
        rows = tl.load(listed + places, there, other=0).to(tl.int64)
        acc = tl.zeros([BM, TILE], tl.float32)
        for k in range(0, width, BK):
            depth = k + tl.arange(0, BK)
            left = tl.load(x + rows[:, None] * x_stride + depth[None, :], (depth < width)[None, :], other=0.0)
            at = columns.to(tl.int64)[:, None] * w_stride + depth[None, :]
            right = tl.load(w + at, inside[:, None] & (depth < width)[None, :], other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            acc = tl.dot(left, right.T, acc, input_precision="ieee")

        # as in kernels.epilogue
        if HAS_BIAS:
            acc += tl.load(bias + columns, inside, other=0.0).to(tl.float32)[None]
        u, slope = transform(acc, before, CAPPED)
        e = tl.exp2(tl.fma(u, by, -shift_of(tl.load(shift + rows))[:, None]))
        target = (tl.load(targets + rows) - first_column - tile * TILE).to(tl.int32)
        e = tl.where(inside[None, :] & (column[None, :] != target[:, None]), e, 0.0)
        to = s + (tile.to(tl.int64) * n_rows + rows)[:, None] * TILE + column[None, :]
        tl.store(to, (e * slope).to(s.dtype.element_ty), there[:, None])


@triton.jit(do_not_specialize=["n_rows", "n_columns", "first_column"])
def weight_kernel(
    s, scaled_x, x, r, lists, counts,  # S, [N, width] r ⊙ X, [N, width], [N] float32, [tiles, N], [tiles]
    order, first, t, targets,  # of the targets: SortedRows
    dw, db,  # [C, width], [C] float32
    n_rows, n_columns, width, x_stride, dw_stride, first_column, tile_step, row_step,
    BK: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, PIECES: tl.constexpr, HAS_DW: tl.constexpr,
    HAS_DB: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """64 rows of dW, BH columns of them, from their listed rows and the targets' terms; and db without these."""
    across = tl.cdiv(width, BH) if HAS_DW else 1
    tile, h = tl.program_id(0) // across, tl.program_id(0) % across * BH + tl.arange(0, BH)
    column, inside = tl.arange(0, TILE), (h < width)[None, :]
    count, listed = tl.load(counts + tile), lists + tile.to(tl.int64) * n_rows
    acc, of_bias = tl.zeros([TILE, BH], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, count, BK):
        places = start + tl.arange(0, BK)
        there = places < count
        rows = tl.load(listed + places, there, other=0).to(tl.int64)
        at = tile.to(tl.int64) * tile_step + rows[:, None] * row_step + column[None, :]
        left = tl.load(s + at, there[:, None], other=0.0)
        # past the list neither operand may be a row's: 0·NaN is NaN
        if HAS_DB:
            of_bias += tl.sum(left.to(tl.float32) * tl.load(r + rows, there, other=0.0)[:, None], 0)
        if HAS_DW:
            right = tl.load(scaled_x + rows[:, None] * width + h[None, :], there[:, None] & inside, other=0.0)
            if UPCAST:
                left, right = left.to(tl.float32), right.to(tl.float32)
            acc = tl.dot(left.T, right, acc, input_precision="ieee")

    columns = tile * TILE + column
    if HAS_DB:
        tl.store(db + columns, of_bias, columns < n_columns)
    if HAS_DW:
        begin = tl.load(first + first_column + tile * TILE)
        end = tl.load(first + first_column + tl.minimum(tile * TILE + TILE, n_columns))
        for place in range(begin, end, BT):
            places = place + tl.arange(0, BT)
            there = places < end
            rows = tl.load(order + places, there, other=0)
            here = (tl.load(targets + rows) - first_column - tile * TILE)[:, None] == column[None, :]
            rest = tl.where(here, tl.load(t + rows, there, other=0.0)[:, None], 0.0)
            right = tl.load(x + rows[:, None] * x_stride + h[None, :], inside, other=0.0)
            if UPCAST:
                right = right.to(tl.float32)
            # three bfloat16 numbers hold all 24 bits of t
            for _ in tl.static_range(PIECES):
                piece = rest.to(x.dtype.element_ty)
                rest -= piece.to(tl.float32)
                acc = tl.dot((piece.to(tl.float32) if UPCAST else piece).T, right, acc, input_precision="ieee")
        to = dw + columns.to(tl.int64)[:, None] * dw_stride + h[None, :]
        tl.store(to, acc.to(dw.dtype.element_ty), (columns < n_columns)[:, None] & inside)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "first_tile", "span"])
def hidden_kernel(
    s, w, words, order, unions, counts,  # S, [C, width], [words, N], [N], [blocks, SPANS, span], [blocks, SPANS]
    products,  # [SPANS, N, width] float32, to which S·W is added
    n_rows, n_columns, width, w_stride, first_tile, span, tile_step, row_step,
    BM: tl.constexpr, BN: tl.constexpr, SPANS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BM rows, next to each other in `order`, and BN columns of H: the products over the tiles that any of them keeps.

    Where a row does not keep a tile its S counts as 0, so that what it keeps does not depend on its neighbours.
    """
    across = tl.cdiv(width, BN)
    h = tl.program_id(0) % across * BN + tl.arange(0, BN)
    list_ = tl.program_id(0) // across
    places = list_ // SPANS * BM + tl.arange(0, BM)
    there, column = places < n_rows, tl.arange(0, TILE)
    rows = tl.load(order + places, there, other=0)
    count, listed = tl.load(counts + list_), unions + list_.to(tl.int64) * span
    acc = tl.zeros([BM, BN], tl.float32)
    for i in range(count):
        tile = tl.load(listed + i)
        word = tl.load(words + ((first_tile + tile) // 64).to(tl.int64) * n_rows + places, there, other=0)
        kept = ((word >> ((first_tile + tile) % 64)) & 1) != 0
        from_ = s + tile.to(tl.int64) * tile_step + rows[:, None] * row_step + column[None, :]
        left = tl.load(from_, kept[:, None], other=0.0)
        columns = tile * TILE + column
        at = columns.to(tl.int64)[:, None] * w_stride + h[None, :]
        right = tl.load(w + at, (columns < n_columns)[:, None] & (h < width)[None, :], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision="ieee")

    to = products + ((list_ % SPANS).to(tl.int64) * n_rows + rows)[:, None] * width + h[None, :]
    mask = there[:, None] & (h < width)[None, :]
    tl.store(to, tl.load(to, mask, other=0.0) + acc, mask)
