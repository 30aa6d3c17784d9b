"""The package's layers: a module imports only from layers below its own, and the kernels import none of the extras.

The driver's folder is too large for one layer, so its own folders and files are rooms as well.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sdpo_kernels"

# the rooms, from the ground up; a room may import from lower layers, and its own files from each other
LAYERS = [
    {"version", "head"},
    {"losses", "rows"},
    {"backends"},
    {"logps", "logits"},
    {"dpo", "diffusion"},
    {""},  # the package's own __init__, which gathers the public names of the kernels
    {"integrations", "info"},
    {"stepwise"},  # the driver's __init__, which imports nothing
    {"stepwise.common"},
    {"stepwise.settings"},
    {"stepwise.data", "stepwise.record"},
    {"stepwise.models", "stepwise.report"},
    {"stepwise.references", "stepwise.memory"},
    {"stepwise.state"},
    {"stepwise.sources"},
    {"stepwise.training"},
    {"stepwise.prepare"},
    {"stepwise.stage", "stepwise.score", "stepwise.post"},
    {"stepwise.run", "stepwise.check"},
    {"stepwise.starter"},
    {"cli"},
    {"__main__"},
]
ROOM_OF = {
    "logps_op": "logps",
    "vocab_parallel": "logps",
    "sharded": "logps",
    "collectives": "logps",
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


def layer(name: str) -> int:
    """The number of the layer that a module belongs to."""
    for number, rooms in enumerate(LAYERS):
        if room(name) in rooms:
            return number
    raise AssertionError(f"{name} belongs to no layer: enter it in LAYERS (see design/architecture.md)")


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name):
    for other in imported(name):
        assert other in MODULES, f"{name} imports {other}, which is not there"
        if room(other) != room(name):
            assert layer(other) < layer(name), f"{name} imports {other} from its own layer or one above"


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


def newly_imported(program: str) -> set[str]:
    """The top-level modules, and those of torch with one more part, that `program` imports in a fresh process."""
    report = "print(*{'.'.join(name.split('.')[:2 if name.startswith('torch') else 1]) for name in sys.modules})"
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; {program}\n{report}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(answer.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "program",
    [
        f"import {PACKAGE}",
        f"import {PACKAGE}.cli",
        f"import {PACKAGE}.stepwise.common.progress",
        f"import runpy, contextlib; sys.argv = ['sdpo', 'train', '--help']\n"
        f"with contextlib.suppress(SystemExit): runpy.run_module('{PACKAGE}', run_name='__main__')\n",
    ],
    ids=["package", "command", "progress", "help"],
)
def test_help_does_not_wait_for_torch(program):
    assert not {"torch", "numpy", "transformers"} & newly_imported(program)


def test_the_kernels_import_little_more_than_torch():
    """torch._dynamo alone takes a second, which a program that compiles nothing has no use for."""
    program = f"import {PACKAGE}; [getattr({PACKAGE}, name) for name in {PACKAGE}.__all__]"
    new = newly_imported(program) - newly_imported("import torch")
    assert not {"torch._dynamo", "torch._inductor", "sympy", "triton", *EXTRAS} & new


def test_every_public_name_is_where_the_editor_looks_for_it():
    """Names that are imported late stand twice in __init__.py: for people's editors, and for Python."""
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    package = importlib.import_module(PACKAGE)
    assert sorted({*seen, "__version__"}) == package.__all__ == sorted(package.__all__)
    for name, module in seen.items():
        home = importlib.import_module(f"{module}.{name}" if name == "losses" else module)
        assert getattr(package, name) is (home if name == "losses" else getattr(home, name))
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="module 'sdpo_kernels' has no attribute 'linear_logp'"):
        package.linear_logp  # noqa: B018


def test_the_mark_of_a_constant_for_compile_is_torchs_own():
    """native.py sets it without `torch.compiler`, whose function imports torch._dynamo."""
    from sdpo_kernels.backends import native

    def marked():
        pass

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) == {"_dynamo_marked_constant": True}
    assert native._cuda_unavailable_reason._dynamo_marked_constant is True
