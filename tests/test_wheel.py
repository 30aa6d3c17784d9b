"""`make wheel`: one file for every Python, that works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

USE = """
import torch, sdpo_kernels
from sdpo_kernels.backends import native_library
assert "site" in sdpo_kernels.__file__, sdpo_kernels.__file__
logps = sdpo_kernels.linear_logps(torch.zeros(3, 8), torch.zeros(50, 8), torch.arange(3), backend="native").logps
print(float(logps[0]), native_library.CUDA_LIBRARY.exists())
"""


def test_the_wheel_serves_every_python_and_works_outside_the_checkout(tmp_path):
    build = ["-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    libraries = {name for name in names if name.endswith(".so")}
    expected = {"sdpo_kernels/_cpu.so"} | ({"sdpo_kernels/_cuda.so"} if shutil.which("nvcc") else set())
    assert libraries == expected
    assert not any(name.startswith(("tests/", "benchmarks/", "examples/")) for name in names)
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, has_cuda = done.stdout.split()
    assert abs(float(first) + 3.912023) < 1e-6  # −log 50
    assert has_cuda == str(shutil.which("nvcc") is not None)
