"""setup.py: says what is missing, finds the torch that pip's build isolation hides, compiles what changed."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent


@pytest.fixture(autouse=True)
def without_variables(monkeypatch):
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "SDPO_TORCH", "SDPO_NATIVE", "SDPO_REQUIRE_NATIVE", "SDPO_SANITIZE"):
        monkeypatch.delenv(name, raising=False)


def loaded_setup(monkeypatch):
    """setup.py, which prints the version and then has its functions."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", "--version"])
    spec = importlib.util.spec_from_file_location("setup_of_sdpo", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_setuptools_is_one_line_that_says_what_to_do(monkeypatch):
    """`python -m venv` of Python 3.11 brings 65.5.0, which cannot read pyproject.toml."""
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"setuptools was 65\.5\.0, must be 77 or later: .* install --upgrade"):
        loaded_setup(monkeypatch)


def test_torch_is_found_where_isolation_hides_it(monkeypatch):
    """pip takes the environment's packages off sys.path, but runs its Python."""
    module = loaded_setup(monkeypatch)
    assert module.find_torch() == TORCH
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module.find_torch() == TORCH


def test_without_torch_the_build_ends_with_the_command_that_installs_it(monkeypatch, tmp_path):
    module = loaded_setup(monkeypatch)
    monkeypatch.setattr(module, "torch_folders", lambda: [tmp_path / "torch"])
    with pytest.raises(SystemExit, match=r"torch is not installed for .* First run: pip install 'torch>=2\.10'"):
        module.find_torch()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, r"SDPO_TORCH: was '.*', must be the folder of an installed torch package"),
        ("2.9.1+cpu", r"its version was 2\.9\.1\+cpu, must be 2\.10 or later"),
    ],
)
def test_a_torch_that_cannot_be_built_against(monkeypatch, tmp_path, version, message):
    module = loaded_setup(monkeypatch)
    if version:
        (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setenv("SDPO_TORCH", str(tmp_path))
    with pytest.raises(SystemExit, match=message):
        module.find_torch()
    monkeypatch.setenv("SDPO_TORCH", str(TORCH))
    assert module.find_torch() == TORCH


def test_no_site_packages_means_no_torch(monkeypatch, tmp_path):
    module = loaded_setup(monkeypatch)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path))
    with pytest.raises(SystemExit, match="torch is not installed"):
        module.find_torch()


def test_a_source_is_compiled_once_for_one_command(monkeypatch, tmp_path):
    module = loaded_setup(monkeypatch)
    calls = []
    monkeypatch.setattr(module, "run", lambda command: (calls.append(command), Path(command[-1]).write_text("object")))
    source = tmp_path / "a.cpp"
    source.write_text("int a;")
    first = module.compile_source(["g++"], source, b"headers", tmp_path)
    assert module.compile_source(["g++"], source, b"headers", tmp_path) == first
    assert len(calls) == 1
    changed = {module.compile_source(["clang++"], source, b"headers", tmp_path)}
    changed |= {module.compile_source(["g++"], source, b"other headers", tmp_path)}
    source.write_text("int b;")
    changed |= {module.compile_source(["g++"], source, b"headers", tmp_path)}
    assert len(changed | {first}) == len(calls) == 4


def test_cudas_library_is_compiled_once_for_the_same_sources_and_torch(monkeypatch, tmp_path):
    module = loaded_setup(monkeypatch)
    calls = []
    monkeypatch.setattr(module, "OBJECTS", tmp_path / "objects")
    monkeypatch.setattr(module, "cuda_command", lambda nvcc, library, torch: [nvcc, str(library)])
    monkeypatch.setattr(module, "run", lambda command: (calls.append(command), Path(command[-1]).write_text("library")))
    (tmp_path / "version.py").write_text("1")
    first = module.compile_cuda("true", tmp_path)
    assert module.compile_cuda("true", tmp_path) == first
    assert (len(calls), first.read_text()) == (1, "library")
    (tmp_path / "version.py").write_text("2")
    assert module.compile_cuda("true", tmp_path) != first


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang")
@pytest.mark.parametrize("chip", ["avx2", "avx512", "avx512bf16"])
def test_clang_compiles_each_chips_kernels(monkeypatch, tmp_path, chip):
    """It ignores a whole target attribute if it does not know a part of it, and then lacks the instructions."""
    module = loaded_setup(monkeypatch)
    command = ["clang++", *module.CPU_FLAGS, "-O0", "-Werror", "-c", str(ROOT / "csrc" / "cpu" / f"{chip}.cpp")]
    done = subprocess.run([*command, "-o", str(tmp_path / "chip.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("chip", ["base", "avx2"] if platform.machine() == "x86_64" else ["base"])
def test_the_exponential_is_compiled_to_vectors(monkeypatch, chip):
    """Without masks (AVX-512) GCC made branches of its comparisons: a forward took 1.25 times as long."""
    module = loaded_setup(monkeypatch)
    compiler = module.find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip("needs GCC, which reports its loops")

    # GCC names the line of the loop, which is the one above
    tasks = (ROOT / "csrc/cpu/tasks.inl").read_text(encoding="utf-8")
    line = tasks[: tasks.index("float slope = 1.0f, a = product[j]")].count("\n")
    flags = [*module.CPU_FLAGS, "-fopt-info-vec-optimized"]
    command = [*compiler, *flags, "-c", f"csrc/cpu/{chip}.cpp", "-o", "/dev/null"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(rf"tasks\.inl:{line}:\d+: optimized: loop vectorized", done.stderr)
