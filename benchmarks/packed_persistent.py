"""The persistent kernel from the libraries that `gpu.sh pack` made, on a machine without QuACK.

`use()`, or `-p benchmarks.packed_persistent` for pytest; SDPO_QUACK=1 then means them. Needs tvm-ffi.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from benchmarks.compile_persistent import ENTRY, WAYS
from benchmarks.measure import ROOT
from sdpo_kernels.backends.triton import persistent

PACKED = ROOT / "build" / "gpu" / "persistent"


def is_packed() -> bool:
    """Whether the libraries are here."""
    return all((PACKED / f"{name}.so").is_file() for name in WAYS)


def use() -> None:
    """From now on they are the kernel."""
    persistent.kernel = library
    persistent.is_installed = is_packed


def pytest_configure() -> None:
    """pytest's hook."""
    use()


@cache
def library(has_sums: bool, stores: bool) -> Any:
    """The kernel of one way to call it."""
    import tvm_ffi

    (name,) = [name for name, way in WAYS.items() if way == (has_sums, stores)]
    return tvm_ffi.load_module(str(PACKED / f"{name}.so"))[ENTRY]
