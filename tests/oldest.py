"""Installs the oldest stack into the environment whose Python runs this: `make oldest`.

    python3.12 -m venv build/oldest && build/oldest/bin/python -m tests.oldest

1. torch without its CUDA packages (gigabytes that no test here needs), with stand-ins for their libraries
2. what depends on torch without its dependencies, or pip would install torch's
3. everything else of the project, of the extras `train` and `dev`, and of the packages of 1 and 2

The versions are in oldest.txt; of all others the newest that fit are taken. `datasets` is left out, since only Hub
datasets need it; pyarrow, which comes with it, is there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import tomllib  # of Python 3.11: a third party's to ruff, which checks for 3.10

from tests.old_torch import ROOT, stand_ins

PINS = Path(__file__).with_name("oldest.txt")
DEPEND_ON_TORCH = ("accelerate", "peft")
LEFT_OUT = ("datasets",)
CUDA = re.compile(r"cuda-|nvidia-")


def install(*requirements: str) -> None:
    options = ["--no-warn-conflicts", "-c", str(PINS)]  # torch's CUDA packages are missing on purpose
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, *requirements], check=True)


def name_of(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0]


def wanted_by_the_project() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["train"], *extras["dev"], "pyarrow"]


def wanted_by(package: str) -> list[str]:
    """What an installed package needs, without CUDA's packages and its own extras."""
    return [need for need in requires(package) or [] if "extra ==" not in need and not CUDA.match(need)]


def main() -> None:
    """Install; an exception if anything fails."""
    requirements = wanted_by_the_project()
    alone = ["torch", *(need for need in requirements if name_of(need) in DEPEND_ON_TORCH)]
    install("--no-deps", *alone)

    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    libraries = Path(spec.origin).parent / "lib"
    stand_ins(libraries, libraries)

    for package in ("torch", *DEPEND_ON_TORCH):
        requirements += wanted_by(package)
    here = {"torch", *DEPEND_ON_TORCH, *LEFT_OUT}
    install(*sorted({need for need in requirements if name_of(need) not in here}))


if __name__ == "__main__":
    main()
