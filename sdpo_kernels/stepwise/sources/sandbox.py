"""Run programs that nobody has read, such as those a model wrote, so that each can cost its own result and no more.

    outcome = run_limited(["python3", "-c", "print(input())"], "hello", Limits(seconds=5))
    outcome.passed, outcome.reason, outcome.output      # True, "ok", "hello\n"

sandbox_watcher.py holds the limits, in a process of its own beside each program. This keeps accidents off the run; it
is no wall against an attacker. Network access is not cut off, files that the user may read can be read, and without
namespaces (`Outcome.isolated` is False) a program may also write the user's files and kill the user's processes.
Run it in a container where that matters.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.common.errors import UserError

WATCHER = Path(__file__).with_name("sandbox_watcher.py")
KILL_SECONDS = 10.0  # for processes to go after SIGKILL
START_SECONDS = 30.0  # beyond the program's own time, for the watcher to start, to kill and to answer
WATCHER_LOST = "killed: the watcher"


@dataclass(frozen=True)
class Limits:
    """What one program may use. UserError for a value that is not positive."""

    seconds: float = 10.0  # wall-clock time of all of it; CPU time of each process
    memory_mb: int = 2048  # MiB: address space of each process; resident memory of all of them together
    processes: int = 64  # processes and threads at a time
    file_mb: int = 64  # MiB: each file; all files in the temporary folder together (each counts for 4 KiB at least)
    output_kb: int = 256  # KiB of stdout and stderr together

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not 0 < value < 1 << 31 or (limit.name != "seconds" and value != int(value)):
                kind = "number" if limit.name == "seconds" else "whole number"
                raise UserError(f"the limit {limit.name} must be a positive {kind}, not {value}")


@dataclass(frozen=True)
class Outcome:
    """How one program ended."""

    exit_code: int | None  # minus the signal for a program that died of one; None where it was stopped
    reason: str  # "ok", "exit 1", "timeout", "killed: memory | processes | disk | output | file size | SIGSEGV"
    seconds: float  # wall-clock time from its start to its end
    output: str  # the first 2000 bytes of stdout and stderr
    isolated: bool  # namespaces were to be had: it saw no process but its own and could write only its own files

    @property
    def passed(self) -> bool:
        """It ended by itself with exit code 0."""
        return self.exit_code == 0


@dataclass(frozen=True)
class Job:
    """One program to run. `{name}` in the command becomes the full path of the file `name` of `files`."""

    command: Sequence[str]
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)  # name → text, written into the temporary folder


def run_limited(command: Sequence[str], stdin: str, limits: Limits, files: Mapping[str, str] | None = None) -> Outcome:
    """Run `command` in a new temporary folder and remove that; whatever the program does becomes an Outcome.

    The folder is its working directory, HOME and TMPDIR. Of the environment only PATH is passed on. When this returns,
    no process that the program started is left, with one exception: without namespaces a program that kills its own
    watcher leaves those that have neither the environment nor the folder it was given. May be called from any thread.
    UserError where the command cannot be started at all, and on Windows.
    """
    if os.name != "posix":
        raise UserError("programs can be run within limits only on Linux (or another POSIX system), not on Windows")
    job = Job(command, stdin, files or {})
    with _temporary_folder() as folder:
        answer: dict[str, Any] = {"reason": WATCHER_LOST}
        try:
            answer = _watched(_request(job, limits, folder), limits.seconds + START_SECONDS)
        finally:
            if answer["reason"] == WATCHER_LOST:  # or failed
                _kill_processes_of(folder)
    cannot_start = answer.pop("cannot_start")
    if cannot_start:
        raise UserError(f"cannot start {command[0]}: {cannot_start}")
    return Outcome(**answer)


def run_many(jobs: Sequence[Job], limits: Limits, workers: int) -> list[Outcome]:
    """The outcomes of `jobs`, in their order, `workers` running at a time. UserError as run_limited."""
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="sandbox") as pool:
        waiting = [pool.submit(run_limited, job.command, job.stdin, limits, job.files) for job in jobs]
        try:
            return [future.result() for future in waiting]
        finally:  # after an error or Ctrl-C: those that run end by their own limits, the others never start
            pool.shutdown(wait=False, cancel_futures=True)


def _request(job: Job, limits: Limits, folder: Path) -> dict[str, Any]:
    """Lay out the temporary folder; what the watcher has to know. UserError for a command that is none."""
    work = folder / "work"
    work.mkdir()
    (folder / "stdin").write_bytes(job.stdin.encode(errors="replace"))
    command = list(job.command)
    for name, text in job.files.items():
        (work / name).write_bytes(text.encode(errors="replace"))
        command = [word.replace("{" + name + "}", str(work / name)) for word in command]
    if not command or not command[0] or any("\0" in word for word in command):
        raise UserError(f"not a command that can be run: {command}")
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": str(work),
        "TMPDIR": str(work),
        "OMP_NUM_THREADS": "1",  # else numpy starts a thread for each core, and memory_mb has no room for that
    }
    paths = {"folder": str(folder), "work": str(work), "stdin": str(folder / "stdin")}
    return {"command": command, "environment": environment} | paths | asdict(limits)


def _watched(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The answer of a new watcher to the request, within `seconds`. UserError where it cannot run."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", str(WATCHER)],
        stdin=subprocess.PIPE,  # kept open: its end tells the watcher that this process is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        start_new_session=True,
        bufsize=0,
    )
    with watcher:
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        assert watcher.stderr is not None
        try:
            _write(watcher.stdin.fileno(), json.dumps(request).encode() + b"\n")
            answer = _read(watcher.stdout.fileno(), seconds)
            if not answer:
                watcher.kill()
        finally:  # with an exception too: the watcher kills the program and ends
            watcher.stdin.close()
        if not answer:
            error = watcher.stderr.read().decode(errors="replace").strip()
            if error:
                raise UserError(f"cannot run programs within limits: {error.splitlines()[-1]}")
            return _lost(request["seconds"])
    return json.loads(answer)


def _lost(seconds: float) -> dict[str, Any]:
    """The answer in place of a watcher that was killed, or that could not kill the program."""
    fields = {"exit_code": None, "reason": WATCHER_LOST, "seconds": seconds, "output": "", "isolated": False}
    return fields | {"cannot_start": ""}


def _kill_processes_of(folder: Path) -> None:
    """Kill what is left of a program whose watcher was killed (Linux): every process whose environment, as it was
    started, or whose working directory names its temporary folder."""
    name, deadline = os.fsencode(folder), time.monotonic() + KILL_SECONDS
    while found := [pid for pid in _process_ids() if _names(pid, name)]:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            warnings.warn(f"processes of a program in {folder} could not be killed: {found}", stacklevel=2)
            return


def _process_ids() -> list[int]:
    """Every process of this system; none where there is no /proc."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc") else []


def _names(pid: int, folder: bytes) -> bool:
    """Whether a living process that we may look into was started for `folder` or stands in it."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            return folder in stream.read() or folder in os.fsencode(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:  # gone, or another user's
        return False


def _write(descriptor: int, content: bytes) -> None:
    """Write all of `content`, unless the reader is gone."""
    try:
        while content:
            content = content[os.write(descriptor, content) :]
    except BrokenPipeError:
        pass  # _read finds no answer


def _read(descriptor: int, seconds: float) -> bytes:
    """Everything up to the end of a pipe; nothing where that does not come within `seconds`."""
    deadline, content = time.monotonic() + seconds, b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return content
        content += chunk
    return b""


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A new folder, removed afterwards whatever a program left in it."""
    folder = tempfile.mkdtemp(prefix="sdpo-program-")
    try:
        yield Path(folder)
    finally:
        try:
            shutil.rmtree(folder)
        except (OSError, RecursionError):  # a folder closed to us, or thousands of folders in each other
            _remove_stubborn(folder)


def _remove_stubborn(folder: str) -> None:
    """Remove with the tools that go to any depth; a warning where something is left."""
    open_up = [] if os.path.islink(folder) else [["chmod", "-R", "u+rwx", folder]]  # a link there would be followed
    for command in [*open_up, ["rm", "-rf", folder]]:
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if os.path.lexists(folder):
        warnings.warn(f"what a program left in {folder} could not be removed", stacklevel=2)
