"""Files that are either whole or absent, whatever kills the process: written beside, fsynced, renamed into place.

Of several processes only the first writes; the others pass through here without doing anything.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`: a reader sees the old file or the new one. UserError where it cannot be written."""
    if not ranks.is_first():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON in `path`; UserError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def publish_folder(staging: Path, final: Path) -> None:
    """Make the finished folder `staging` appear as `final`, which must not exist, in one step that survives a crash."""
    if not ranks.is_first():
        return
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    os.rename(staging, final)
    sync(final.parent)


def empty_folder(path: Path) -> Path:
    """A new empty folder at `path`; what was there is removed."""
    remove_folder(path)
    if ranks.is_first():
        path.mkdir(parents=True)
    return path


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; renamed out of sight first, so that a kill leaves no half of it in place."""
    if not ranks.is_first():
        return
    doomed = path.with_name(f".{path.name.lstrip('.')}.removing")
    if doomed.exists():  # a kill left it
        shutil.rmtree(doomed)
    if path.exists():
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
