"""Builds the native libraries against an older torch, and loads and runs them in it: `make old-torch`.

    python -m tests.old_torch 2.10.0 build/old-torch

1. download the wheel without its CUDA packages (gigabytes that no test here needs) and unpack it
2. stand-ins for the libraries of those packages, so that this torch can be imported
3. build both libraries against its headers
4. in it, run the CPU kernels' tests: with the library of step 3, and with the one of today's torch
5. in it, load CUDA's library of step 3 and of today's torch

The unpacked wheel and the compiled objects stay, so a second run takes half a minute.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sdpo_kernels"
TESTS = ["tests/backends/test_native.py", "tests/test_logits.py"]
LOAD_CUDA = """
import sys, torch, sdpo_kernels.backends
torch.ops.load_library(sys.argv[1])
print("torch", torch.__version__, "loaded", sys.argv[1], torch.ops.sdpo_native.cuda_built_from())
"""


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def unpacked(version: str, folder: Path) -> Path:
    """The folder to import torch from."""
    site = folder / "site"
    if not (site / "torch" / "version.py").is_file():
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "download", "-q", "--no-deps", "-d", str(folder), f"torch=={version}"], check=True)
        (wheel,) = folder.glob("torch-*.whl")
        subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
        wheel.unlink()
    return site


def stand_ins(libraries: Path, folder: Path) -> None:
    """A library for each one that torch's need and lack, whose functions all return 0.

    Functions have the versions that torch's libraries ask for, or the loader refuses them.
    """
    here = sorted(libraries.glob("*.so"))
    missing = {name for library in here for name in needed(library)} - {library.name for library in here}
    file_of = {version: file for library in here for file, version in versions_needed(library)}
    defined = {name for library in here for name, _ in symbols(library, "--defined-only")}

    # those without a version may be in any library
    functions: defaultdict[str, set[str]] = defaultdict(set)
    (runtime,) = [file for file in missing if file.startswith("libcudart.")] or [""]
    for name, version in {symbol for library in here for symbol in symbols(library, "--undefined-only")}:
        if version or (name not in defined and re.match(r"_*(cu|nv|nccl)", name)):
            functions[file_of.get(version, runtime)].add(name)

    folder.mkdir(parents=True, exist_ok=True)
    source, script = folder / "functions.c", folder / "versions"
    for file in missing:
        source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(functions[file])))
        named = [version for version, provider in file_of.items() if provider == file]
        script.write_text("".join(f"{version} {{ global: *; }};\n" for version in named))
        scripted = [f"-Wl,--version-script={script}"] if named else []
        options = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{file}", *scripted]
        subprocess.run(["gcc", *options, str(source), "-o", str(folder / file)], check=True)


def needed(library: Path) -> list[str]:
    """The libraries of CUDA's packages that `library` is linked with."""
    return re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl).*)\]", output("readelf", "-d", str(library)))


def versions_needed(library: Path) -> list[tuple[str, str]]:
    """(file, symbol version) of all that `library` is linked with."""
    found = re.findall(r"File: (\S+)\s+Cnt.*\n((?:.*Name: .*\n)*)", output("readelf", "-V", str(library)))
    return [(file, version) for file, names in found for version in re.findall(r"Name: (\S+)", names)]


def symbols(library: Path, which: str) -> list[tuple[str, str]]:
    """(name, version or "") of the symbols of `library`, weak ones that it lacks left out."""
    return re.findall(r" [A-Zi] (\w+)(?:@+(\S+))?$", output("nm", "-D", which, str(library)), re.MULTILINE)


def main(version: str, where: Path) -> None:
    """Build against torch `version` and run in it; an exception if anything fails."""
    folder = (where / version).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    site = unpacked(version, folder)
    stand_ins(site / "torch" / "lib", folder / "stand-ins")

    built = folder / "built"
    build = ["-q", "build_ext", "--build-lib", str(built), "--build-temp", str(folder / "objects")]
    required = {"SDPO_TORCH": str(site / "torch"), "SDPO_REQUIRE_NATIVE": "1"}
    subprocess.run([sys.executable, "setup.py", *build], check=True, cwd=ROOT, env=os.environ | required)

    inside = os.environ | {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "LD_LIBRARY_PATH": str(folder / "stand-ins"),
    }  # fmt: skip
    for library in (built / "sdpo_kernels" / "_cpu.so", PACKAGE / "_cpu.so"):
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS]
        subprocess.run(tests, check=True, cwd=ROOT, env=inside | {"SDPO_NATIVE_LIBRARY": str(library)})
    for library in (built / "sdpo_kernels" / "_cuda.so", PACKAGE / "_cuda.so"):
        if library.exists():
            subprocess.run([sys.executable, "-c", LOAD_CUDA, str(library)], check=True, cwd=ROOT, env=inside)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
