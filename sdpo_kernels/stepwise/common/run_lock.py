"""The lock of a run's folder: only one run at a time works in it, and all ranks must see the same folder."""

from __future__ import annotations

import fcntl
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create `folder` and hold its lock within the block. The system releases it when rank 0 ends, however it ends.

    UserError if another run holds the lock, if the folder cannot be created, or if a rank sees another folder.
    """
    with ExitStack() as held:
        token = ranks.on_first(lambda: _lock(folder, held))
        ranks.agree(lambda: _require_shared(folder, token))
        yield


def _lock(folder: Path, held: ExitStack) -> str:
    """Create and lock the folder until `held` is closed; returns the token written into the lock file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be created: {error.strerror or error}") from error

    stream = held.enter_context((folder / LOCK).open("a"))
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is working on this run") from None
    except OSError as error:  # a file system without locks
        raise UserError(f"output_dir: {folder} cannot be locked: {error.strerror or error}") from error

    # a token of this run's own: a rank that finds an older one in its folder is looking at another disk
    stream.truncate(0)
    stream.write(token := uuid.uuid4().hex)
    stream.flush()
    return token


def _require_shared(folder: Path, token: str, seconds: float = 10.0) -> None:
    """UserError if this rank does not see rank 0's token within `seconds`, as a network file system may be slow."""
    end = time.monotonic() + seconds
    while not ((folder / LOCK).exists() and (folder / LOCK).read_text() == token):
        if time.monotonic() > end:
            raise UserError(f"output_dir: {folder} is not the same folder on all nodes; put it on a shared file system")
        time.sleep(0.05)
