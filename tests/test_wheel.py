"""`make wheel`: one file for every Python, that works where there is no checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from sdpo_kernels.backends.source_digest import source_digest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.xdist_group("wheel"),  # built once, and never twice at a time in one checkout
]

USE = """
import torch, sdpo_kernels
from sdpo_kernels.backends import native_library
assert "site" in sdpo_kernels.__file__, sdpo_kernels.__file__
logps = sdpo_kernels.linear_logps(torch.zeros(3, 8), torch.zeros(50, 8), torch.arange(3), backend="native").logps
print(float(logps[0]), native_library.CUDA_LIBRARY.exists())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    """What PyPI would show."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_serves_every_python_and_works_outside_the_checkout(wheel, tmp_path):
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    libraries = {name for name in names if name.endswith(".so")}
    expected = {"sdpo_kernels/_cpu.so"} | ({"sdpo_kernels/_cuda.so"} if shutil.which("nvcc") else set())
    assert libraries == expected
    assert not any(name.startswith(("tests/", "benchmarks/", "examples/")) for name in names)
    assert "sdpo_kernels/py.typed" in names
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
    # what people paste into a bug report, of the installed package
    command = [sys.executable, "-m", "sdpo_kernels", "info"]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"in {site}/sdpo_kernels" in told
    assert f"{site}/sdpo_kernels/_cpu.so loads: " in told
    assert f"built from sources {source_digest(ROOT / 'csrc', cuda=False)}" in told


def test_metadata(metadata):
    assert {"hf", "train"} <= set(metadata.get_all("Provides-Extra"))
    assert 'transformers>=4.57; extra == "hf"' in metadata.get_all("Requires-Dist")
    assert metadata["Author"] == "the sdpo_kernels contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert not [line for line in metadata.get_all("Classifier") if line.startswith("License ::")]  # PEP 639
    pythons = {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)}
    assert pythons | {"Typing :: Typed"} <= set(metadata.get_all("Classifier"))
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    assert set(urls) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert all(url.startswith(urls["Source"]) for url in urls.values())


def test_the_description_has_no_relative_link(metadata):
    """PyPI shows README.md where none of the repository's files are."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    description, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", description)
    relative = [target for _, target in re.findall(r"(!?)\[[^\]]*\]\(([^):]*)\)", readme)]
    assert len(links) >= len(relative) > 5
    assert [target for _, target in links if not target.startswith("https://")] == []
    source = dict(line.split(", ") for line in metadata.get_all("Project-URL"))["Source"]
    for target in relative:
        kind = "raw" if target.endswith(".png") else "tree" if (ROOT / target).is_dir() else "blob"
        assert f"]({source}/{kind}/main/{target})" in description
    pictures = [
        f"{source}/raw/main/{target}" for mark, target in re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", readme) if mark
    ]
    assert [target for picture, target in links if picture] == pictures
    assert f"{source}/raw/main/docs/demo.png" in pictures
    unlinked = r"\]\([^)]*\)"
    assert re.sub(unlinked, "", description).strip() == re.sub(unlinked, "", readme).strip()  # the text itself is kept


def test_the_source_distribution_has_all_that_builds_and_tests_it(tmp_path):
    build = ["setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    (found,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    unneeded = (".", "LICENSE")  # .github, .ci and the like
    assert {name for name in listed if not name.startswith(unneeded)} - names == set()
    assert "sdpo_kernels/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
