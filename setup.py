"""Build script: the libraries of the `native` backend from csrc/; everything declarative is in pyproject.toml.

    pip install -e .                            # builds them on the way; torch has to be installed before
    python setup.py build_ext --inplace         # builds them alone

Two libraries, `_cpu.so` and, where nvcc is found, `_cuda.so`. They are for the LibTorch stable ABI and hold no Python:
one build serves every torch from 2.10 on and every Python; a GPU is not needed for it, nor a torch with CUDA. Of torch
only headers and library files are read, so a build in isolation uses those of the environment it installs into
("Building", docs/architecture.md). Without them it ends with an error; without a C++ compiler it goes on and says so.
Environment variables, all optional:

    CXX, CXXFLAGS, LDFLAGS    the C++ compiler (g++ or clang++) and more options for it
    SDPO_TORCH                the folder of the torch package to build against
    SDPO_NATIVE               0: no libraries, nothing is compiled
    SDPO_REQUIRE_NATIVE       1: a library that cannot be built is an error
    SDPO_CUDA                 0: no CUDA library, which takes a quarter of a minute
    SDPO_OPERATORS            the operators' namespace in place of sdpo_native (`make hub-kernel`)
    SDPO_SANITIZE             1: the CPU's with the address and undefined-behaviour sanitizers
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones cannot read pyproject.toml, and do not say why
    raise SystemExit(
        f"sdpo_kernels: setuptools was {setuptools.__version__}, must be 77 or later: either leave out "
        f"--no-build-isolation, or first run: {sys.executable} -m pip install --upgrade 'setuptools>=77'"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "objects"  # what was compiled, by digest: an editable install and a wheel share it
STABLE_ABI = "0x020a000000000000"  # torch 2.10
OLDEST_TORCH = (2, 10)

# The one place that has the repository's address; CITATION.cff repeats it, and a test compares them.
REPOSITORY = "https://github.com/sdpo-kernels/sdpo_kernels"
URLS = {
    "Homepage": REPOSITORY,
    "Documentation": f"{REPOSITORY}/tree/main/docs",
    "Source": REPOSITORY,
    "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
    "Issues": f"{REPOSITORY}/issues",
}

CPU_LIBRARY = "sdpo_kernels/_cpu.so"
CUDA_LIBRARY = "sdpo_kernels/_cuda.so"
CUDA_ARCHITECTURES = ("80", "90a", "100", "120")  # binaries; PTX of the first and last serves what is none of these

CPU_FLAGS = [
    "-std=c++20", "-O3", "-DNDEBUG", "-fwrapv", "-fPIC", "-fopenmp-simd", "-fvisibility=hidden",
    "-fno-trapping-math",  # or GCC keeps the comparisons of the exponential as branches, unless it has masks (AVX-512)
    "-Wall", "-Wno-unused-parameter", "-Wno-unknown-warning-option", "-Wno-maybe-uninitialized",
]  # fmt: skip
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-fno-omit-frame-pointer"]


def source_digest(cuda: bool) -> str:
    """What a library is built from, named as sdpo_kernels/backends/native_library.py will ask for it."""
    path = ROOT / "sdpo_kernels" / "backends" / "source_digest.py"
    spec = importlib.util.spec_from_file_location("source_digest", path)
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


# --- torch ---


def torch_folders() -> list[Path]:
    """Where torch may lie: this Python's own path, then the environment's packages, which pip's isolation hides."""
    spec = importlib.util.find_spec("torch")
    found = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    hidden = [sysconfig.get_path("platlib"), *site.getsitepackages(), site.getusersitepackages()]
    return [*found, *(Path(folder) / "torch" for folder in hidden)]


def find_torch() -> Path:
    """The folder of the torch to build against; SystemExit says what to do if there is none, or an older one."""
    given = os.environ.get("SDPO_TORCH")
    folders = [Path(given)] if given else torch_folders()
    folder = next((folder for folder in folders if (folder / "version.py").is_file()), None)
    if folder is None and given:
        raise SystemExit(f"sdpo_kernels: SDPO_TORCH: was {given!r}, must be the folder of an installed torch package")
    if folder is None:
        raise SystemExit(
            f"sdpo_kernels: torch is not installed for {sys.executable}, and the native library is built against it. "
            "First run: pip install 'torch>=2.10' (or set SDPO_TORCH to the folder of a torch package; or set "
            "SDPO_NATIVE=0 to install without the library, for less speed)"
        )

    version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folder / "version.py").read_text())
    if version is None or (int(version[2]), int(version[3])) < OLDEST_TORCH:
        was = version[1] if version else "unknown"
        raise SystemExit(f"sdpo_kernels: torch in {folder}: its version was {was}, must be 2.10 or later")
    return folder


def torch_headers(torch: Path) -> list[str]:
    return [str(torch / "include"), str(torch / "include" / "torch" / "csrc" / "api" / "include")]


# --- the CPU's library ---


def find_compiler() -> list[str]:
    """The C++ compiler: CXX, or the first that is on the PATH. OSError if there is none."""
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise OSError("no C++ compiler found (CXX is not set, and there is no c++, g++ or clang++ on the PATH)")


def compile_source(command: list[str], source: Path, key: bytes, objects: Path = OBJECTS) -> Path:
    """Compile `source` unless that was done: an object's name has a digest of all that it depends on."""
    if source.name == "ops.cpp":
        command = [*command, f'-DSDPO_BUILT_FROM="{source_digest(cuda=False)}"', *renamed_operators()]
    digest = hashlib.sha256(key + "\0".join(command).encode() + source.read_bytes()).hexdigest()[:16]
    made = objects / f"{source.stem}-{digest}.o"
    if not made.exists():
        whole = made.with_suffix(f".{os.getpid()}")
        run([*command, "-c", str(source), "-o", str(whole)])
        whole.replace(made)
    return made


def renamed_operators() -> list[str]:
    """The option that gives the operators the namespace in SDPO_OPERATORS."""
    name = os.environ.get("SDPO_OPERATORS")
    return [f"-Dsdpo_native={name}"] if name else []


def build_cpu(library: Path, torch: Path) -> None:
    """Compile every source, two files at a time or more, and link `library`. OSError or RuntimeError if that fails."""
    compiler, sanitize = find_compiler(), os.environ.get("SDPO_SANITIZE") == "1"
    flags = [*CPU_FLAGS, *(SANITIZERS if sanitize else []), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    headers = [f"-isystem{path}" for path in torch_headers(torch)]
    command = [*compiler, *flags, f"-DTORCH_TARGET_VERSION={STABLE_ABI}", *headers]

    # what every object depends on
    files = [path for folder in (ROOT / "csrc", ROOT / "csrc" / "cpu") for path in sorted(folder.iterdir())]
    shared = [path for path in files if path.suffix in (".h", ".inl")]
    key = b"".join(path.read_bytes() for path in shared) + (torch / "version.py").read_bytes()
    key += subprocess.run([*compiler, "--version"], capture_output=True).stdout

    OBJECTS.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    sources = [path for path in files if path.suffix == ".cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda source: str(compile_source(command, source, key)), sources)

    whole = library.with_suffix(".building.so")
    links = [*shlex.split(os.environ.get("LDFLAGS", "")), *(SANITIZERS[:1] if sanitize else [])]
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
    run([*compiler, "-shared", *made, *links, *libraries, "-o", str(whole)])
    whole.replace(library)


def run(command: list[str]) -> None:
    """Run a compiler; its messages go to stderr, or into the RuntimeError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    messages = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{messages[-6000:]}")
    if messages:
        print(messages, file=sys.stderr, flush=True)


# --- CUDA's library ---


def find_nvcc() -> str | None:
    """CUDA's compiler: of CUDA_HOME, on the PATH, or where it is installed by default."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    default = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (default if Path(default).exists() else None)


def cuda_command(nvcc: str, library: Path, torch: Path) -> list[str]:
    """The one command that builds `library`. cudart is linked statically; of torch only the stable ABI is used."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) + sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    served = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch.rstrip('a')}" in known]
    binaries = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in served]
    ptx = {served[0], served[-1].rstrip("a")}  # what is none of these, now and later
    return [
        nvcc, "-shared", "-O3", "-std=c++20", "--threads=0", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden",
        *binaries, *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted(ptx)),
        "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f'-DSDPO_BUILT_FROM="{source_digest(cuda=True)}"',
        *renamed_operators(),
        *(f"-isystem={path}" for path in torch_headers(torch)), f"-L{torch / 'lib'}",
        # kept though nothing is used yet of what a CPU torch has of it: a CUDA torch's brings libtorch_cuda
        "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-o", str(library), *map(str, sources),
    ]  # fmt: skip


def compile_cuda(nvcc: str, torch: Path) -> Path:
    """The compiled library; like an object of the CPU's it is made once. RuntimeError if that fails."""
    command = cuda_command(nvcc, OBJECTS / "_cuda.so", torch)  # has a digest of the sources
    version = subprocess.run([nvcc, "--version"], capture_output=True).stdout
    key = "\0".join(command).encode() + version + (torch / "version.py").read_bytes()
    made = OBJECTS / f"_cuda-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not made.exists():
        OBJECTS.mkdir(parents=True, exist_ok=True)
        whole = made.with_suffix(f".{os.getpid()}")
        run(cuda_command(nvcc, whole, torch))
        whole.replace(made)
    return made


def build_cuda(library: Path, torch: Path) -> None:
    """Build CUDA's library, or say in one line why not."""
    nvcc = find_nvcc()
    if os.environ.get("SDPO_CUDA") == "0" or os.environ.get("SDPO_SANITIZE") == "1" or nvcc is None:
        if nvcc is None:
            say("no nvcc: the CUDA library is left out; on CUDA the Triton backend serves")
        return
    try:
        made = compile_cuda(nvcc, torch)
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(made, library)
    except RuntimeError as error:
        without_native(error, "CUDA")


# --- commands ---


class BuildNative(build_ext):
    """Builds both libraries into the build folder; `--inplace` then copies them beside the package."""

    def build_extensions(self) -> None:
        library, torch = Path(self.build_lib) / CPU_LIBRARY, find_torch()
        try:
            build_cpu(library, torch)
        except (OSError, RuntimeError) as error:
            library.unlink(missing_ok=True)
            self.extensions = []  # nothing to copy into place
            without_native(error)
        build_cuda(Path(self.build_lib) / CUDA_LIBRARY, torch)

    def run(self) -> None:
        super().run()
        built = Path(self.build_lib) / CUDA_LIBRARY
        if self.inplace and built.exists():
            shutil.copy2(built, ROOT / CUDA_LIBRARY)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # a library, no Python module: no Python's suffix


class WheelForEveryPython(bdist_wheel):
    """Libraries without Python's symbols fit every Python; the platform stays in the name."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


native = os.environ.get("SDPO_NATIVE") != "0"
setup(
    ext_modules=[Extension("sdpo_kernels._cpu", [])] if native else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelForEveryPython} if native else {},
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls=URLS,
)
