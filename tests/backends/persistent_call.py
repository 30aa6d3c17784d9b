"""Calls the persistent kernel with tensors of the CPU that say they are CUDA's. Run by test_persistent.py.

With a folder, the libraries in it, as on a machine without QuACK; else the kernel as QuACK compiles it.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tvm_ffi
from torch import Tensor

from benchmarks import packed_persistent
from sdpo_kernels.backends.triton import persistent

CUDA = 2  # DLPack's number
CODES = {torch.bfloat16: 4, torch.float32: 2}
KEPT: list[Any] = []


class Described(ctypes.Structure):
    """DLManagedTensor of dlpack.h, without a deleter."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("number", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )  # fmt: skip


class OnCuda:
    """A tensor of the CPU that says it is CUDA's."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        t = self.tensor
        sizes = (ctypes.c_int64 * (2 * t.dim()))(*t.shape, *t.stride())
        at = ctypes.addressof(sizes)
        found = Described(
            t.data_ptr(), CUDA, 0, t.dim(), CODES[t.dtype], 8 * t.element_size(), 1, at, at + 8 * t.dim(), 0, None, None
        )
        KEPT.append((found, sizes, t))
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return capsule(ctypes.addressof(found), b"dltensor", None)


def on_cuda(argument: Any) -> Any:
    """Every tensor in it, wrapped."""
    if isinstance(argument, tuple):
        return tuple(on_cuda(one) for one in argument)
    return tvm_ffi.from_dlpack(OnCuda(argument)) if isinstance(argument, Tensor) else argument


def main() -> None:
    """What launch.py passes is accepted, and what it must not pass is not."""
    if sys.argv[1:]:
        packed_persistent.PACKED = Path(sys.argv[1])
        packed_persistent.use()
    compiled = persistent.kernel
    persistent.kernel = lambda *way: lambda *arguments: compiled(*way)(*on_cuda(arguments))
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)

    # policy and reference stacked, of which the policy's are stored; a vocabulary of two tiles and the second's sums
    x, weight = torch.zeros(301, 64, dtype=torch.bfloat16), torch.zeros(384, 64, dtype=torch.bfloat16)
    c, targets, sums = torch.zeros(301), torch.zeros(301), torch.zeros(5, 301)
    stash = torch.zeros(150, 512, dtype=torch.bfloat16)
    good = {"x": x, "weight": weight, "by": 1.5, "c": c, "targets": targets, "sums": sums[1:3], "s": stash[:, 192:]}
    no_driver = pytest.raises(Exception, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice|CUDA error")
    for other in ({}, {"s": None}, {"sums": None}, {"s": stash[:1, :64]}, {"x": x[:, :56], "weight": weight[:, :56]}):
        with no_driver:
            persistent.logits(**(good | other))

    for other, message in (
        ({"c": torch.zeros(302)[1:]}, "Misaligned"),
        ({"s": stash[:, 3:]}, "Misaligned"),
        ({"targets": targets[:200]}, "Mismatched"),
        ({"sums": sums[1:3].t().contiguous().t()}, "Mismatched"),
        ({"x": x.float()}, "Mismatched"),
        ({"weight": weight[:, :56]}, "Mismatched"),
    ):
        with pytest.raises(Exception, match=message):
            persistent.logits(**(good | other))


if __name__ == "__main__":
    main()
