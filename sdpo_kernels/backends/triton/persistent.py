"""QuACK's persistent kernel in place of Triton's tiles: on request, on Hopper, for the common call.

With `SDPO_QUACK=1` the whole tiles of a plain bfloat16 head go to `persistent_kernel.py`, and the columns after the
last whole tile, fewer than 192, to Triton's kernel. Calls with softcap, a bias, extras, float32 operands or rows that
TMA cannot read go to Triton's kernel as a whole. Off by default until a measurement says which one is faster.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.backends.base import HeadCall
from sdpo_kernels.backends.triton.tiles import HOPPER, PERSISTENT_CLUSTER, PERSISTENT_COLUMNS, PERSISTENT_GROUP

MOST_COLUMNS = 2**24  # the kernel compares columns as float32


def is_asked() -> bool:
    """Whether the user asked for this kernel."""
    return os.environ.get("SDPO_QUACK") == "1"


def is_installed() -> bool:
    """Whether QuACK is there."""
    return importlib.util.find_spec("quack") is not None


def check_machine(device: torch.device) -> None:
    """ValueError if the kernel cannot run here: it was asked for by name."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability != HOPPER:
        was = device.type if capability is None else "compute capability {}.{}".format(*capability)
        raise ValueError(f"SDPO_QUACK: was 1, which needs a GPU of compute capability 9.0 (Hopper), not {was}")
    if not is_installed():
        raise ValueError("SDPO_QUACK: was 1, which needs quack-kernels; run: pip install sdpo-kernels[quack]")


def serves(call: HeadCall, x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel computes the whole tiles of a call with these operands."""
    if not is_asked():
        return False
    check_machine(x.device)
    plain = call.head.softcap is None and call.bias is None and not call.outputs and x.dtype == torch.bfloat16
    fits = weight.shape[0] <= MOST_COLUMNS and x.shape[1] % 8 == 0  # a copy of w in bfloat16 is aligned, too
    return plain and fits and is_aligned(x) and is_aligned(weight)


def is_aligned(matrix: Tensor) -> bool:
    """Whether the copy engine can take it: rows begin at multiples of 16 bytes, and none before the last one ends."""
    # of an expanded or overlapping matrix, a row begins before the last one ends
    start, step = matrix.data_ptr(), matrix.stride(0) * matrix.element_size()
    return start % 16 == 0 and step % 16 == 0 and matrix.stride(0) >= matrix.shape[1]


def whole_tiles(n_columns: int) -> int:
    """How many of the first columns are in whole tiles."""
    return n_columns // PERSISTENT_COLUMNS * PERSISTENT_COLUMNS


def kernel(has_sums: bool, stores: bool) -> Any:
    """The compiled kernel; importing QuACK takes seconds."""
    from sdpo_kernels.backends.triton import persistent_kernel

    return persistent_kernel.kernel(has_sums, stores)


def logits(
    x: Tensor,  # [N, H]
    weight: Tensor,  # [C, H], C a multiple of PERSISTENT_COLUMNS
    by: float,
    c: Tensor,  # [N] float32
    targets: Tensor,  # [N] float32: columns of `weight`
    sums: Tensor | None,  # [tiles, N] float32
    s: Tensor | None,  # [rows, columns] bfloat16 for S, which is cut at its borders
) -> None:
    """Whole tiles: E = 2**(x·w·by − c), 0 at the targets, its sums over each tile, and S = E."""
    clusters = torch.cuda.get_device_properties(x.device).multi_processor_count // PERSISTENT_CLUSTER
    epilogue = (by, c, targets, None if sums is None else sums.t())
    schedule = (clusters, None, PERSISTENT_GROUP, None, None, None)
    # the other arguments are for QuACK's other products
    kernel(sums is not None, s is not None)(x.detach(), weight.detach(), s, None, epilogue, schedule, None, None, None)
