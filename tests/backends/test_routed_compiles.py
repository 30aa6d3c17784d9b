"""The kernels of a backward with `grad_tol`, compiled ahead of time: matrix instructions, shared memory, registers."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from sdpo_kernels.backends.triton import routed_kernels
from sdpo_kernels.backends.triton.chosen import ELEMENTS, WARPS, choose_kernel
from sdpo_kernels.backends.triton.routed import BF16, FLOAT32, LISTED_AT_ONCE, PARTS, SPANS, Shape
from tests.backends.machine_code import is_in_registers, stack_bytes
from tests.backends.test_triton_compiles import ARCHITECTURES, SHARED_MEMORY, WAYS, compiled, logits_kernel

MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
ATOMIC = r"\b(atom|red)\."
SHAPES = {"bf16": BF16, "fp32": FLOAT32}


def product(name: str, arch: int, dtype: str, **constants: Any) -> Any:
    """One of the three products."""
    shape: Shape = SHAPES[dtype]
    pointers = {"shift": "fp64", "targets": "i64", "words": "i64", "order": "i64", "first": "i64"}
    pointers |= dict.fromkeys(("lists", "counts", "unions"), "i32") | dict.fromkeys(
        ("r", "t", "db", "products"), "fp32"
    )
    pointers |= dict.fromkeys(("x", "w", "s", "bias", "scaled_x", "dw"), dtype)
    types = {name: f"*{kind}" for name, kind in pointers.items()} | {"before": "fp32", "by": "fp32"}
    integers = ("n_rows", "n_columns", "width", "x_stride", "w_stride", "dw_stride", "first_column", "first_tile")
    types |= dict.fromkeys((*integers, "span", "tile_step", "row_step"), "i32")
    constants |= {"UPCAST": False, "BM": shape.rows, "BK": shape.depth, "BH": shape.width, "BN": shape.width}
    constants |= {"BT": shape.targets, "PIECES": 3 if dtype == "bf16" else 1, "PARTS": PARTS, "SPANS": SPANS}
    function = getattr(routed_kernels, name)
    chosen = {name: value for name, value in constants.items() if name in function.arg_names}
    return compiled(function, types, chosen, arch, shape.warps, shape.stages)


WAYS_OF = {
    "kept_logits_kernel": [
        {"CAPPED": False, "HAS_BIAS": False, "bias": None},
        {"CAPPED": True, "HAS_BIAS": True},
    ],
    "weight_kernel": [
        {"HAS_DW": True, "HAS_DB": False, "db": None},
        {"HAS_DW": True, "HAS_DB": True},
        {"HAS_DW": False, "HAS_DB": True, "dw": None},
    ],
    "hidden_kernel": [{}],
}


@pytest.mark.parametrize("name", WAYS_OF)
@pytest.mark.parametrize("dtype", SHAPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_products_keep_to_registers_and_use_the_matrix_units(arch, dtype, name, tmp_path):
    for constants in WAYS_OF[name]:
        kernel = product(name, arch, dtype, **constants)
        ptx = kernel.asm["ptx"]
        # in float32 on Blackwell, Triton 3.6 spills up to 16 bytes; of thousands of instructions three read them
        is_old = triton.__version__.startswith("3.6.")
        assert is_in_registers(kernel, tmp_path, reads=3 if is_old and dtype == "fp32" and arch >= 100 else 0)
        assert kernel.metadata.shared <= SHARED_MEMORY[arch]
        assert not re.search(ATOMIC, ptx)
        assert "tf32" not in ptx
        if dtype == "bf16" and constants.get("HAS_DW", True):
            assert MATRIX_UNITS[arch] in ptx
            assert "cp.async" in ptx  # rows are gathered while the last ones are multiplied


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_that_choose_and_list(arch, tmp_path):
    pointers = {"sums": "fp32", "state": "fp64", "targets": "i64", "redo": "i8", "words": "i64", "order": "i64"}
    types = {name: f"*{kind}" for name, kind in pointers.items()} | {"tolerance": "fp32"}
    types |= dict.fromkeys(("counts", "lists", "unions"), "*i32")
    types |= dict.fromkeys(("n_rows", "all_rows", "n_tiles", "n_words", "n_parts", "first_tile", "span"), "i32")
    for function, constants, warps in (
        (choose_kernel, {"ROWS": 2, "TILES": ELEMENTS // 2, "PER": 1, "RELATIVE": False}, WARPS),
        (choose_kernel, {"ROWS": 8, "TILES": ELEMENTS // 8, "PER": 2, "RELATIVE": False}, WARPS),
        (choose_kernel, {"ROWS": 2, "TILES": ELEMENTS // 2, "PER": 1, "RELATIVE": True}, WARPS),
        (routed_kernels.counts_kernel, {"ROWS": 64, "WORDS": 64}, 4),
        (routed_kernels.lists_kernel, {"BLOCK": LISTED_AT_ONCE}, 4),
        (routed_kernels.unions_kernel, {"BM": BF16.rows, "SPANS": SPANS}, 4),
    ):
        kernel = compiled(function, types, constants, arch, warps, 3)
        assert is_in_registers(kernel, tmp_path), function
        assert kernel.metadata.shared <= SHARED_MEMORY[arch]
        assert not re.search(ATOMIC, kernel.asm["ptx"])


@pytest.mark.parametrize("way", ["policy", "softcap", "all"])
@pytest.mark.parametrize("dtype", SHAPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_forwards_tiles_with_sums_of_64_columns(arch, dtype, way, tmp_path):
    kernel = logits_kernel(arch, dtype, *WAYS[way], by_part=True)
    assert stack_bytes(kernel, tmp_path) <= 8  # one number, read once, of softcap with extras on sm_100
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
