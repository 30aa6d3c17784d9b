"""Run untrusted programs, such as those a model wrote: each can spoil its own result and nothing else.

    outcome = run_limited(["python3", "-c", "print(input())"], "hello", Limits(seconds=5))
    outcome.passed, outcome.reason, outcome.output      # True, "ok", "hello\n"

bubblewrap (`bwrap`) hides the network, other processes and the user's files; rlimits, a tmpfs of limited size and,
if one can be created, a cgroup limit what a program uses. docs/methods.md, "Running programs safely", has the details.
"""

from __future__ import annotations

import glob
import math
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.sources.cgroup import join, new_cgroup, out_of_memory

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py").read_text("utf-8")
HEAD_BYTES = 2000  # of output, kept for messages
LOOK_SECONDS, START_SECONDS = 0.02, 60.0  # between looks at the deadline; for a sandbox to start
NOBODY = 65534  # root's programs run as this user: RLIMIT_NPROC does not bind root
ETC = ["alternatives", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "nsswitch.conf", "passwd"]
SYSTEM = ["/usr", "/bin", "/sbin", "/nix/store", *glob.glob("/lib*"), *(f"/etc/{name}" for name in ETC)]
ALONE = "resource limits alone: they can read and write your files and use the network"
UNSAFE = f"set source.unsafe: true, which runs programs with {ALONE}"


@dataclass(frozen=True)
class Limits:
    """What one program may use. UserError for a value that is not positive."""

    seconds: float = 10.0  # wall-clock time of all of it; CPU time of each process
    memory_mb: int = 2048  # MiB: address space of each process; with a cgroup also memory of all together
    processes: int = 64  # processes and threads at a time
    file_mb: int = 64  # MiB: each file; all files in /tmp together
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

    exit_code: int | None  # minus the signal for a program that died of one; None if it was stopped
    reason: str  # "ok", "exit 1", "timeout", "killed: memory | output | file size | sandbox | SIGSEGV"
    seconds: float  # wall-clock time from its start to its end
    output: str  # the first 2000 bytes of stdout and stderr
    isolated: bool  # it ran under bubblewrap

    @property
    def passed(self) -> bool:
        """It ended by itself with exit code 0."""
        return self.exit_code == 0


@dataclass(frozen=True)
class Job:
    """One program to run. `{name}` in the command becomes the full path of the file `name` of `files`."""

    command: Sequence[str]
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)  # name → text, written into the working folder
    readable: Sequence[str] = ()  # files and folders it may read besides the system and the files its command names
    unsafe: bool = False  # run it without bubblewrap


def run_limited(command: Sequence[str], stdin: str, limits: Limits, files: Mapping[str, str] | None = None) -> Outcome:
    """The outcome of one program, run in an empty folder that is also its HOME and TMPDIR.

    Afterwards the folder and all processes of the program are gone. May be called from any thread. UserError if the
    program or bubblewrap cannot start.
    """
    return _run(Job(command, stdin, files or {}), limits)


def run_many(jobs: Sequence[Job], limits: Limits, workers: int) -> list[Outcome]:
    """The outcomes of `jobs`, in their order, `workers` running at a time. UserError as run_limited."""
    with ThreadPoolExecutor(workers, thread_name_prefix="sandbox") as pool:
        waiting = [pool.submit(_run, job, limits) for job in jobs]
        try:
            return [future.result() for future in waiting]
        finally:  # after an error or Ctrl-C: those that run end by their own limits, the others never start
            pool.shutdown(wait=False, cancel_futures=True)


def _run(job: Job, limits: Limits) -> Outcome:
    """Start the program, watch it until it ends or reaches a limit, and kill what is left of it."""
    user = NOBODY if os.geteuid() == 0 and not job.unsafe else 0
    with ExitStack() as stack:
        folder = "/tmp"
        if job.unsafe:
            folder = tempfile.mkdtemp(prefix="sdpo-program-")
            remove = ["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', folder]  # whatever the program left there
            stack.callback(subprocess.run, remove, capture_output=True, check=False)
        group = stack.enter_context(new_cgroup((limits.memory_mb + limits.file_mb) << 20, limits.processes + 1))
        channel, theirs = map(stack.enter_context, socket.socketpair())
        channel.settimeout(START_SECONDS)
        process = stack.enter_context(_start(job, limits, folder, user, theirs))
        theirs.close()

        first, stopped, output, start = 0, "", b"", time.monotonic()
        try:
            first = _first_process(process, channel, user, job.unsafe)
            group = join(group, first)
            channel.send(b"x")  # go
            start = time.monotonic()
            stopped, output = _watch(process, limits, group, first, start + limits.seconds)
        finally:
            seconds = time.monotonic() - start
            channel.shutdown(
                socket.SHUT_WR
            )  # ends a sandbox that is not ready; killing bubblewrap then leaves a process
            with suppress(ProcessLookupError):
                if job.unsafe:
                    os.killpg(process.pid, signal.SIGKILL)
                elif first and process.poll() is None:  # the end of the first process ends all others, then bubblewrap
                    os.kill(first, signal.SIGKILL)
            process.wait()
        output += _read(process)
        status = channel.recv(4096).decode()

    if "!" in status:
        raise UserError(f"cannot start {job.command[0]}: {status.partition('!')[0]}")
    code = os.waitstatus_to_exitcode(int(status)) if status and not stopped else None
    return Outcome(
        code, stopped or _reason(code), seconds, output[:HEAD_BYTES].decode(errors="replace"), not job.unsafe
    )


def _start(job: Job, limits: Limits, folder: str, user: int, channel: socket.socket) -> subprocess.Popen[bytes]:
    """Start the sandbox's first process, which waits for the word to run the program. UserError as run_limited."""
    environment = {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}", "LANG": "C.UTF-8"}
    environment |= {"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}  # each thread takes address space
    words = [os.path.realpath(sys.executable), "-I", "-S", "-c", LAUNCHER, str(channel.fileno()), str(user)]
    words += [_rlimits(limits, user, job.unsafe), *_command(job, folder)]
    with ExitStack() as stack:
        texts = [text.encode(errors="replace") for text in (job.stdin, *job.files.values())]
        streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in texts]
        for stream, text in zip(streams, texts, strict=True):
            stream.write(text)
            stream.seek(0)
        given = [
            channel.fileno(),
            stack.enter_context(channel.dup()).fileno(),
            *(file.fileno() for file in streams[1:]),
        ]
        if job.unsafe:
            for name, text in zip(job.files, texts[1:], strict=True):
                Path(folder, name).write_bytes(text)
        else:
            words = [*_bubblewrap(job, limits, user, environment["PATH"], given), *words]
        return subprocess.Popen(
            words,
            stdin=streams[0],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=folder,
            env=environment,
            pass_fds=given,
            start_new_session=True,  # Ctrl-C is for the training process
        )


def _first_process(process: subprocess.Popen[bytes], channel: socket.socket, user: int, unsafe: bool) -> int:
    """The pid of the sandbox's first process, when it is ready. UserError if the sandbox cannot be set up."""
    told, first = b"", process.pid if unsafe else 0
    try:
        while b"ready" not in told:
            chunk = channel.recv(4096)
            if not chunk:
                raise OSError("its first process ended")
            told += chunk
            found = re.search(rb'"child-pid": (\d+),', told)
            if found and not first:
                first = int(found[1])
                if user:  # bubblewrap waits for the users of its namespace: root to set it up, nobody for the program
                    for kind in ("uid_map", "gid_map"):
                        Path(f"/proc/{first}/{kind}").write_text(f"0 0 1\n{user} {user} 1\n")
                    channel.send(b"x")
    except OSError as error:
        channel.shutdown(socket.SHUT_WR)
        process.wait()
        said = _read(process).decode(errors="replace").strip() or error
        advice = "" if unsafe else f"; allow bubblewrap (0.7 or newer) to create user namespaces, or {UNSAFE}"
        raise UserError(f"the sandbox for programs cannot start: {said}{advice}") from error
    return first


def _watch(
    process: subprocess.Popen[bytes], limits: Limits, group: list[Path], first: int, deadline: float
) -> tuple[str, bytes]:
    """Wait until the program ends or reaches a limit. The limit, if any, and the start of the output."""
    output, written, memory, poll = b"", 0, limits.memory_mb << 20, select.poll()
    assert process.stdout is not None
    poll.register(process.stdout, select.POLLIN)
    while process.poll() is None and not out_of_memory(group, first, memory):
        if time.monotonic() >= deadline:
            return "timeout", output
        if poll.poll(LOOK_SECONDS * 1000):
            chunk = _read(process)
            output, written = (output + chunk)[:HEAD_BYTES], written + len(chunk)
            if written > limits.output_kb << 10:
                return "killed: output", output
            if not chunk:  # the end; the program may go on without its output
                poll.unregister(process.stdout)
    return "killed: memory" if out_of_memory(group, first, memory) else "", output


def _read(process: subprocess.Popen[bytes]) -> bytes:
    """Output that is there already."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    with suppress(BlockingIOError):
        return os.read(process.stdout.fileno(), 1 << 16)
    return b""


def _reason(code: int | None) -> str:
    """An exit code (minus the signal, for a program that died of one) in words."""
    if code is None or code >= 0:
        return "killed: sandbox" if code is None else f"exit {code}" if code else "ok"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return {"SIGXCPU": "timeout", "SIGXFSZ": "killed: file size"}.get(name, f"killed: {name}")


def _command(job: Job, folder: str) -> list[str]:
    """The words of the command with the paths of its files. UserError for a command or a file name that is none."""
    command = list(job.command)
    for name in job.files:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"files: was {name!r}, must be a file name without a folder")
        command = [word.replace("{" + name + "}", f"{folder}/{name}") for word in command]
    if not command or not command[0] or any("\0" in word for word in command):
        raise UserError(f"not a command that can be run: {command}")
    return command


def _rlimits(limits: Limits, user: int, unsafe: bool) -> str:
    """number:soft:hard of what the kernel limits for each process, and for the user the number of processes."""
    # in a new user namespace only the sandbox's own processes count, but before Linux 5.14 all of the user
    alone = not unsafe and tuple(map(int, re.findall(r"\d+", platform.release())[:2])) >= (5, 14)
    others = 0 if alone else len(glob.glob("/proc/[0-9]*/task/*"))
    wanted = {"CORE": 0, "AS": limits.memory_mb << 20, "FSIZE": limits.file_mb << 20, "NOFILE": 256}
    wanted |= {"CPU": math.ceil(limits.seconds), "NPROC": limits.processes + (not user) + others}
    words = []
    for name, value in wanted.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
        words.append(f"{number}:{min(value, most)}:{min(value + (name == 'CPU'), most)}")  # SIGXCPU, then SIGKILL
    return " ".join(words)


def _bubblewrap(job: Job, limits: Limits, user: int, path: str, given: list[int]) -> list[str]:
    """The words in front of a command that runs under bubblewrap. UserError without it, or for what cannot be read."""
    program = shutil.which("bwrap")
    if program is None:
        raise UserError(
            f"bubblewrap is not installed: apt-get install bubblewrap / dnf install bubblewrap; or {UNSAFE}"
        )
    words = [program, "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1", "--hostname", "sandbox"]
    words += ["--info-fd", str(given[1]), "--proc", "/proc", "--dev", "/dev"]
    if user:
        words += ["--unshare-user", "--userns-block-fd", str(given[0]), "--uid", "0", "--gid", "0"]
        words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for folder in ("/tmp", "/dev/shm"):
        words += ["--perms", "0777", "--size", str(limits.file_mb << 20), "--tmpfs", folder]
    for place in SYSTEM:
        words += ["--ro-bind-try", place, place]
    for place in _readable(job, user, path):
        for parent in reversed(Path(place).parents[:-1]):
            words += ["--dir", str(parent)]
        words += ["--ro-bind", place, place]
    for name, number in zip(job.files, given[2:], strict=True):
        words += ["--perms", "0666", "--file", str(number), f"/tmp/{name}"]
    return [*words, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _readable(job: Job, user: int, path: str) -> list[str]:
    """What a program may read besides the system, none inside another. UserError for what it could not."""
    prefixes = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]
    words = [shutil.which(job.command[0], path=path), *job.command]
    named = [*job.readable, *(word for word in words if word and os.path.isabs(word) and os.path.isfile(word))]
    for place in named:
        needed = 0o005 if os.path.isdir(place) else 0o004
        if not os.path.exists(place) or os.path.realpath(place) in ("/", "/tmp", "/dev", "/proc"):
            raise UserError(f"readable: was {place}, must be a file or folder that exists, and not / or /tmp")
        if user and os.stat(place).st_mode & needed != needed:
            raise UserError(f"{place}: must be readable by all users (chmod a+rX), since root's programs run as nobody")
    found = list(SYSTEM)
    for place in sorted(map(os.path.abspath, (*prefixes, *map(os.path.realpath, prefixes), *named)), key=len):
        if not any(place == known or place.startswith(f"{known}/") for known in found):
            found.append(place)
    return found[len(SYSTEM) :]
