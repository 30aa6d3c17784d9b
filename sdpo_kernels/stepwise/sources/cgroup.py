"""A control group for one program and all its processes: limits on their memory and number that the kernel holds."""

from __future__ import annotations

import re
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
REMOVE_SECONDS = 10.0  # for the last process to be gone


@contextmanager
def new_cgroup(memory: int, tasks: int) -> Iterator[list[Path]]:
    """Folders of a new group limited to `memory` bytes and `tasks` processes and threads, removed afterwards.

    Version 1 has a folder for each limit. Empty if this process may not create groups.
    """
    limits = {"pids": {"pids.max": tasks}, "memory": {"memory.limit_in_bytes": memory}}  # version 1
    limits[""] = {"pids.max": tasks, "memory.max": memory, "memory.swap.max": 0}  # version 2
    folders: list[Path] = []
    try:
        with suppress(OSError):
            for line in Path("/proc/self/cgroup").read_text().splitlines():
                _, kind, place = line.split(":", 2)
                if kind in limits:
                    _make(ROOT / kind, place.lstrip("/"), limits[kind], folders)
        yield folders
    finally:
        deadline = time.monotonic() + REMOVE_SECONDS
        for folder in folders:
            _remove(folder, deadline)


def _make(root: Path, place: str, limits: dict[str, int], folders: list[Path]) -> None:
    """Add a new group near the one that this process is in, if that is allowed."""
    parent = root / place if (root / place).is_dir() else root  # in a container the path may be the host's
    if "memory.max" in limits and parent != root:
        parent = parent.parent  # in version 2 a group that holds processes cannot limit groups below it
    if (parent / "cgroup.procs").exists():
        with suppress(OSError):
            folders.append(Path(tempfile.mkdtemp(prefix="sdpo-program-", dir=parent)))
            for name, value in limits.items():
                (folders[-1] / name).write_text(str(value))


def _remove(folder: Path, deadline: float) -> None:
    while True:
        try:
            return folder.rmdir()
        except OSError as error:
            if time.monotonic() > deadline:
                return warnings.warn(f"cannot remove the cgroup {folder}: {error}", stacklevel=2)
        time.sleep(0.005)


def join(folders: list[Path], pid: int) -> None:
    """Move a process into the group; it stays outside where that is not allowed."""
    for folder in folders:
        with suppress(OSError):
            (folder / "cgroup.procs").write_text(str(pid))


def out_of_memory(folders: list[Path]) -> bool:
    """Whether the kernel has killed a process of the group because it was out of memory."""
    with suppress(OSError):
        reports = [path.read_text() for folder in folders for path in folder.glob("memory.[eo][vo][em]*")]
        return any(re.search(r"^oom_kill [1-9]", report, re.MULTILINE) for report in reports)
    return False
