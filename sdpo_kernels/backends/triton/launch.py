"""From tensors to launches: the leaves of the walk in `backend.py`, one function a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.testing
from torch import Tensor

from sdpo_kernels.backends import redone
from sdpo_kernels.backends.base import HeadCall
from sdpo_kernels.backends.triton import kernels, persistent
from sdpo_kernels.backends.triton.redo import redo_kernel
from sdpo_kernels.backends.triton.tiles import (
    PERSISTENT_COLUMNS,
    Tile,
    candidates,
    fastest,
    is_autotuned,
    tile_for,
)

ROWS_AT_ONCE = 128  # of the kernels that work on [N] alone
TILES_AT_ONCE = 16  # whose sums finalize reads together
REDO_ELEMENTS = 16384  # of w that a program of the redo kernel holds
COMPILED = {"enable_fp_fusion": True}  # Triton 3.9 has no fused multiply-add unless it is asked for
ASSERTING = COMPILED | {"debug": True, "sanitize_overflow": False}  # without "debug", device_assert is nothing


@dataclass
class Rows:
    """A call's rows, as the kernels take them."""

    call: HeadCall
    x: Tensor  # [N, H] in the call's dtype, unit stride; the reference's rows, if any, follow the call's own
    weight: Tensor  # [V, H] of unit stride, in its own dtype
    bias: Tensor | None  # [V] of unit stride
    targets: Tensor  # [N] int64
    target_logits: Tensor  # [N] float64: z_y, and but for rounding k of the first pass
    tile: Tile

    is_slice: bool = False  # the targets' logits were given
    persistent: bool = False  # whole tiles go to QuACK's kernel

    @classmethod
    def of(cls, call: HeadCall, forward: bool, target_logits: Tensor | None = None) -> Rows:
        """Prepare the operands, choose the tile and, for a forward, compute the targets' logits if not given."""
        # the reference's rows are more rows of the same products
        x, targets = call.hidden.to(call.dtype), call.targets
        if call.ref_hidden is not None:
            x, targets = torch.cat([x, call.ref_hidden.to(call.dtype)]), targets.repeat(2)
        x = x if x.stride(1) == 1 else x.contiguous()
        weight, bias = unit_stride(call.weight), None if call.bias is None else call.bias.contiguous()
        index = None if call.index is None else call.index.contiguous()

        # softcap's tanh and the extras need registers, so their tiles are smaller
        tile = tile_for(x.device, x.dtype, call.head.softcap is not None, bool(call.outputs))
        given = target_logits is not None
        found = x.new_empty(x.shape[0], dtype=torch.float64) if target_logits is None else target_logits.double()
        by_quack = persistent.serves(call, x, weight)
        rows = cls(call, x, weight, bias, targets.contiguous(), found, tile, given, by_quack)

        before, by, capped = head_numbers(call)
        if forward and not given and x.shape[0]:
            kernels.target_logits_kernel[(x.shape[0],)](
                x, weight, bias, rows.targets, index, rows.target_logits,
                call.hidden.shape[0], weight.shape[0], x.shape[1], x.stride(0), weight.stride(0), before, by,
                BLOCK=max(16, min(1024, triton.next_power_of_2(x.shape[1]))), CAPPED=capped, HAS_BIAS=bias is not None,
                SLICE=call.is_slice, **ASSERTING,
            )  # fmt: skip

        if x.shape[0] and is_autotuned() and x.dtype == torch.bfloat16 and not by_quack:
            rows.tile = rows.fastest_tile()
        return rows

    @property
    def columns(self) -> int:
        """Columns of a tile of the walk: a row of `Sums.sums` has the sums of one."""
        return PERSISTENT_COLUMNS if self.persistent else self.tile.columns

    def fastest_tile(self) -> Tile:
        """The fastest tile for a forward of about this shape, kept for this process."""
        call, weight = self.call, self.weight
        # 2**24 weights are enough to time a tile, and cast quickly
        some = weight[: min(weight.shape[0], 2**24 // max(1, weight.shape[1]))].to(call.dtype)

        def run(tile: Tile) -> None:
            trial = replace(self, tile=tile)
            tiles = triton.cdiv(some.shape[0], tile.columns)
            logits(trial, some, 0, self.target_logits, Sums.of(trial, tiles, tiles), None)

        rows = triton.next_power_of_2(self.x.shape[0])  # batch sizes vary a little; similar ones share a tile
        key = (self.x.device, rows, *weight.shape, call.head, call.outputs)
        return fastest(key, candidates(self.tile), run, triton.testing.do_bench)


def unit_stride(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy with contiguous rows."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def head_numbers(call: HeadCall) -> tuple[float, float, bool]:
    """The factor of a before tanh, that of what comes out in units of ln 2, and whether there is a tanh at all."""
    head = call.head
    if head.softcap is None:
        return 1.0, head.logit_scale / head.temperature / math.log(2), False
    return head.logit_scale / head.softcap, head.softcap / head.temperature / math.log(2), True


@dataclass
class Sums:
    """What the tiles of a walk sum up for each row, read by `finalize`."""

    sums: Tensor  # [tiles, N] Σ E
    parts: Tensor | None  # [tiles of a chunk, 4, N] for the extras: see kernels.PARTS
    folded: Tensor | None  # [4, N] float64: three sums and a maximum over the parts of all chunks so far
    gemm_target: Tensor | None  # [N] the target's logit as the tiles computed it
    by_tile: Tensor | None = None  # [tiles · pieces, N] Σ E for `grad_tol`, of `part_columns` each
    part_columns: int = 0

    @classmethod
    def of(cls, rows: Rows, n_tiles: int, in_chunk: int, by_tile: bool = False) -> Sums:
        """Buffers for all tiles of a walk, at most `in_chunk` of them in one chunk."""
        n, tile = rows.x.shape[0], rows.tile
        sums = rows.x.new_empty((n_tiles, n), dtype=torch.float32)
        part = min(kernels.PART.value, tile.columns // tile.pieces) if by_tile else 0
        parts = sums.new_empty((n_tiles * tile.columns // part, n)) if by_tile else None
        if not rows.call.outputs:
            return cls(sums, None, None, None, parts, part)
        folded = sums.new_zeros((4, n), dtype=torch.float64)
        folded[3] = -torch.inf
        # a slice's tiles write it for the targets that it has
        return cls(sums, sums.new_empty((in_chunk, 4, n)), folded, sums.new_zeros(n), parts, part)

    def fold(self, n_tiles: int) -> None:
        """Add up the parts of a chunk's tiles: three sums and a maximum."""
        if self.parts is not None and self.folded is not None:
            parts = self.parts[:n_tiles]
            self.folded[:3] += parts[:, :3].sum(0, dtype=torch.float64)
            torch.maximum(self.folded[3], parts[:, 3].amax(0).double(), out=self.folded[3])

    def is_top1(self) -> Tensor | None:
        """[N] bool: no other column's logit is above the target's; None without extras."""
        if self.gemm_target is None or self.folded is None:
            return None
        _, _, _, max_rest = self.folded
        return self.gemm_target >= max_rest


def logits(
    rows: Rows, weight: Tensor, start: int, shift: Tensor, sums: Sums | None, stash: Tensor | None, stash_start: int = 0
) -> None:
    """Tiles of the columns with the rows `weight` of W, from column `start` on; S goes to `stash` at `stash_start`."""
    whole = persistent.whole_tiles(weight.shape[0]) if rows.persistent else 0
    if whole:
        persistent_logits(rows, weight[:whole], start, shift, sums, stash, stash_start)
    if whole < weight.shape[0]:
        triton_logits(rows, weight[whole:], start + whole, shift, sums, stash, stash_start + whole)


def persistent_logits(
    rows: Rows, weight: Tensor, start: int, shift: Tensor, sums: Sums | None, stash: Tensor | None, stash_start: int
) -> None:
    """`logits` by QuACK's kernel, of whole tiles."""
    n_rows, n_columns = rows.x.shape[0], weight.shape[0]
    if n_rows == 0:
        return

    # each begins at 16 bytes
    c, targets = (rows.x.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    kernels.float_rows_kernel[(triton.cdiv(n_rows, ROWS_AT_ONCE),)](
        rows.targets, shift, c, targets, n_rows, start, BLOCK=ROWS_AT_ONCE, **COMPILED
    )

    _, by, _ = head_numbers(rows.call)
    tile = start // rows.columns
    here = None if sums is None else sums.sums[tile : tile + n_columns // rows.columns]
    s = stash[:, stash_start:] if stash is not None and stash_start < stash.shape[1] else None
    persistent.logits(rows.x, weight, by, c, targets, here, s)


def triton_logits(
    rows: Rows, weight: Tensor, start: int, shift: Tensor, sums: Sums | None, stash: Tensor | None, stash_start: int
) -> None:
    """`logits` by Triton's kernel."""
    call, tile = rows.call, rows.tile
    n_rows, n_columns = rows.x.shape[0], weight.shape[0]
    if n_rows == 0:
        return

    before, by, capped = head_numbers(call)
    bias = None if rows.bias is None else rows.bias[start : start + n_columns]
    grid = (triton.cdiv(n_rows, tile.rows) * triton.cdiv(n_columns, tile.columns),)
    left, right, out, described = operands(rows.x, weight, stash, tile)

    kernels.logits_kernel[grid](
        left, right, bias, rows.targets, shift,
        None if sums is None else sums.sums, None if sums is None else sums.parts,
        None if sums is None else sums.by_tile, None if sums is None else sums.gemm_target, out,
        n_rows, n_columns, rows.x.shape[1], rows.x.stride(0), weight.stride(0),
        *(stash.shape if stash is not None else (0, 0)), 0 if stash is None else stash.stride(0), stash_start,
        start, start // rows.columns,
        before, by,
        BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=tile.group, CAPPED=capped, HAS_BIAS=bias is not None,
        SUMS=sums is not None, EXTRAS=sums is not None and sums.parts is not None, STORE=stash is not None,
        DESCRIPTORS=described, PIECES=tile.pieces, UPCAST=not rows.x.is_cuda, num_warps=tile.warps,
        num_stages=tile.stages, **COMPILED,
    )  # fmt: skip

    # the next chunk writes over the parts
    if sums is not None:
        sums.fold(triton.cdiv(n_columns, tile.columns))


def operands(x: Tensor, weight: Tensor, stash: Tensor | None, tile: Tile) -> tuple[object, object, object, bool]:
    """Tensor descriptors if the tile uses them (Hopper and later) and the strides allow it; else pointers."""
    aligned = all(persistent.is_aligned(matrix) for matrix in (x, weight, stash) if matrix is not None)
    if not (tile.descriptors and aligned):
        return x, weight, stash, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    def described(t: Tensor, rows: int, columns: int) -> object:
        return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])

    left, right = described(x, tile.rows, tile.depth), described(weight, tile.columns, tile.depth)
    return left, right, None if stash is None else described(stash, tile.rows, tile.columns // tile.pieces), True


@dataclass
class Finished:
    """[N] each; `state` [N, 2] float64 holds logsumexp and k.

    Of a slice o and k, and the extras are mean_log_prob, sum_sq_probs and sum_logits of base.SliceForward, in float64.
    """

    logps: Tensor
    state: Tensor
    redo: Tensor
    entropy: Tensor | None
    log_sum_sq: Tensor | None
    mean_logits: Tensor | None


def finalize(rows: Rows, sums: Sums) -> Finished:
    """Each row's results from the tiles' sums."""
    n = rows.x.shape[0]

    def vector(wanted: bool) -> Tensor | None:
        return rows.x.new_empty(n, dtype=torch.float64 if rows.is_slice else torch.float32) if wanted else None

    extras = sums.parts is not None
    logps = rows.x.new_empty(n, dtype=torch.float32)
    state = rows.x.new_empty((n, 2), dtype=torch.float64)
    out = Finished(
        logps, state, rows.x.new_empty(n, dtype=torch.int8), vector(extras), vector(extras), vector(extras),
    )  # fmt: skip

    # an empty grid cannot be launched
    if n:
        kernels.finalize_kernel[(triton.cdiv(n, ROWS_AT_ONCE),)](
            sums.sums, sums.folded, rows.target_logits, out.logps, out.state, out.entropy, out.log_sum_sq,
            out.mean_logits, out.redo, redone.counter(rows.x).total, n, sums.sums.shape[0], rows.call.weight.shape[0],
            BLOCK=ROWS_AT_ONCE, TILES=TILES_AT_ONCE, EXTRAS=extras, SLICE=rows.is_slice, **COMPILED,
        )  # fmt: skip
    redone.counter(rows.x).look(n)
    return out


def redo(rows: Rows, found: Finished, stash: Tensor | None, direction: Tensor | None) -> None:
    """Recompute rows out of range. Always launched, so that nothing waits for the device; other rows return at once."""
    call = rows.call
    n, width = rows.x.shape
    if n == 0:
        return

    # one program holds a whole row of x and BJ rows of w
    before, by, capped = head_numbers(call)
    bh = max(16, triton.next_power_of_2(width))
    redo_kernel[(n,)](
        found.redo, rows.x, rows.weight, rows.bias, rows.targets, rows.target_logits, found.logps, found.state,
        found.entropy, found.log_sum_sq, found.mean_logits, stash, direction,
        rows.weight.shape[0], width, rows.x.stride(0), rows.weight.stride(0), call.hidden.shape[0],
        0 if stash is None else stash.shape[1], 0 if stash is None else stash.stride(0), before, by,
        BJ=max(1, min(64, REDO_ELEMENTS // bh)), BH=bh, CAPPED=capped, HAS_BIAS=rows.bias is not None,
        EXTRAS=found.entropy is not None, STORE=stash is not None, DIRECTION=direction is not None,
        SLICE=rows.is_slice, num_warps=8,
        **COMPILED,
    )  # fmt: skip
