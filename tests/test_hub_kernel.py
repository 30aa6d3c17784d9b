"""The layout of `make hub-kernel`: copies in two folders, loaded in one process, compute what the package computes.

With the package `kernels` installed its own loader loads them. Without it they are loaded as it does, and as its older
versions did. The compiled variant is built here if the objects of csrc/ are there: then only one file is compiled.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sdpo_kernels
from sdpo_kernels.backends import BACKENDS
from tests import hub_kernel

pytestmark = pytest.mark.xdist_group("hub kernel")  # compiled once
ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"hidden": (24, 16), "weight": (130, 16)}


@pytest.fixture(scope="module")
def python_only(tmp_path_factory) -> Path:
    """The layout without libraries."""
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    hub_kernel.write(folder, folder / "none")
    return folder


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """The layout with the CPU's library."""
    if BACKENDS["native"].load_error or BACKENDS["native"].unavailable_reason:
        pytest.skip("the native library is not built")
    if not list((ROOT / "build" / "objects").glob("avx512bf16-*.o")):
        pytest.skip("csrc/ was compiled elsewhere, and compiling it takes a minute: python setup.py build_ext")
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    name = hub_kernel.digest(hub_kernel.modules())
    hub_kernel.write(folder, hub_kernel.compiled(name, folder.with_name("libraries"), cuda=False))
    return folder


def load_by_its_loader(folder: Path) -> ModuleType:
    """`get_local_kernel` of the installed `kernels`."""
    return pytest.importorskip("kernels").get_local_kernel(folder, backend="cpu")


def load_as(name: str, variant: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def variant_for_cpu(folder: Path) -> Path:
    """The one that `kernels` prefers: compiled for the stable ABI, else the one for any machine."""
    stable = list((folder / "build").glob(f"{hub_kernel.STABLE_ABI}-cpu-*"))
    return stable[0] if stable else folder / "build" / "torch-cpu"


def load_by_id(folder: Path) -> ModuleType:
    """As `kernels` 0.17: the module's name is the build's id, so copies of one build share their submodules."""
    variant = variant_for_cpu(folder)
    return load_as(json.loads((variant / "metadata.json").read_text())["id"], variant)


def load_by_path(folder: Path) -> ModuleType:
    """As older versions: the module's name is of the path, so every copy is imported anew."""
    return load_as(f"sdpo_kernels_{abs(hash(folder)):x}", variant_for_cpu(folder))


LOADERS = {"its loader": load_by_its_loader, "id": load_by_id, "path": load_by_path}


def results(kernel: ModuleType, dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probs, losses and all gradients."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in SHAPES.values())
    targets = torch.randint(0, 130, (24,))
    targets[::5] = -100
    found = []

    out = kernel.linear_logps(hidden, weight, targets, outputs=["entropy"], softcap=20.0)
    (out.logps.sum() + out.entropy.sum()).backward()
    found += [out.logps, out.entropy, hidden.grad, weight.grad]

    for loss in ("sigmoid", "ipo", "simpo"):
        hidden.grad = weight.grad = None
        reference = {} if loss == "simpo" else {"ref_logps": -torch.rand(4) * 30}
        pairs = kernel.fused_linear_dpo(hidden.view(4, 6, 16), weight, targets.view(4, 6), loss_type=loss, **reference)
        pairs.loss.backward()
        found += [pairs.loss, hidden.grad, weight.grad]

    logits = torch.randn(24, 130, dtype=dtype, requires_grad=True)
    rows = kernel.logits_logps(logits, targets.clamp(min=0))
    rows.sum().backward()
    return [*found, rows, logits.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("layout", ["python_only", "native"])
def test_two_copies_in_one_process_compute_what_the_package_does(request, tmp_path, monkeypatch, layout, loader, dtype):
    built = request.getfixturevalue(layout)
    copies = [Path(shutil.copytree(built, tmp_path / name)) for name in "ab"]
    kernels = [LOADERS[loader](copy) for copy in copies]
    assert all(Path(kernel.__file__).is_relative_to(copy) for kernel, copy in zip(kernels, copies, strict=True))

    if layout == "python_only":
        monkeypatch.setenv("SDPO_BACKEND", "eager")  # of the package; the copies have no other
    wanted = results(sdpo_kernels, dtype)
    for kernel in [*kernels, kernels[0]]:
        found = results(kernel, dtype)
        assert len(found) == len(wanted) == 15
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", ["python_only", "native"])
def test_each_copy_calls_operators_of_its_build(request, tmp_path, layout):
    built = request.getfixturevalue(layout)
    first, second = (load_by_path(Path(shutil.copytree(built, tmp_path / name))) for name in "cd")
    name = hub_kernel.digest(hub_kernel.modules())
    spaces = [sys.modules[f"{kernel.__name__}.namespaces"] for kernel in (first, second)]
    assert spaces[0].OPERATORS != spaces[1].OPERATORS
    assert all(space.OPERATORS.startswith(f"sdpo_kernels_{name}") for space in spaces)
    for kernel, space in zip((first, second), spaces, strict=True):
        op = sys.modules[f"{kernel.__name__}.logps_op"].linear_logps_op
        assert op._qualname == f"{space.OPERATORS}::linear_logps"
        backend = sys.modules[f"{kernel.__name__}.backends"].BACKENDS["native"]
        assert backend is not BACKENDS["native"]
        assert (backend.unavailable_reason is None) == (layout == "native")
        assert backend.load_error is None
        if layout == "native":
            assert backend.operators.name == f"sdpo_native_{name}"


def test_compiling_a_copy_finds_its_own_operators(python_only, tmp_path):
    """torch.compile traces through the custom ops; two copies do not share them."""
    kernel = load_by_path(Path(shutil.copytree(python_only, tmp_path / "e")))
    hidden, weight, targets = torch.randn(6, 16), torch.randn(40, 16), torch.randint(0, 40, (6,))

    def logps(h, w, t):
        return kernel.linear_logps(h, w, t).logps

    found = torch.compile(logps, backend="eager", fullgraph=True)(hidden, weight, targets)
    assert torch.equal(found, logps(hidden, weight, targets))


def test_nothing_in_it_imports_the_package_or_what_a_kernel_may_not_need(python_only):
    """Relative imports, torch, Triton and the standard library; each variant is the same code."""
    variants = sorted((python_only / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda"]
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in variants[0].rglob("*.py"):
        assert path.read_bytes() == (variants[1] / path.relative_to(variants[0])).read_bytes()
        optional = {"cutlass", "quack"} if path.name == "persistent_kernel.py" else set()  # imported on request
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed | optional, (path, names)


def test_the_metadata_is_what_the_loader_reads(python_only):
    texts = [path.read_text() for path in sorted((python_only / "build").glob("*/metadata.json"))]
    read = [json.loads(text) for text in texts]
    assert [data["backend"]["type"] for data in read] == ["cpu", "cuda"]
    assert len({data["id"] for data in read}) == 2
    assert all(data["id"].isidentifier() for data in read)
    if importlib.util.find_spec("kernels"):
        from kernels._rust import Metadata

        assert [Metadata.from_bytes(text.encode()).id for text in texts] == [data["id"] for data in read]


def test_another_source_is_another_build():
    texts = hub_kernel.modules()
    changed = texts | {"rows.py": texts["rows.py"] + "\n"}
    assert hub_kernel.digest(texts) == hub_kernel.digest(dict(texts)) != hub_kernel.digest(changed)
