"""Loads the compiled libraries of the `native` backend; if it cannot, its errors say why and what to do.

The libraries register operators with torch's dispatcher and do not use Python. setup.py builds them when the package is
installed, if there is a C++ compiler (and nvcc for the CUDA library). The CPU library defines the operators, so it is
loaded first.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdpo_kernels.backends.source_digest import source_digest
from sdpo_kernels.namespaces import NATIVE, ONE_BUILD

OPERATORS: Any = getattr(torch.ops, NATIVE)  # the libraries' operators; empty until the first one is loaded
PACKAGE = Path(__file__).resolve().parents[1]
CUDA_LIBRARY = PACKAGE / "_cuda.so"
LIBRARY = Path(os.environ.get("SDPO_NATIVE_LIBRARY", PACKAGE / "_cpu.so"))  # `make sanitize` sets another one
SOURCES = PACKAGE.parent / "csrc"  # in a checkout; next to an installed wheel it may belong to something else


def is_checkout() -> bool:
    """Whether this package is in a checkout, next to its own sources."""
    return (SOURCES / "walk.h").is_file()


def how_to_build() -> str:
    """The command that rebuilds the library of this installation."""
    if is_checkout():
        return f"cd {SOURCES.parent} && python setup.py build_ext --inplace"
    return "python -m pip install --no-deps --force-reinstall --no-binary sdpo-kernels sdpo-kernels"


def is_whole(library: Path) -> bool:
    """False if an ELF file ends before its last table: loading such a file can kill the process."""
    content = library.read_bytes()[:64]
    if len(content) < 64:
        return False
    if content[:6] != b"\x7fELF\x02\x01":  # not 64-bit little-endian ELF: left to the loader
        return True
    (table_at,) = struct.unpack_from("<Q", content, 40)
    size, count = struct.unpack_from("<HH", content, 58)
    return table_at + size * count <= library.stat().st_size


def load() -> str | None:
    """Load the CPU library; None, or why there is none. RuntimeError if there is one that cannot be used."""
    return _load(LIBRARY, "a C++ compiler", lambda: OPERATORS.built_from(), cuda=False)


def load_cuda() -> str | None:
    """The same for the CUDA library, after the CPU library."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return _load(CUDA_LIBRARY, "nvcc", lambda: OPERATORS.cuda_built_from(), cuda=True)


def _load(library: Path, compiler: str, built_from: Callable[[], str], cuda: bool) -> str | None:
    if not library.exists():
        return f"no library was built ({library} does not exist); with {compiler} installed, run: {how_to_build()}"

    # the library exists: from here on a problem is an error, not a reason to use another backend
    if not is_whole(library):
        raise RuntimeError(f"{library} is truncated (was its build interrupted?); to rebuild it: {how_to_build()}")

    try:
        digest = _registered(built_from) if ONE_BUILD else None
        if digest is None:
            # a second library that defines the same operators would end the process
            torch.ops.load_library(str(library))
            digest = built_from()
    except (OSError, AttributeError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(f"{library} cannot be loaded ({first}); to rebuild it: {how_to_build()}") from error

    # a checkout's library must match its sources; an installed one has none to compare with
    if is_checkout() and digest != source_digest(SOURCES, cuda):
        raise RuntimeError(f"{library} was built from other sources than {SOURCES}; to rebuild it: {how_to_build()}")
    return None


def _registered(built_from: Callable[[], str]) -> str | None:
    """The digest of a library that is loaded already, as by another copy of the same build; None if there is none."""
    try:
        return built_from()
    except (AttributeError, RuntimeError):
        return None
