"""The logits kernel on QuACK's persistent matrix product for Hopper; `persistent.py` says when it is used.

QuACK (quack-kernels, CuTe) brings the product: one warp that loads by TMA, each tile of w for two blocks at once, and
two groups of four warps that take turns: while one multiplies its tile, the other is in its epilogue, which so costs
the matrix units nothing. The epilogue is here, made of QuACK's parts: E = 2**(a·by − c) of each product a, 0 at a row's
target, the rows' sums over the tile, and S = E by TMA. The arithmetic is that of `kernels.epilogue` without softcap.

Importing this file imports QuACK. A kernel is compiled at its first use, in seconds; QuACK keeps it on disk.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cutlass
from cutlass import BFloat16, Boolean, Float32, const_expr, cute
from quack import layout_utils
from quack.cache import jit_cache
from quack.compile_utils import make_fake_tensor
from quack.cute_dsl_utils import mlir_namedtuple
from quack.epilogue.mixin import ComposableEpiMixin
from quack.epilogue.ops import ColVecLoad, ColVecReduce, Scalar
from quack.gemm_sm90 import GemmSm90
from quack.gemm_tvm_ffi_utils import compile_gemm_kernel, make_fake_scheduler_args
from quack.rounding import RoundingMode

from sdpo_kernels.backends.triton.tiles import HOPPER, PERSISTENT_CLUSTER, PERSISTENT_COLUMNS, PERSISTENT_ROWS

ALIGNED = 8  # bfloat16 numbers of 16 bytes: TMA's rows begin at multiples of them


class Targets(ColVecLoad):
    """Each row's target, a column as float32, and where the thread's elements are."""

    @cute.jit
    def begin(self, gemm: Any, param: Any, smem_tensor: Any, ctx: Any) -> Any:
        """Once a tile: also the places of its elements, its first column, and room for `drop_targets`."""
        state = ColVecLoad.begin(self, gemm, param, smem_tensor, ctx)
        places = ctx.partition_for_epilogue_fn(cute.make_identity_tensor((ctx.tile_M, ctx.tile_N)))
        here = cute.make_rmem_tensor(1, Boolean)
        return [*state, places, ctx.tile_coord_mnkl[1] * ctx.tile_N, here]

    @cute.jit
    def begin_loop(self, gemm: Any, state: Any, epi_coord: Any) -> Any:
        """The same of one piece of the tile."""
        targets = ColVecLoad.begin_loop(self, gemm, state[:2], epi_coord)
        places = state[2][None, None, None, epi_coord[0], epi_coord[1]]
        return targets, places, state[3], state[4], epi_coord[1] == 0


class LogitsEpilogue(ComposableEpiMixin):
    """What happens to a tile of products, piece by piece, before it leaves the registers."""

    _epi_ops = (Scalar("by"), ColVecLoad("shift"), Targets("targets"), ColVecReduce("sums"))

    @mlir_namedtuple
    class EpilogueArguments(NamedTuple):
        by: Any  # the factor of a, in units of ln 2
        shift: Any  # [N] float32: c
        targets: Any  # [N] float32: the target's column, relative to the first one of this launch
        sums: Any = None  # [N, tiles] float32: Σ E; its rows lie next to each other

    def epi_to_underlying_arguments(self, args: Any, **_: Any) -> Any:
        """Asked for by QuACK."""
        self.rounding_mode = RoundingMode.RN
        return self.EpilogueParams(**self._epi_ops_to_params_dict(args))

    @cute.jit
    def epi_visit_subtile(self, params: Any, epi_loop_tensors: Any, tRS_rD: Any, tRS_rC: Any = None) -> Any:
        """E in place of the products `tRS_rD`, and its part of the sums; what is left in `tRS_rD` is stored."""
        by, shift = epi_loop_tensors["by"], epi_loop_tensors["shift"]
        for i in cutlass.range(cute.size(tRS_rD), unroll_full=True):
            tRS_rD[i] = cute.math.exp2(tRS_rD[i] * by - shift[i], fastmath=True)
        self.drop_targets(tRS_rD, *epi_loop_tensors["targets"])

        if const_expr("sums" in epi_loop_tensors):
            sums = epi_loop_tensors["sums"]
            for i in cutlass.range(cute.size(tRS_rD), unroll_full=True):
                sums[i] += tRS_rD[i]
        return ()

    @cute.jit
    def drop_targets(self, e: Any, targets: Any, places: Any, first_column: Any, here: Any, is_first: Any) -> None:
        """0 at each row's target; the comparisons are skipped by threads whose rows have no target in the tile."""
        # the pieces of some rows come one after another, and the first of them looks for their targets
        assert not self.epi_m_major
        tile = self.cta_tile_shape_mnk[:2]
        first = Float32(places[0][1] + first_column)
        if const_expr(is_first):
            found = Boolean(False)
            rows = layout_utils.convert_layout_zero_stride(targets, targets.layout)
            for row in cutlass.range_constexpr(cute.size(rows, mode=[0])):
                away = rows[row, 0] - first
                found = found | ((away >= 0.0) & (away < float(tile[1])))
            here[0] = found

        # columns of the elements, relative to the first: numbers known when this is compiled
        columns = cute.composition(cute.make_layout(tile, stride=(0, 1)), places.layout)
        if here[0]:
            for i in cutlass.range_constexpr(cute.size(e)):
                is_target = targets[i] - first == float(cute.crd2idx(i, columns))
                e[i] = Float32(cutlass.select_(is_target, Float32(0.0), e[i]))


class LogitsSm90(LogitsEpilogue, GemmSm90):
    """QuACK's product for Hopper with this epilogue."""


@cache
def kernel(has_sums: bool, stores: bool) -> Any:
    """The compiled kernel, from QuACK's cache if it is there; called as `persistent.logits` does."""
    return compiled(hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), has_sums, stores)


@jit_cache
def compiled(digest: str, has_sums: bool, stores: bool) -> Any:
    """The kernel for any N, H and C; needs no GPU. `digest` tells QuACK's cache of changes in this file."""
    n_rows, width, n_columns = cute.sym_int(), cute.sym_int(), cute.sym_int()
    x = make_fake_tensor(BFloat16, (n_rows, width), ALIGNED)
    weight = make_fake_tensor(BFloat16, (n_columns, width), ALIGNED)
    # fewer rows than x where those of a reference follow, fewer columns than w where the stash ends
    s = make_fake_tensor(BFloat16, (cute.sym_int(), cute.sym_int()), ALIGNED) if stores else None
    sums = make_fake_tensor(Float32, (n_rows, cute.sym_int()), leading_dim=0) if has_sums else None
    shift, targets = (make_fake_tensor(Float32, (n_rows,), divisibility=4) for _ in range(2))

    return compile_gemm_kernel(
        LogitsSm90, BFloat16, (PERSISTENT_ROWS, PERSISTENT_COLUMNS), (PERSISTENT_CLUSTER, 1, 1),
        pingpong=True, persistent=True, gather_A=False, is_dynamic_persistent=False, device_capacity=HOPPER,
        mA=x, mB=weight, mD=s, mC=None, epi_args=LogitsEpilogue.EpilogueArguments(Float32(0), shift, targets, sums),
        scheduler_args=make_fake_scheduler_args(False, False, None), varlen_args=None,
    )  # fmt: skip
