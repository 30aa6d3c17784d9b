"""The native backend's CUDA code on the CPU: csrc/cuda compiled against emulator/, where a thread is a fiber.

    backend = emulated_backend()      # builds the library if it does not exist yet (a few seconds)

Real are the walk, its leaves, every kernel with its indexing, barriers and shuffles, and the operators. Emulated are
cuBLAS (three loops), the stream, and the device's exp and log of double.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from sdpo_kernels.backends.native import NativeBackend
from sdpo_kernels.backends.native_library import source_digest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).with_name("emulator")
FLAGS = [
    "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fsanitize=undefined",
    "-fno-sanitize-recover=undefined", "-DSDPO_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip


class EmulatedBackend(NativeBackend):
    """The native backend on CPU tensors, with the operators of the emulated library."""

    name = "emulated"
    device_types = ("cpu",)

    @property
    def operators(self) -> Any:
        return torch.ops.sdpo_emulated

    def on_cuda(self, tensor: Tensor) -> bool:
        return True

    def uses_grad_tol(self, device: torch.device) -> bool:
        return False

    def stash_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def emulated_backend() -> EmulatedBackend:
    """Build and load the library."""
    library = build()
    torch.ops.load_library(str(library))
    return EmulatedBackend()


def build() -> Path:
    """The library for the current sources, kept under build/emulator."""
    digest = source_digest(ROOT / "csrc", cuda=True) + source_digest(HERE, cuda=True)
    folder = ROOT / "build" / "emulator"
    library = folder / f"emulated-{digest}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = Path(tempfile.mkdtemp(dir=folder))
    cuda = ROOT / "csrc" / "cuda"
    sources = [*cuda.glob("*.cu"), cuda / "ops.cpp", cuda / "leaves.cpp", HERE / "host.cpp"]
    includes = [f"-isystem{path}" for path in include_paths()] + [f"-isystem{sysconfig.get_path('include')}"]

    def compile_one(source: Path) -> Path:
        to = objects / f"{source.stem}.o"
        definitions = [f'-DSDPO_BUILT_FROM="{digest}"', f"-I{HERE}", *includes]
        subprocess.run(["g++", "-x", "c++", "-c", *FLAGS, *definitions, str(source), "-o", str(to)], check=True)
        return to

    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_one, sources))
    links = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-fsanitize=undefined"]
    part = objects / library.name
    subprocess.run(["g++", "-shared", *map(str, compiled), *links, "-o", str(part)], check=True)
    part.rename(library)
    shutil.rmtree(objects)
    return library
