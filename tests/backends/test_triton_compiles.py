# ruff: noqa: E402
"""Every Triton kernel compiled ahead of time for GPUs, without a GPU: instructions, shared memory, registers."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sdpo_kernels.backends.triton import kernels
from sdpo_kernels.backends.triton.epilogue import ELEMENTS, PAIRS_AT_ONCE, pair_kernel
from sdpo_kernels.backends.triton.gradients import factors_kernel, finish_kernel
from sdpo_kernels.backends.triton.launch import ASSERTING, COMPILED, REDO_ELEMENTS, ROWS_AT_ONCE, TILES_AT_ONCE
from sdpo_kernels.backends.triton.redo import redo_kernel
from sdpo_kernels.backends.triton.targets import BLOCK, add_kernel
from sdpo_kernels.backends.triton.tiles import tiles_of
from tests.backends.machine_code import epilogue_length, is_in_registers, stack_bytes

ARCHITECTURES = (80, 90, 100, 120)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # the limit per block, in bytes
DIVISIBLE = (
    "width",
    "x_stride",
    "w_stride",
    "out_stride",
    "stash_stride",
    "stash_columns",
    "stash_start",
    "tile_step",
    "row_step",
)  # by 16, as launches are


def compiled(
    function: Any, types: dict[str, str], constants: dict[str, Any], arch: int, warps: int, stages: int
) -> Any:
    """The kernel as the launcher would compile it for aligned pointers and sizes."""
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (name in DIVISIBLE and name not in constants)
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    how = ASSERTING if function is kernels.target_logits_kernel else COMPILED
    options = {"num_warps": warps, "num_stages": stages, **how}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def logits_kernel(
    arch: int, dtype: str, capped: bool, bias: bool, sums: bool, extras: bool, store: bool, by_part: bool = False
) -> Any:
    tile = tiles_of(arch // 10, dtype == "bf16", capped, extras)
    matrix = {
        "x": (tile.rows, tile.depth),
        "w": (tile.columns, tile.depth),
        "stash": (tile.rows, tile.columns // tile.pieces),
    }
    types = {
        name: f"tensordesc<{dtype}[{shape[0]}, {shape[1]}]>" if tile.descriptors else f"*{dtype}"
        for name, shape in matrix.items()
    }
    types |= {"bias": f"*{dtype}", "targets": "*i64", "before": "fp32", "by": "fp32"}
    types |= {"shift": "*fp64"} | dict.fromkeys(("sums", "parts", "by_part", "gemm_target"), "*fp32")
    types |= dict.fromkeys(("n_rows", "n_columns", "stash_rows", "first_column", "first_tile", *DIVISIBLE), "i32")
    constants: dict[str, Any] = {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "GROUP": tile.group, "CAPPED": capped,
        "HAS_BIAS": bias, "SUMS": sums, "EXTRAS": extras, "STORE": store, "DESCRIPTORS": tile.descriptors,
        "PIECES": tile.pieces, "UPCAST": False,
    }  # fmt: skip
    absent = [("bias", bias), ("sums", sums), ("parts", extras), ("gemm_target", extras), ("stash", store)]
    absent.append(("by_part", by_part))
    constants |= {name: None for name, there in absent if not there}
    return compiled(kernels.logits_kernel, types, constants, arch, tile.warps, tile.stages)


WAYS = {
    "reference": (False, False, True, False, False),
    "policy": (False, False, True, False, True),
    "bias": (False, True, True, False, True),
    "recompute": (False, False, False, False, True),
    "softcap": (True, True, True, False, True),
    "extras": (False, False, True, True, False),
    "all": (True, True, True, True, True),
}  # capped, bias, sums, extras, store


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_logits_kernel_keeps_to_registers_and_uses_the_matrix_units(arch, dtype, way, tmp_path):
    kernel = logits_kernel(arch, dtype, *WAYS[way])
    ptx = kernel.asm["ptx"]
    assert is_in_registers(kernel, tmp_path)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    if dtype == "bf16":
        assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}[arch] in ptx
        if arch >= 90:
            assert "cp.async.bulk.tensor" in ptx
    # S in 128-bit pieces, or by the copy engine
    if WAYS[way][-1]:
        described = tiles_of(arch // 10, dtype == "bf16", WAYS[way][0], WAYS[way][3]).descriptors
        assert re.search(r"cp\.async\.bulk\.tensor\.\dd\.global" if described else r"st\.global\.v4\.b32", ptx)
    assert "tf32" not in ptx


# one multiply-add, one exponential, one sum, and half a conversion where S is stored: 3.9 (4.03 in Triton 3.6), 4.9,
# 3.7; then with a tanh and its slope 26.8, with the extras 21.4, with both 44.8
EPILOGUES = {"reference": 4.05, "policy": 5.0, "recompute": 4.0, "softcap": 27.0, "extras": 21.5, "all": 45.0}


@pytest.mark.parametrize("way", EPILOGUES)
def test_instructions_of_an_element_after_its_product(way, tmp_path):
    """On Hopper. Each takes 256 cycles of a plain tile, whose products at H = 4096 take 65,536."""
    capped, _, _, extras, store = WAYS[way]
    tile = tiles_of(9, True, capped, extras)
    elements = tile.rows * tile.columns // (32 * tile.warps)  # of a thread
    length = epilogue_length(logits_kernel(90, "bf16", *WAYS[way]), tmp_path, "UTMASTG" if store else "")
    assert length <= EPILOGUES[way] * elements


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_of_rows(arch, dtype, capped, tmp_path):
    pointers = {"x": dtype, "w": dtype, "bias": dtype, "targets": "i64", "stash": dtype, "state": "fp64", "redo": "i8"}
    pointers |= {"parts": "fp64", "target_logits": "fp64", "redone": "i64", "index": "i64"}
    pointers |= {"k_out": "fp64", "scaled": dtype, "order": "i64", "first": "i64"}
    floats = (
        "sums",
        "logps",
        "entropy",
        "log_sum_sq",
        "mean_logits",
        "direction",
        "out",
        "t",
        "r",
        "r_out",
        "t_out",
        "products",
        "grad",
    )
    types = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(floats, "*fp32")
    types |= {"shift": "*fp64", "c": "*fp32", "relative": "*fp32"}
    integers = ("n_rows", "n_columns", "n_indexed", "n_tiles", "kept_rows", "first_column", *DIVISIBLE)
    types |= dict.fromkeys(integers, "i32")
    types |= dict.fromkeys(("before", "by", "gain", "inverse_cap"), "fp32")
    head = {"CAPPED": capped, "HAS_BIAS": True}
    redo = {"BJ": REDO_ELEMENTS // 4096, "BH": 4096, "EXTRAS": True, "STORE": True, "DIRECTION": True}
    sliced = types | dict.fromkeys(("entropy", "log_sum_sq", "mean_logits"), "*fp64")
    for function, constants, warps in (
        (kernels.target_logits_kernel, {"BLOCK": 1024, "SLICE": False} | head, 4),
        (kernels.finalize_kernel, {"BLOCK": ROWS_AT_ONCE, "TILES": TILES_AT_ONCE, "EXTRAS": True, "SLICE": False}, 4),
        (kernels.finalize_kernel, {"BLOCK": ROWS_AT_ONCE, "TILES": TILES_AT_ONCE, "EXTRAS": True, "SLICE": True}, 4),
        (kernels.float_rows_kernel, {"BLOCK": ROWS_AT_ONCE}, 4),
        (add_kernel, {"BLOCK": BLOCK}, 4),
        (factors_kernel, {"BLOCK": BLOCK, "POWER": True, "HAS_GRAD": True, "SCALES": True, "CAPPED": capped}, 4),
        (finish_kernel, {"BLOCK": BLOCK, "BF16": dtype == "bf16"}, 4),
        (redo_kernel, redo | head | {"SLICE": False}, 8),
        (redo_kernel, redo | head | {"SLICE": True, "DIRECTION": False}, 8),
    ):
        kernel = compiled(function, sliced if constants.get("SLICE") else types, constants, arch, warps, 3)
        assert kernel.metadata.shared <= SHARED_MEMORY[arch]
        asserts = function is kernels.target_logits_kernel
        assert ("__assertfail" in kernel.asm["ptx"]) is asserts
        if function is not redo_kernel:  # that one is rare, and computes one row at a time
            assert is_in_registers(kernel, tmp_path)


@pytest.mark.parametrize("loss", range(4))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_pair_kernel(arch, loss, tmp_path):
    types = dict.fromkeys(("logps", "ref", "loss", "sums", "metrics", "slopes"), "*fp32")
    types |= {"index": "*i64", "borders": "*i64", "counts": "*i64", "n_pairs": "i32"}
    types |= {"beta": "fp32", "smoothing": "fp32"}
    for pairs in (4, PAIRS_AT_ONCE):
        constants = {"PAIRS": pairs, "BLOCK": max(16, ELEMENTS // (2 * pairs)), "LOSS": loss, "HAS_INDEX": True}
        kernel = compiled(pair_kernel, types, constants, arch, 8, 3)
        assert stack_bytes(kernel, tmp_path) <= 64  # float64 logarithms take a few bytes; one program, run once
