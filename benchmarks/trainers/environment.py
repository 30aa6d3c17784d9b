"""A virtual environment for each trainer, made from its pins.

benchmarks/trainers/<name>.txt holds the trainer and everything it needs here, one requirement a line, in two parts:
what comes before the line `# --no-deps` is installed with its dependencies, what comes after it without (packages that
would pull GPU libraries). A first line `# python3.12` asks for another Python than this one. Modules that a trainer
imports at its top and that need a GPU are stubs in benchmarks/trainers/stubs/<name>, first on the path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NO_DEPENDENCIES = "# --no-deps"


def environment(name: str, folder: Path) -> Path:
    """The environment's Python; made anew if the pins have changed."""
    pins = HERE / f"{name}.txt"
    text = pins.read_text(encoding="utf-8")
    mark = folder / "pins.sha256"
    digest = hashlib.sha256(text.encode()).hexdigest()
    python = folder / "env/bin/python"
    if python.exists() and mark.exists() and mark.read_text() == digest:
        return python

    print(f"{name}: making its environment in {folder / 'env'}", file=sys.stderr, flush=True)
    shutil.rmtree(folder / "env", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    first = text.partition("\n")[0]
    base = first.removeprefix("# ") if first.startswith("# python") else sys.executable
    subprocess.run([base, "-m", "venv", str(folder / "env")], check=True)

    with_dependencies, _, without = text.partition(NO_DEPENDENCIES)
    _install(python, folder / "requirements.txt", with_dependencies)
    _install(python, folder / "requirements-no-deps.txt", without, "--no-deps", "--ignore-requires-python")
    _put_on_path(python, HERE / "stubs" / name)
    mark.write_text(digest)
    return python


def _install(python: Path, requirements: Path, text: str, *options: str) -> None:
    requirements.write_text(text, encoding="utf-8")
    if any(line.strip() and not line.startswith("#") for line in text.splitlines()):
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *options]
        subprocess.run([*pip, "-r", str(requirements)], check=True, env=os.environ)


def _put_on_path(python: Path, stubs: Path) -> None:
    """Add the stubs' folder to the environment's import path."""
    if stubs.is_dir():
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        site = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        (Path(site) / "stubs.pth").write_text(f"import sys; sys.path.insert(0, {str(stubs)!r})\n", encoding="utf-8")
