"""Build script: the library of the `native` backend from csrc/; everything declarative is in pyproject.toml.

    pip install --no-build-isolation -e .       # builds it on the way
    python setup.py build_ext --inplace         # builds it alone

The library is for the LibTorch stable ABI and holds no Python: one build serves every torch from 2.10 on and every
Python. Where there is no C++ compiler (or no torch to build against) the installation goes on without it and says so;
SDPO_REQUIRE_NATIVE=1 makes that an error. SDPO_SANITIZE=1 builds it with the address and undefined-behaviour
sanitizers.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10


def source_digest() -> str:
    """What the library is built from, named as sdpo_kernels/backends/native_library.py will ask for it."""
    path = ROOT / "sdpo_kernels" / "backends" / "native_library.py"
    spec = importlib.util.spec_from_file_location("native_library", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.source_digest(ROOT / "csrc"))


def say(message: str) -> None:
    print(f"sdpo_kernels: {message}", file=sys.stderr, flush=True)


def without_native(reason: object) -> None:
    if os.environ.get("SDPO_REQUIRE_NATIVE") == "1":
        raise SystemExit(f"sdpo_kernels: the native library could not be built: {reason}")
    say(f"the native library could not be built, only the eager backend will be there: {reason}")


def native_extension() -> tuple[list[Extension], dict[str, type]]:
    """The extension and the command that builds it; nothing where torch is not there."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        without_native(f"{error}; install torch first and build with --no-build-isolation")
        return [], {}

    class BuildNative(BuildExtension):  # type: ignore[misc]
        """Builds with ninja where it is there; a failure leaves the package without the library."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:  # a missing compiler shows in many ways
                for extension in self.extensions:
                    Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
                self.extensions = []  # nothing to copy into place
                without_native(error)

        def get_ext_filename(self, fullname: str) -> str:
            return os.path.join(*fullname.split(".")) + ".so"  # a library, no Python module: no Python's suffix

    flags = [
        "-O3",
        "-fopenmp-simd",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unused-parameter",
        "-Wno-maybe-uninitialized",
    ]
    links = []
    if os.environ.get("SDPO_SANITIZE") == "1":
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-fno-omit-frame-pointer"]
        links += ["-fsanitize=address,undefined"]
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".inl")
    )
    extension = CppExtension(
        "sdpo_kernels._cpu",
        sources,
        depends=headers,
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("SDPO_BUILT_FROM", f'"{source_digest()}"')],
        extra_compile_args=flags,
        extra_link_args=links,
        py_limited_api=True,  # no symbols of Python
    )
    return [extension], {"build_ext": BuildNative}


extensions, commands = native_extension()
setup(ext_modules=extensions, cmdclass=commands)
