"""The package's floors: a module imports only from floors below its own, and the kernels import none of the extras.

The driver's folder is too large for one floor, so its own folders and files are rooms as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sdpo_kernels"

# the rooms, from the ground up; a room may import from lower floors, and its own files from each other
FLOORS = [
    {"version", "head"},
    {"losses", "rows"},
    {"backends"},
    {"logps", "logits"},
    {"dpo", "diffusion"},
    {""},  # the package's own __init__, which gathers the public names of the kernels
    {"integrations"},
    {"stepwise"},  # the driver's __init__, which imports nothing
    {"stepwise.common"},
    {"stepwise.settings"},
    {"stepwise.data", "stepwise.record"},
    {"stepwise.models", "stepwise.report"},
    {"stepwise.references"},
    {"stepwise.state"},
    {"stepwise.sources"},
    {"stepwise.training"},
    {"stepwise.prepare"},
    {"stepwise.stage", "stepwise.score", "stepwise.post"},
    {"stepwise.run", "stepwise.check"},
    {"cli"},
    {"__main__"},
]
ROOM_OF = {
    "logps_op": "logps",
    "epilogue_op": "logps",
    "dpo_checks": "dpo",
    "dpo_output": "dpo",
    "token_weights": "dpo",
}  # files that live in another's room
EXTRAS = {
    "accelerate", "cut_cross_entropy", "datasets", "huggingface_hub", "liger_kernel", "matplotlib", "peft", "pydantic",
    "rich", "ruamel", "safetensors", "tensorboard", "transformers", "trl", "typer",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """The modules of the package that module `name` imports, at its top or inside a function."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules
            if len(submodules) < len(node.names):  # a name of the module itself
                found.add(base)
    return {module for module in found if module.split(".")[0] == PACKAGE} - {name}


def room(name: str) -> str:
    """The room a module lives in: the first part of its name under the package, in the driver the first two."""
    parts = name.split(".")[1:]
    if parts[:1] == ["stepwise"]:
        return ".".join(parts[:2])
    first = parts[0] if parts else ""
    return ROOM_OF.get(first, first)


def floor(name: str) -> int:
    """The number of the floor that a module lives on."""
    for number, rooms in enumerate(FLOORS):
        if room(name) in rooms:
            return number
    raise AssertionError(f"{name} stands on no floor: enter it in FLOORS (see design/architecture.md)")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name):
    for other in imported(name):
        assert other in MODULES, f"{name} imports {other}, which is not there"
        if room(other) != room(name):
            assert floor(other) < floor(name), f"{name} imports {other} from its own floor or one above"


def test_no_circles_of_folders():
    graph: dict[str, set[str]] = {}
    for name in MODULES:
        graph.setdefault(room(name), set()).update(room(other) for other in imported(name) if room(other) != room(name))
    TopologicalSorter(graph).prepare()


def test_the_drivers_top_holds_only_its_own_story():
    top = {path.stem for path in (ROOT / PACKAGE / "stepwise").glob("*.py")}
    assert top == {"__init__", "run", "stage", "prepare", "state", "check", "score"}


def test_no_circles():
    # a package's __init__ runs before any of its modules; only what modules ask for by name counts here
    TopologicalSorter({name: imported(name) for name in MODULES}).prepare()


def test_the_parser_sees_imports_of_every_form(monkeypatch, tmp_path):
    source = tmp_path / "thing.py"
    source.write_text(
        "import os, sdpo_kernels.rows\nfrom sdpo_kernels import losses, ScoredRows\nfrom . import head\n"
        "from .backends.base import EXTRAS\n\ndef late():\n    from sdpo_kernels.dpo import pair_output\n"
    )
    monkeypatch.setitem(MODULES, "sdpo_kernels.thing", source)
    names = {"", ".rows", ".losses", ".head", ".backends.base", ".dpo"}
    assert imported("sdpo_kernels.thing") == {PACKAGE + name for name in names}


@pytest.mark.parametrize("name", ["", ".integrations", ".integrations.trl", ".integrations.liger"])
def test_importing_the_package_imports_none_of_the_extras(name):
    program = (
        f"import sys, torch; before = set(sys.modules); import {PACKAGE}{name}; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    new = set(answer.stdout.split())
    assert PACKAGE in new
    assert not new & EXTRAS
