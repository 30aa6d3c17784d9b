"""Lays the kernels out for `kernels`, Hugging Face's loader: `make hub-kernel`.

    python -m tests.hub_kernel build/hub-kernel

1. take the modules that the log-probs and losses need (nothing of transformers), and make their imports relative
2. name the build by a digest of these modules and of csrc/; its operators live in namespaces with that name
3. compile the libraries with that namespace; on the stable ABI one build serves every torch from 2.10 on
4. write a folder for each variant, with metadata.json: compiled for the CPU and, where nvcc is, for CUDA; and without
   libraries, for other machines (eager on the CPU, Triton on CUDA)
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sdpo_kernels import _NAMES, __version__
from sdpo_kernels.backends.source_digest import source_digest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sdpo_kernels"
ROOTS = ("logps", "dpo", "logits")  # their imports, and those of these, are what a build has
STABLE_ABI = "torch-stable-abi210"
VERSION = 1  # what users ask for: get_kernel(name, version=1); a change that breaks calls raises it

NAMESPACES = '''"""The namespaces of this build's operators at torch's dispatcher."""

import torch


def _free(name: str) -> str:
    """A second copy of this build in one process gets a namespace of its own."""
    taken, number = name, 1
    while hasattr(getattr(torch.ops, taken), "linear_logps"):
        number += 1
        taken = f"{{name}}_{{number}}"
    return taken


OPERATORS = _free("sdpo_kernels_{digest}")
NATIVE = "sdpo_native_{digest}"  # compiled into the libraries, which are loaded once
ONE_BUILD = True
'''

README = f"""---
license: apache-2.0
tags:
  - kernels
---

# sdpo-kernels

Exact log-probs of a linear head and DPO losses without the logits, from sdpo_kernels {__version__}.

    from kernels import get_local_kernel

    kernel = get_local_kernel("path/to/this/folder")
    kernel.linear_logps(hidden, weight, targets).logps
"""


def source(module: str) -> Path:
    """The file of a module of the package, by its name within it: 'backends.native'."""
    path = ROOT.joinpath(PACKAGE, *module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def needed() -> list[str]:
    """ROOTS and all modules that they import, sorted; inside functions too."""
    found: set[str] = set()
    waiting = list(ROOTS)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        for name in imported(source(module)):
            parts = name.split(".")
            waiting += [".".join(parts[: length + 1]) for length in range(len(parts))]
    return sorted(found - {"namespaces"})


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for node in absolute_imports(path.read_text()):
        base = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
        names = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
        found |= {name for name in names if source(name).exists()} | ({base} if base else set())
    return found


def absolute_imports(text: str) -> list[ast.ImportFrom]:
    """Every `from sdpo_kernels… import …` of a file; the package has no other import of itself."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    return [node for node in nodes if not node.level and (node.module or "").split(".")[0] == PACKAGE]


def relative(text: str, depth: int) -> str:
    """A module's text with relative imports; `depth` folders lie between it and the package, counting its own."""
    lines = text.splitlines(keepends=True)
    for node in absolute_imports(text):
        at = node.lineno - 1
        rest = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
        lines[at] = re.sub(rf"from {PACKAGE}[\w.]* import", f"from {'.' * depth}{rest} import", lines[at], count=1)
    return "".join(lines)


def modules() -> dict[str, str]:
    """The text of each file of a build by its path, without namespaces.py, which depends on the digest of these."""
    files = {source(module).relative_to(ROOT / PACKAGE) for module in needed()}
    texts = {file.as_posix(): relative((ROOT / PACKAGE / file).read_text(), len(file.parts)) for file in sorted(files)}

    names = {module: kept for module, kept in _NAMES.items() if f"{module}.py" in texts}
    lines = [f'"""The kernels of {PACKAGE} {__version__}."""', "", "from . import losses"]
    lines += [f"from .{module} import {', '.join(kept)}" for module, kept in names.items()]
    public = sorted(["losses", *(name for kept in names.values() for name in kept)])
    lines += ["", f'__version__ = "{__version__}"', f"__all__ = {json.dumps(public)}", ""]
    return texts | {"__init__.py": "\n".join(lines)}


def digest(texts: dict[str, str]) -> str:
    """What names a build: a digest of all that it is made from."""
    sources = [source_digest(ROOT / "csrc", cuda) for cuda in (False, True)]
    return hashlib.sha256(json.dumps([texts, sources, NAMESPACES], sort_keys=True).encode()).hexdigest()[:12]


def compiled(name: str, folder: Path, *, cuda: bool = True) -> Path:
    """The folder of the libraries of the build `name`: _cpu.so and, where nvcc is, _cuda.so."""
    variables = {"SDPO_OPERATORS": f"sdpo_native_{name}", "SDPO_REQUIRE_NATIVE": "1"}
    variables |= {} if cuda else {"SDPO_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | variables)
    return folder / PACKAGE


def variants(libraries: Path) -> dict[str, tuple[str, list[str]]]:
    """Each variant's name, with its backend and the libraries in it."""
    machine = f"{platform.machine()}-{platform.system().lower()}"
    found = {f"{STABLE_ABI}-cpu-{machine}": ("cpu", ["_cpu.so"])} if (libraries / "_cpu.so").exists() else {}
    if (libraries / "_cuda.so").exists():
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", said)
        assert release is not None, said
        found[f"{STABLE_ABI}-cu{release[1]}{release[2]}-{machine}"] = ("cuda", ["_cpu.so", "_cuda.so"])
    return found | {"torch-cpu": ("cpu", []), "torch-cuda": ("cuda", [])}


def write(folder: Path, libraries: Path) -> None:
    """The layout in `folder`, which is replaced; `libraries` has those of `compiled`, or none."""
    shutil.rmtree(folder, ignore_errors=True)
    texts = modules()
    name = digest(texts)
    texts["namespaces.py"] = NAMESPACES.format(digest=name)

    for variant, (backend, files) in variants(libraries).items():
        place = folder / "build" / variant
        for file, text in texts.items():
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).write_text(text)
        for file in files:
            shutil.copy2(libraries / file, place / file)

        # the loader makes `id` the module's name: two variants of one build may be loaded in one process
        kind = "native" if files else "python"
        metadata = {
            "id": f"_{PACKAGE}_{backend}_{kind}_{name}", "name": "sdpo-kernels", "version": VERSION,
            "license": "Apache-2.0", "python-depends": [], "backend": {"type": backend},
        }  # fmt: skip
        (place / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (folder / "README.md").write_text(README)
    shutil.copy2(ROOT / "LICENSE", folder / "LICENSE")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    write(folder, compiled(digest(modules()), folder.with_name(f"{folder.name}-libraries")))
    for variant in sorted((folder / "build").iterdir()):
        print(variant)


if __name__ == "__main__":
    main()
