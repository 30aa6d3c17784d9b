"""Atomic file operations: whatever kills the process, a file is either complete or absent.

Content is written to a temporary name, fsynced, then renamed into place. In a distributed run only rank 0 writes; on
the other ranks these functions do nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: a reader sees either the old file or the new one.

    1. Write and fsync a temporary file in the same folder.
    2. Rename it to `path`.
    3. fsync the folder, so that the rename survives a crash too.

    Raises UserError if the file cannot be written; the old file then stays as it was.
    """
    if not ranks.is_first():
        return

    # a number of its own, because processes on several machines may have the same id
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)

            # without this a crash could leave the new name on an empty file
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
    """The parsed JSON file. Raises UserError if it cannot be read or parsed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def publish_folder(staging: Path, final: Path) -> None:
    """Rename the finished folder `staging` to `final`, which must not exist, in one step that survives a crash."""
    if not ranks.is_first():
        return
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    os.rename(staging, final)
    sync(final.parent)


def empty_folder(path: Path) -> Path:
    """Create an empty folder at `path`, removing whatever was there."""
    remove_folder(path)
    if ranks.is_first():
        path.mkdir(parents=True)
    return path


def remove_folder(path: Path) -> None:
    """Remove a folder and its content; it is hidden under another name first, so a kill never leaves half of it."""
    if not ranks.is_first():
        return
    doomed = path.with_name(f".{path.name.lstrip('.')}.removing")
    if doomed.exists():  # left by a kill
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
