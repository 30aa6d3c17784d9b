"""A control group (cgroup) for one program: the kernel limits the memory and number of all its processes together."""

from __future__ import annotations

import glob
import re
import resource
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

    Version 1 has one folder a limit. Empty if this process may not create groups.
    """
    limits = {"pids": {"pids.max": tasks}, "memory": {"memory.limit_in_bytes": memory}}  # version 1
    limits[""] = {"pids.max": tasks, "memory.max": memory, "memory.swap.max": 0}  # version 2
    folders: list[Path] = []
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines() if ROOT.is_dir() else ():
            _, kind, place = line.split(":", 2)
            root = ROOT / kind
            parent = root / place[1:] if (root / place[1:]).is_dir() else root  # a container may see the host's path
            if not kind and parent != root:
                parent = parent.parent  # a version 2 group that holds processes cannot limit groups below it
            with suppress(OSError):  # not allowed, or the controller is off
                if kind in limits and (parent / "cgroup.procs").exists():
                    folders.append(Path(tempfile.mkdtemp(prefix="sdpo-program-", dir=parent)))
                    for name, value in limits[kind].items():
                        (folders[-1] / name).write_text(str(value))
        yield folders
    finally:
        deadline = time.monotonic() + REMOVE_SECONDS
        for folder in folders:
            while folder.exists() and time.monotonic() < deadline:
                with suppress(OSError):  # busy until its last process is gone
                    folder.rmdir()
            if folder.exists():
                warnings.warn(f"cannot remove the cgroup {folder}", stacklevel=2)


def join(folders: list[Path], pid: int) -> list[Path]:
    """Move a process into the group; the folders for which that is allowed."""
    joined = []
    for folder in folders:
        with suppress(OSError):
            (folder / "cgroup.procs").write_text(str(pid))
            joined.append(folder)
    return joined


def out_of_memory(folders: list[Path], first: int, memory: int) -> bool:
    """Whether the kernel had to kill a process of the group, or without one, whether `first` and all its descendants
    hold more than `memory` bytes."""
    for path in (folder / name for folder in folders for name in ("memory.events", "memory.oom_control")):
        with suppress(OSError):
            return re.search(r"^oom_kill [1-9]", path.read_text(), re.MULTILINE) is not None
    return _resident(first) > memory


def _resident(pid: int) -> int:
    """Bytes of memory of a process and all its descendants. 0 if it is gone."""
    with suppress(OSError, IndexError):
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        children = [Path(path).read_text().split() for path in glob.glob(f"/proc/{pid}/task/*/children")]
        return own + sum(_resident(int(child)) for some in children for child in some)
    return 0
