"""`sdpo info`, and both commands where the extra `train` is not installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from sdpo_kernels import __main__, info
from sdpo_kernels.backends import BACKENDS, native_library
from sdpo_kernels.backends.describe import describe_auto
from sdpo_kernels.backends.source_digest import source_digest

ROOT = Path(__file__).resolve().parents[1]

# None in sys.modules: to Python a module that is not installed
WITHOUT = f"import sys, runpy; sys.modules.update(dict.fromkeys({__main__.NEEDED}))\n"


def without_the_extra(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = WITHOUT + f"sys.argv = {['sdpo', *arguments]}; runpy.run_module('sdpo_kernels', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def release(version: str) -> str:
    """Without what torch appends for CUDA: the registry's wheel of 2.11.0 calls itself 2.11.0+cu130 once imported."""
    return version.partition("+")[0]


def lines_of(text: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in text.splitlines())


@pytest.mark.skipif(BACKENDS["native"].unavailable_reason is not None, reason="no library")
def test_it_names_versions_libraries_and_what_auto_takes(monkeypatch):
    monkeypatch.setenv("SDPO_AUTOTUNE", "1")
    text = info.info_text()
    found = lines_of(text)
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert (release(found["torch"]), found["triton"]) == (release(torch.__version__), version("triton"))
    assert {"transformers", "accelerate", "peft", "datasets", "trl", "liger-kernel"} <= set(found)
    assert found["SDPO_AUTOTUNE"] == "1"
    digest = source_digest(ROOT / "csrc", cuda=False)
    assert f"{native_library.LIBRARY} loads: " in text
    assert f"built from sources {digest}" in text
    for dtype in (torch.float32, torch.bfloat16):
        taken = describe_auto(torch.device("cpu"), dtype)
        assert f"auto {str(dtype).removeprefix('torch.')}".ljust(16) + f" on cpu: {taken}" in text.splitlines()


def test_a_package_that_is_missing_and_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("no-such-package",))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert lines_of(info.info_text())["no-such-package"] == "not installed"
    assert lines_of(info.info_text())["torch"].startswith("cannot be imported: ")


def test_info_needs_no_extra():
    done = without_the_extra("info")
    assert (done.returncode, done.stderr) == (0, "")
    assert release(lines_of(done.stdout)["torch"]) == release(torch.__version__)
    assert "auto float32" in done.stdout


@pytest.mark.parametrize("arguments", [["train", "run.yaml"], ["--help"], []])
def test_without_the_extra_sdpo_ends_with_one_line(arguments):
    done = without_the_extra(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: sdpo needs more than the kernels; not installed: typer, pydantic, ")
    assert "run: pip install sdpo-kernels[train]" in line


def test_the_packages_it_needs_are_those_of_the_extra():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = text[text.index("\ntrain = [") : text.index("\nbench = [")]
    assert all(f'"{name}' in extra for name in __main__.NEEDED)
    assert extra.count('"') == 2 * len(__main__.NEEDED)
