r"""Run untrusted programs, such as those a model wrote: each can spoil its own result and nothing else.

    outcome = run_limited(["python3", "-c", "print(input())"], "hello", Limits(seconds=5))
    outcome.passed, outcome.reason, outcome.output      # True, "ok", "hello\n"

bubblewrap hides the network, other processes and the user's files. util-linux's prlimit limits each process, and this
process stops a program at its time, memory or output. docs/methods/sandbox.md has the details.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sdpo_kernels.stepwise.common.errors import UserError

LOOK_SECONDS, HEAD_BYTES = 0.05, 2000  # between looks at a running program; of output, kept for messages
ETC = ["alternatives", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "nsswitch.conf", "passwd"]
SYSTEM = ["/usr", "/bin", "/sbin", "/nix/store", *map(str, Path("/").glob("lib*")), *(f"/etc/{name}" for name in ETC)]
HIDDEN = ("/", "/tmp", "/dev", "/proc")  # a program has its own
ADVICE = "apt-get install bubblewrap (0.8 or newer) and allow it (docs/methods/sandbox.md), or set source.unsafe: true"


@dataclass(frozen=True)
class Limits:
    """What one program may use. UserError for a value that is not positive."""

    seconds: float = 10.0  # wall-clock time of all of it; CPU time of each process
    memory_mb: int = 2048  # MiB: address space of each process; resident memory of all together
    processes: int = 64  # processes and threads at a time
    file_mb: int = 64  # MiB: each file; all files in /tmp together
    output_kb: int = 256  # KiB of stdout and stderr together

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 1 << 31 or (name != "seconds" and value != int(value)):
                raise UserError(f"the limit {name} must be a positive number (whole, except seconds), not {value}")


@dataclass(frozen=True)
class Outcome:
    """How one program ended."""

    exit_code: int | None  # 128 + the signal for a program that died of one, as in a shell; None if it was stopped
    reason: str  # "ok", "exit 1", "timeout", "killed: memory | output | SIGSEGV"
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
    """The outcome of one program, run in an empty folder that is also its HOME and TMPDIR; nothing of it is left.

    May be called from any thread. UserError if the program or bubblewrap cannot start.
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
    path = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}"
    with ExitStack() as stack:
        texts = (job.stdin, "", "", *job.files.values())
        stdin, out, status, *files = (stack.enter_context(tempfile.TemporaryFile(buffering=0)) for _ in texts)
        for file, text in zip((stdin, out, status, *files), texts, strict=True):
            file.write(text.encode(errors="replace"))
            file.seek(0)
        folder = tempfile.mkdtemp(prefix="sdpo-program-") if job.unsafe else "/tmp"
        if job.unsafe:  # whatever the program leaves there
            stack.callback(subprocess.run, ["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"', folder], stderr=out)

        given = [] if job.unsafe else [file.fileno() for file in (status, *files)]
        words = _words(job, limits, folder, path, given)
        env = {"PATH": path, "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(  # in a session of its own: Ctrl-C is for the training process
            words, stdin=stdin, stdout=out, stderr=out, cwd=folder, env=env, pass_fds=given, start_new_session=True
        )
        start, stopped = time.monotonic(), ""
        try:
            while process.poll() is None and not stopped:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(LOOK_SECONDS, limits.seconds))
                if _memory(process.pid) > limits.memory_mb << 20:
                    stopped = "killed: memory"
                elif os.fstat(out.fileno()).st_size > limits.output_kb << 10:
                    stopped = "killed: output"
                elif time.monotonic() - start >= limits.seconds and process.poll() is None:
                    stopped = "timeout"
        finally:
            with suppress(OSError):  # it has ended
                if job.unsafe:
                    os.killpg(process.pid, signal.SIGKILL)
                elif process.poll() is None:  # the kernel ends all processes with the first, bubblewrap's child
                    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                    os.kill(int(child or process.pid), signal.SIGKILL)
            process.wait()

        shown, code = os.pread(out.fileno(), HEAD_BYTES, 0).decode(errors="replace"), process.returncode
        if not (job.unsafe or stopped) and code == 1 and b"exit-code" not in os.pread(status.fileno(), 4096, 0):
            raise UserError(f"bubblewrap cannot start: {shown.strip()}; {ADVICE}")
    reason = stopped or {0: "ok", **{128 + n: f"killed: {n.name}" for n in signal.Signals}}.get(code, f"exit {code}")
    return Outcome(None if stopped else code, reason, time.monotonic() - start, shown, not job.unsafe)


def _memory(pid: int) -> int:
    """Bytes of resident memory of a process and all its descendants."""
    family, pages = [pid], 0
    for one in family:  # grows
        with suppress(OSError, IndexError):  # it has ended
            pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                family += map(int, children.read_text().split())
    return pages * os.sysconf("SC_PAGESIZE")


def _words(job: Job, limits: Limits, folder: str, path: str, given: list[int]) -> list[str]:
    """The words that run a job's command within its limits. UserError if that or a file name is not one."""
    command = list(job.command)
    for name, text in job.files.items():
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise UserError(f"files: was {name!r}, must be a file name without a folder")
        command = [word.replace("{" + name + "}", f"{folder}/{name}") for word in command]
        if job.unsafe:
            Path(folder, name).write_bytes(text.encode(errors="replace"))
    for program in ("prlimit", *(["bwrap"] * (not job.unsafe)), *(command[:1] or [""])):
        if not shutil.which(program, path=path):
            advice = f"; {ADVICE}" if program == "bwrap" else ""
            raise UserError(f"cannot start {program!r}: it is not installed, or is not a program{advice}")

    words = ["sh", "-c", '"$@"; exit $?', "sh"]  # the first process; collects orphans
    if os.geteuid() == 0 and not job.unsafe:  # root has no limit on processes: each program is a new user
        user = 0x70000000 + int.from_bytes(os.urandom(3), "big")  # not `random`, whose state is the training's
        words += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all"]
    words += ["choom", "-n", "1000", "--"]  # short of memory, the kernel kills it before the training process
    words += ["prlimit", "--core=0", "--nofile=256", f"--cpu={int(limits.seconds) + 1}"]
    words += [f"--as={limits.memory_mb << 20}", f"--fsize={limits.file_mb << 20}"]
    words += [*[f"--nproc={limits.processes}"] * (not job.unsafe), "--", *command]
    return words if job.unsafe else [*_bubblewrap(job, limits, str(shutil.which(command[0], path=path)), given), *words]


def _bubblewrap(job: Job, limits: Limits, program: str, given: list[int]) -> list[str]:
    """The words that hide all but the system and what a job may read. UserError for what it could not."""
    words = "bwrap --unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try --hostname sandbox"
    words += f" --die-with-parent --new-session --as-pid-1 --json-status-fd {given[0]} --proc /proc --dev /dev"
    words += " --cap-add CAP_SETUID --cap-add CAP_SETGID" * (os.geteuid() == 0)
    for folder in ("/tmp", "/dev/shm"):
        words += f" --perms 0777 --size {limits.file_mb << 20} --tmpfs {folder}"

    named = [*job.readable, program, *(word for word in job.command if os.path.isabs(word) and os.path.isfile(word))]
    for place in named:
        mode = os.stat(place).st_mode if os.path.exists(place) and os.path.realpath(place) not in HIDDEN else 0
        if not mode & (0o004 if os.geteuid() == 0 else 0o444):
            raise UserError(f"readable: was {place}, must exist, not be / or /tmp, and for root be readable by all")

    prefixes, seen, binds = [sys.prefix, sys.base_prefix], list[str](), list[str]()
    named = sorted(map(os.path.abspath, [*prefixes, *map(os.path.realpath, prefixes), *named]), key=len)
    for place in (*SYSTEM, *named):
        if not any(f"{place}/".startswith(f"{known}/") for known in seen):
            seen.append(place)
            for parent in reversed(Path(place).parents[:-1]):  # readable by all, unlike those that bubblewrap makes
                binds += ["--dir", str(parent)]
            binds += ["--ro-bind-try", place, place]
    for name, number in zip(job.files, given[1:], strict=True):
        binds += ["--perms", "0666", "--file", str(number), f"/tmp/{name}"]
    return [*words.split(), *binds, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]
