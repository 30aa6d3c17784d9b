"""The small process that runs one untrusted program within limits; sandbox.py starts it with `python -I -S`.

A training process has threads and CUDA, so nothing may be run between its fork and exec; this script is exec'd first
and does what has to be done there. It imports nothing of the package. Three processes:

    watcher   reads the job (one line of JSON) from stdin, enforces the limits, writes the result (JSON) to stdout;
              end of file on stdin means that the training process is gone, and ends the program too
      init    first process of a new PID namespace, where the system allows one: when it dies the kernel kills every
              process in the namespace. Reaps orphans and reports how the program ended
        program   the user's command: own session, limits set, nothing inherited but stdin, stdout and stderr

Without namespaces the watcher and init are "subreapers": a daemon whose parent is gone becomes their child, so a
process can always be found by walking down from the watcher.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

POLL_SECONDS = 0.02  # between looks at memory and the number of processes
KILL_SECONDS = 10.0  # for processes to go after SIGKILL; one stuck in the kernel is left behind
HEAD_BYTES = 2000  # of output, kept for messages
OPEN_FILES = 256
USER_TASKS = 4096  # RLIMIT_NPROC counts all of the user's tasks: only a backstop, above those that run already
FILE_COST = 4096  # bytes on disk that any file or folder counts for at least

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x8000000, 0x10000000, 0x20000000
MS_BIND = 4096
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
LINUX = sys.platform.startswith("linux")
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """A function of libc that answers a negative number where it fails; OSError then."""
    if getattr(LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


# --- init and the program -------------------------------------------------------------------------------------------


def new_namespaces() -> bool:
    """Put the children to come into new user, PID and IPC namespaces; False where the system does not allow it."""
    ready_in, ready_out = os.pipe()
    helper = os.fork()
    if helper == 0:  # stays outside, where root may map every user and not only itself
        os.close(ready_out)
        done = os.read(ready_in, 1) and map_users(os.getppid())
        os._exit(0 if done else 1)
    os.close(ready_in)
    try:
        call("unshare", CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWIPC)
        os.write(ready_out, b"x")
        allowed = True
    except OSError:
        allowed = False
    os.close(ready_out)
    mapped = os.waitpid(helper, 0)[1] == 0
    if allowed and not mapped:
        raise OSError("cannot map user ids into a new user namespace")
    return allowed


def map_users(pid: int) -> bool:
    """Give the new user namespace of `pid` our users under their own numbers: all of them, or where only that is
    allowed the one that we are."""
    for kind, own in (("gid", os.getegid()), ("uid", os.geteuid())):
        with open(f"/proc/self/{kind}_map") as stream:
            ranges = [line.split() for line in stream]
        every = "".join(f"{first} {first} {count}\n" for first, _, count in ranges)
        if not (
            write_whole(f"/proc/{pid}/{kind}_map", every)
            or (
                (kind == "uid" or write_whole(f"/proc/{pid}/setgroups", "deny"))
                and write_whole(f"/proc/{pid}/{kind}_map", f"{own} {own} 1\n")
            )
        ):
            return False
    return True


def write_whole(path: str, text: str) -> bool:
    """Write `text` in one call, as files of the kernel want it; whether that was allowed."""
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        return os.write(descriptor, text.encode()) == len(text)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def new_mounts(job: dict[str, Any]) -> bool:
    """A view of the file system that can be written only under the job's folder and in a small /dev/shm of its own,
    with a /proc that shows only the program's own processes. False where (a part of) that is not allowed."""
    folder = job["folder"].encode()
    shared_memory = b"/dev/shm" if os.path.isdir("/dev/shm") else None
    try:
        call("unshare", CLONE_NEWNS)
        call("mount", folder, folder, None, ctypes.c_ulong(MS_BIND), None)
        call("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(0), None)
        if shared_memory:
            size = b"size=%dm,mode=1777" % job["file_mb"]
            call("mount", b"tmpfs", shared_memory, b"tmpfs", ctypes.c_ulong(0), size)
        set_read_only(b"/", True)
        for path in filter(None, (folder, shared_memory)):
            set_read_only(path, False)
    except OSError:
        return False
    return True


def set_read_only(path: bytes, on: bool) -> None:
    """Make the mount at `path`, and where `on` those below it, read-only or writable."""
    attributes = (ctypes.c_uint64 * 4)(*((MOUNT_ATTR_RDONLY, 0) if on else (0, MOUNT_ATTR_RDONLY)), 0, 0)
    flags = AT_RECURSIVE if on else 0
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", ctypes.c_long(SYS_MOUNT_SETATTR), AT_FDCWD, path, flags, attributes, size)


def run_init(job: dict[str, Any], watcher: int, namespaces: bool, stdin: int, output: int, status: int) -> None:
    """Start the program, reap whatever ends, and write to `status` how the program ended. Does not return."""
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    become_subreaper()
    if LINUX:  # a watcher that was killed takes init with it
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != watcher and not namespaces:  # it is gone already; in a new namespace its number is 0
            os._exit(1)
    if namespaces and new_mounts(job):
        os.write(status, b"isolated\n")
    program = os.fork()
    if program == 0:
        run_program(job, stdin, output, status)
    for descriptor in (0, 1, 2, stdin, output):
        os.close(descriptor)
    while True:
        pid, code = os.wait()
        if pid == program:
            os.write(status, b"ended %d\n" % code)
            os._exit(0)


def become_subreaper() -> None:
    """Orphans below this process become its children (Linux)."""
    if LINUX:
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_program(job: dict[str, Any], stdin: int, output: int, status: int) -> None:
    """Become the user's command; where that cannot be, write why to `status`. Does not return."""
    try:
        if LINUX:  # elsewhere the group is all that the watcher can kill
            os.setsid()
            call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        os.chdir(job["work"])  # by name: this finds the writable mount
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.umask(0o022)
        set_limits(job)
        for target, source in enumerate((stdin, output, output)):
            os.dup2(source, target)
        os.execvpe(job["command"][0], job["command"], job["environment"])
    except OSError as error:
        os.write(status, f"cannot start {error.strerror or error}\n".encode())
    finally:
        os._exit(127)


def set_limits(job: dict[str, Any]) -> None:
    """The limits that the kernel keeps, each for one process (RLIMIT_NPROC: for the user; it does not bind root)."""
    seconds = math.ceil(job["seconds"])
    limit("CORE", 0)
    limit("CPU", seconds, seconds + 1)  # SIGXCPU, then SIGKILL
    limit("AS", job["memory_mb"] << 20)
    limit("FSIZE", job["file_mb"] << 20)
    limit("NOFILE", OPEN_FILES)
    if LINUX and os.geteuid():
        limit("NPROC", job["user_tasks"] + USER_TASKS)


def limit(name: str, soft: int, hard: int | None = None) -> None:
    """Lower both limits of one resource; a limit that is lower already stays. OSError where it cannot be set."""
    number = getattr(resource, f"RLIMIT_{name}")
    ceiling = resource.getrlimit(number)[1]
    lowest = [value if ceiling == resource.RLIM_INFINITY else min(value, ceiling) for value in (soft, hard or soft)]
    try:
        resource.setrlimit(number, (lowest[0], lowest[1]))
    except ValueError as error:
        raise OSError(f"RLIMIT_{name} cannot be set to {lowest[0]}: {error}") from error


# --- the watcher ----------------------------------------------------------------------------------------------------


def descendants(root: int) -> Iterator[tuple[int, int]]:
    """Every living process below `root`, parents first, with its number of threads. Nothing where there is no /proc."""
    waiting = [root]
    while waiting:
        pid = waiting.pop(0)
        try:
            threads = os.listdir(f"/proc/{pid}/task")
            if pid != root:
                yield pid, len(threads)
            for thread in threads:
                with open(f"/proc/{pid}/task/{thread}/children") as stream:
                    waiting += map(int, stream.read().split())
        except OSError:  # gone meanwhile
            continue


def kill_all(init: int) -> None:
    """Kill the program and all that it started, and wait until no process is left below this one."""
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        send_kill(init)  # in a PID namespace this is enough
        if not LINUX:
            send_kill(-init)
        for pid, _ in descendants(os.getpid()):
            send_kill(pid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def send_kill(pid: int) -> None:
    """SIGKILL to a process (a group, where negative) that may be gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


@dataclass
class Watch:
    """The state of one running program, and why it was stopped."""

    job: dict[str, Any]
    init: int
    output: int  # read end of the pipe that is the program's stdout and stderr; −1 once all its writers closed it
    status: int  # read end of the pipe that init writes to
    deadline: float
    most_disk: int  # bytes
    head: bytes = b""
    written: int = 0  # bytes of output so far
    said: bytes = b""  # by init
    stopped: str = ""
    next_disk: float = 0.0

    def look(self) -> bool:
        """Wait for news or for one poll interval; whether the program may go on."""
        if time.monotonic() >= self.deadline:
            self.stopped = "timeout"
            return False
        poll = select.poll()
        for descriptor in (0, self.output, self.status):
            if descriptor >= 0:
                poll.register(descriptor, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(POLL_SECONDS * 1000)]
        if 0 in ready:
            self.stopped = "the run ended"
        if self.output in ready:
            self.read_output()
        if self.status in ready:
            said = os.read(self.status, 4096)
            self.said += said
            if not said or b"ended " in self.said:
                return False
        self.stopped = self.stopped or self.over_limit()
        return not self.stopped

    def read_output(self) -> bool:
        """Take what the pipe holds; False at its end, where there is nothing, and past the cap."""
        try:
            chunk = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return False
        self.written += len(chunk)
        self.head = (self.head + chunk)[:HEAD_BYTES]
        if self.written > self.job["output_kb"] << 10:
            self.stopped = "killed: output"
        if not chunk:
            self.output = -1
        return bool(chunk) and not self.stopped

    def over_limit(self) -> str:
        """The limit that the processes together, or the files together, are over; else nothing."""
        tasks = pages = 0
        for pid, threads in descendants(os.getpid()):
            if pid != self.init:
                tasks += threads
                pages += resident_pages(pid)
            if tasks > self.job["processes"]:
                return "killed: processes"
        if pages * resource.getpagesize() > self.job["memory_mb"] << 20:
            return "killed: memory"
        if time.monotonic() >= self.next_disk:
            start = time.monotonic()
            if disk_use(self.job["folder"], self.most_disk) > self.most_disk:
                return "killed: disk"
            self.next_disk = start + max(0.1, 10 * (time.monotonic() - start))
        return ""


def resident_pages(pid: int) -> int:
    """Pages of memory that a process holds; shared ones count in each. 0 for one that is gone."""
    try:
        with open(f"/proc/{pid}/statm") as stream:
            return int(stream.read().split()[1])
    except (OSError, IndexError):
        return 0


def disk_use(folder: str, enough: int) -> int:
    """Bytes on disk of what is below `folder`, links not followed; counting ends above `enough`."""
    total, waiting = 0, [folder]
    while waiting and total <= enough:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    total += max(FILE_COST, entry.stat(follow_symlinks=False).st_blocks * 512)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    if total > enough:
                        break
        except OSError:  # gone meanwhile, or closed to us
            continue
    return total


def user_tasks() -> int:
    """Processes and threads of this user."""
    total = 0
    for name in os.listdir("/proc") if LINUX else ():
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                total += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return total


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job's command to its end or to a limit; the fields of the outcome."""
    if os.geteuid():
        job["user_tasks"] = user_tasks()
    stdin = os.open(job["stdin"], os.O_RDONLY)
    most_disk = disk_use(job["folder"], sys.maxsize) + (job["file_mb"] << 20)  # above what sandbox.py laid there
    become_subreaper()
    namespaces = LINUX and new_namespaces()
    output_in, output_out = os.pipe()
    status_in, status_out = os.pipe()
    os.set_blocking(output_in, False)
    start, watcher = time.monotonic(), os.getpid()
    init = os.fork()
    if init == 0:
        try:
            run_init(job, watcher, namespaces, stdin, output_out, status_out)
        except OSError as error:
            os.write(status_out, f"cannot start {error}\n".encode())
        finally:
            os._exit(1)
    for descriptor in (stdin, output_out, status_out):
        os.close(descriptor)
    watch = Watch(job, init, output_in, status_in, start + job["seconds"], most_disk)
    while watch.look():
        pass
    seconds = time.monotonic() - start
    kill_all(init)
    while watch.output >= 0 and watch.read_output():
        pass
    return result(watch, seconds)


def result(watch: Watch, seconds: float) -> dict[str, Any]:
    """What sandbox.py is told."""
    answer = {
        "exit_code": None,
        "reason": watch.stopped or "killed: its parent process",
        "seconds": seconds,
        "output": watch.head.decode(errors="replace"),
        "isolated": False,
        "cannot_start": "",
    }
    for line in watch.said.decode(errors="replace").splitlines():
        word, _, rest = line.partition(" ")
        if word == "isolated":
            answer["isolated"] = True
        elif word == "cannot":
            answer["cannot_start"] = rest.removeprefix("start ")
        elif word == "ended" and not watch.stopped:
            code = os.waitstatus_to_exitcode(int(rest))
            answer |= {"exit_code": code, "reason": reason(code)}
    return answer


def reason(code: int) -> str:
    """An exit code (minus the signal, for a program that died of one) in words."""
    if code >= 0:
        return "ok" if code == 0 else f"exit {code}"
    special = {signal.SIGXCPU: "timeout", signal.SIGXFSZ: "killed: file size"}
    try:
        return special.get(signal.Signals(-code), f"killed: {signal.Signals(-code).name}")
    except ValueError:
        return f"killed: signal {-code}"


def main() -> None:
    """Read the job from stdin, write the result to stdout."""
    received = b""
    while not received.endswith(b"\n"):
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return
        received += chunk
    answer = json.dumps(run(json.loads(received))).encode()
    while answer:
        answer = answer[os.write(1, answer) :]


if __name__ == "__main__":
    main()
