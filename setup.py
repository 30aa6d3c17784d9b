"""Build script: the library of the `native` backend from csrc/; everything declarative is in pyproject.toml.

    pip install --no-build-isolation -e .       # builds it on the way
    python setup.py build_ext --inplace         # builds it alone

Two libraries, `_cpu.so` and, where nvcc is found, `_cuda.so`. They are for the LibTorch stable ABI and hold no Python:
one build serves every torch from 2.10 on and every Python; a GPU is not needed for it, nor a torch with CUDA. Where
there is no C++ compiler (or no torch to build against) the installation goes on without them and says so;
SDPO_REQUIRE_NATIVE=1 makes that an error. SDPO_SANITIZE=1 builds the CPU's with the address and undefined-behaviour
sanitizers. SDPO_CUDA=0 leaves out CUDA's, which takes a quarter of a minute.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10

# The one place that has the repository's address; CITATION.cff repeats it, and a test compares them.
REPOSITORY = "https://github.com/sdpo-kernels/sdpo_kernels"
URLS = {
    "Homepage": REPOSITORY,
    "Documentation": f"{REPOSITORY}/tree/main/docs",
    "Source": REPOSITORY,
    "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
    "Issues": f"{REPOSITORY}/issues",
}

CUDA_LIBRARY = "sdpo_kernels/_cuda.so"
CUDA_ARCHITECTURES = ("80", "90a", "100", "120")  # binaries; PTX of the first and last serves what is none of these


def source_digest(cuda: bool) -> str:
    """What a library is built from, named as sdpo_kernels/backends/native_library.py will ask for it."""
    path = ROOT / "sdpo_kernels" / "backends" / "native_library.py"
    spec = importlib.util.spec_from_file_location("native_library", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.source_digest(ROOT / "csrc", cuda))


def long_description() -> str:
    """README.md for PyPI, where relative links lead nowhere: links and pictures become addresses in the repository."""

    def absolute(link: re.Match[str]) -> str:
        mark, text, target = link.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return link.group()
        view = "raw" if mark else "tree" if (ROOT / target).is_dir() else "blob"  # a picture's bytes, not its page
        return f"{mark}[{text}]({REPOSITORY}/{view}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


def say(message: str) -> None:
    print(f"sdpo_kernels: {message}", file=sys.stderr, flush=True)


def without_native(reason: object, device: str = "CPU") -> None:
    if os.environ.get("SDPO_REQUIRE_NATIVE") == "1":
        raise SystemExit(f"sdpo_kernels: the native library for the {device} could not be built: {reason}")
    say(f"the native library for the {device} could not be built, other backends will serve there: {reason}")


def find_nvcc() -> str | None:
    """CUDA's compiler: of CUDA_HOME, on the PATH, or where it is installed by default."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    default = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (default if Path(default).exists() else None)


def cuda_command(nvcc: str, library: Path) -> list[str]:
    """The one command that builds `library`. cudart is linked statically; of torch only the stable ABI is used."""
    from torch.utils.cpp_extension import include_paths, library_paths

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) + sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    served = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch.rstrip('a')}" in known]
    binaries = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in served]
    ptx = {served[0], served[-1].rstrip("a")}  # what is none of these, now and later
    return [
        nvcc, "-shared", "-O3", "-std=c++20", "--threads=0", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden",
        *binaries, *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted(ptx)),
        "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f'-DSDPO_BUILT_FROM="{source_digest(cuda=True)}"',
        *(f"-isystem={path}" for path in include_paths()), *(f"-L{path}" for path in library_paths()),
        # kept though nothing is used yet of what a CPU torch has of it: a CUDA torch's brings libtorch_cuda
        "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-o", str(library), *map(str, sources),
    ]  # fmt: skip


def build_cuda(library: Path) -> None:
    """Build CUDA's library, or say in one line why not."""
    nvcc = find_nvcc()
    if os.environ.get("SDPO_CUDA") == "0" or os.environ.get("SDPO_SANITIZE") == "1" or nvcc is None:
        if nvcc is None:
            say("no nvcc: the CUDA library is left out; on CUDA the Triton backend serves")
        return
    whole = library.with_suffix(".building.so")
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(cuda_command(nvcc, whole), capture_output=True, text=True)
        if done.returncode:
            without_native(f"nvcc failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}", "CUDA")
        else:
            whole.replace(library)
    finally:
        whole.unlink(missing_ok=True)


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
            build_cuda(Path(self.build_lib) / CUDA_LIBRARY)

        def run(self) -> None:
            """Libraries are built into the build folder; `--inplace` then copies them beside the package."""
            super().run()
            built = Path(self.build_lib) / CUDA_LIBRARY
            if self.inplace and built.exists():
                shutil.copy2(built, ROOT / CUDA_LIBRARY)

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
    of_cpu = [path for folder in (ROOT / "csrc", ROOT / "csrc" / "cpu") for path in folder.glob("*")]
    sources = sorted(str(path.relative_to(ROOT)) for path in of_cpu if path.suffix == ".cpp")
    headers = sorted(str(path.relative_to(ROOT)) for path in of_cpu if path.suffix in (".h", ".inl"))
    extension = CppExtension(
        "sdpo_kernels._cpu",
        sources,
        depends=headers,
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI), ("SDPO_BUILT_FROM", f'"{source_digest(cuda=False)}"')],
        extra_compile_args=flags,
        extra_link_args=links,
        py_limited_api=True,  # no symbols of Python
    )
    return [extension], {"build_ext": BuildNative, "bdist_wheel": WheelForEveryPython}


class WheelForEveryPython(bdist_wheel):
    """Libraries without Python's symbols fit every Python; the platform stays in the name."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


extensions, commands = native_extension()
setup(
    ext_modules=extensions,
    cmdclass=commands,
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls=URLS,
)
