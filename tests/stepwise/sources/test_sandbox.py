"""Programs that misbehave, each for real: every one costs its own result, and leaves no process and no file."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.sources import sandbox
from sdpo_kernels.stepwise.sources.sandbox import Job, Limits, run_limited, run_many

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are those of Linux")

SMALL = Limits(seconds=5.0, memory_mb=200, processes=16, file_mb=4, output_kb=64)
PYTHON = str(Path(sys.executable).resolve())
SOON = 30  # seconds: less than any program here would take, far more than ending it takes
MARK = f"sdpo-test-{os.getpid()}"  # in the command line of every program here


@pytest.fixture(params=["namespaces", "bare"], autouse=True)
def system(request, monkeypatch, tmp_path):
    """Every test as this system is, and as on one without namespaces (a plain container)."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    if request.param == "bare":
        source = sandbox.WATCHER.read_text()
        assert source.count("LINUX and new_namespaces()") == 1
        watcher = tmp_path / "bare_watcher.py"
        watcher.write_text(source.replace("LINUX and new_namespaces()", "False"))
        monkeypatch.setattr(sandbox, "WATCHER", watcher)
    elif not run_limited(["true"], "", SMALL).isolated:
        pytest.skip("this system gives no namespaces")
    open_before = os.listdir("/proc/self/fd")
    yield request.param
    assert survivors() == []
    assert os.listdir(temporary) == []
    assert len(os.listdir("/proc/self/fd")) == len(open_before)


def survivors():
    """Command lines of the processes that tests here have left."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if MARK in line:
            found.append((name, line))
    return found


def python(program, stdin="", limits=SMALL, **options):
    """The outcome of a Python program."""
    return run_limited(command(program), stdin, limits, **options)


def command(program):
    return [PYTHON, "-I", "-S", "-c", "import os, sys, time, signal\n" + program, MARK]


@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        ("pass", 0, "ok"),
        ("sys.exit(3)", 3, "exit 3"),
        ("raise ValueError", 1, "exit 1"),
        ("os._exit(255)", 255, "exit 255"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -11, "killed: SIGSEGV"),
        ("os.abort()", -6, "killed: SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "killed: SIGKILL"),
    ],
)
def test_the_end_of_a_program_is_told(program, code, reason):
    outcome = python(program)
    assert (outcome.exit_code, outcome.reason, outcome.passed) == (code, reason, code == 0)


def test_stdin_and_output(system):
    outcome = python("print(sys.stdin.read()[::-1], flush=True); print('late', file=sys.stderr)", "olléh")
    assert (outcome.output, outcome.passed) == ("héllo\nlate\n", True)
    assert outcome.isolated == (system == "namespaces")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "time.sleep(1000)",
        "for name in ('TERM', 'XCPU'): signal.signal(signal.Signals['SIG' + name], signal.SIG_IGN)\nwhile True: pass",
        "os.close(0); os.close(1); os.close(2); time.sleep(1000)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
    ],
)
def test_a_program_that_does_not_end(program):
    start = time.monotonic()
    outcome = python(program, limits=Limits(seconds=0.4))
    assert (outcome.reason, outcome.exit_code, outcome.passed) == ("timeout", None, False)
    assert 0.4 <= outcome.seconds < SOON
    assert time.monotonic() - start < SOON


def test_a_program_that_does_not_read_its_input():
    assert python("pass", "x" * 3_000_000).passed
    assert python("os.close(0)", "x" * 3_000_000).passed


BOMB = """
for _ in range(200):  # bounded: this machine has other work
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
while True: pass
"""
GENERATIONS = """
end = time.monotonic() + 20
for _ in range(150):  # each parent dies at once: nothing stays where it was seen
    if os.fork():
        os._exit(0)
    os.setsid()
while time.monotonic() < end: pass
"""
DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number in (0, 1, 2): os.close(number)
        open("started", "w").close()
        time.sleep(60)
    os._exit(0)
while not os.path.exists("started"): time.sleep(0.01)
"""


def test_a_fork_bomb():
    outcome = python(BOMB)
    assert outcome.reason == "killed: processes"
    assert outcome.seconds < SOON


def test_generations_of_processes_that_leave_their_parents():
    assert python(GENERATIONS).exit_code == 0  # the first has ended well; the last must be dead


def test_threads_count_as_processes():
    program = "import _thread\nfor _ in range(40): _thread.start_new_thread(time.sleep, (60,))\ntime.sleep(60)"
    assert python(program, limits=Limits(seconds=2, processes=16)).reason == "killed: processes"


def test_a_daemon_dies_with_its_program():
    assert python(DAEMON).reason == "ok"


def test_a_daemon_that_keeps_the_output_open_does_not_hold_the_result():
    start = time.monotonic()
    outcome = python("if os.fork() == 0:\n    os.setsid(); time.sleep(60)\nprint('done')")
    assert (outcome.reason, outcome.output) == ("ok", "done\n")
    assert time.monotonic() - start < SOON


def test_memory_of_one_process_and_of_many():
    assert python("blocks = []\nwhile True: blocks.append(bytearray(1 << 20))").exit_code == 1
    many = "for _ in range(4):\n    if os.fork() == 0: break\nblock = b'x' * (100 << 20); time.sleep(60)"
    assert python(many).reason == "killed: memory"


def test_large_files_and_many_files():
    assert "File too large" in python("open('a', 'wb').write(bytes(5 << 20))").output
    outcome = run_limited(["sh", "-c", "exec cat /dev/zero > a", MARK], "", SMALL)
    assert outcome.reason in ("killed: file size", "killed: disk")  # whichever sees it first
    several = "for n in range(100):\n    open(str(n), 'wb').write(bytes(1 << 20)); time.sleep(0.01)\ntime.sleep(60)"
    assert python(several).reason == "killed: disk"
    empty = "for n in range(9000): open(str(n), 'wb').close()\ntime.sleep(60)"
    assert python(empty, limits=Limits(seconds=5, file_mb=4)).reason == "killed: disk"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_program_that_prints_for_ever(stream):
    outcome = python(f"while True: print('x' * 999, file=sys.{stream})")
    assert outcome.reason == "killed: output"
    assert outcome.seconds < SOON
    assert len(outcome.output) == 2000


def test_output_that_is_no_text():
    assert python("os.write(1, bytes([255, 0, 10]))").output == "�\0\n"


def test_nothing_of_this_process_is_passed_on(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    secret, other = os.pipe()
    os.set_inheritable(secret, True)
    program = (
        "import resource\nprint(sorted(os.environ), len(os.listdir('/proc/self/fd')))\n"
        "print(os.environ['HOME'] == os.environ['TMPDIR'] == os.getcwd(), os.listdir('.'))\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), os.getsid(0) == os.getpid())"
    )
    try:
        outcome = python(program)
    finally:
        os.close(secret)
        os.close(other)
    # open: the three streams and the listing itself
    assert outcome.output.splitlines() == [
        "['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'TMPDIR'] 4",
        "True []",
        "(0, 0) True",
    ]


def test_the_environment_of_the_run_cannot_be_read(system, monkeypatch):
    if system == "bare":
        pytest.skip("does not hold without namespaces")
    program = f"print(os.path.exists('/proc/{os.getpid()}/environ'), flush=True)\nos.kill({os.getpid()}, 0)"
    outcome = python(program)
    assert outcome.output.startswith("False\n")
    assert "ProcessLookupError" in outcome.output


def test_files_outside_cannot_be_written(system, tmp_path):
    if system == "bare":
        pytest.skip("does not hold without namespaces")
    kept = tmp_path / "checkpoint"
    kept.write_text("dear")
    outcome = python(f"open('/dev/null', 'w').write('x'); open('/dev/shm/a', 'w').write('x')\nos.remove({str(kept)!r})")
    assert "Read-only file system" in outcome.output
    assert kept.read_text() == "dear"
    assert not Path("/dev/shm/a").exists()


@pytest.mark.parametrize(
    "program",
    [
        "os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)",
        "os.killpg(os.getpgid(os.getppid()), signal.SIGKILL); time.sleep(60)",
        "os.fork(); os.fork(); os.setsid() if os.getpid() != os.getsid(0) else 0\n"
        "os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)",
    ],
)
def test_a_program_that_kills_its_parent(program):
    outcome = python(program, limits=Limits(seconds=0.4))
    assert not outcome.passed
    ways = ("timeout", "exit 1", "killed: SIGKILL", "killed: its parent process", "killed: the watcher")
    assert outcome.reason in ways  # the third may meet the watcher as its parent, too


@pytest.mark.parametrize("then", ["", "os.fork(); os.fork(); os.setsid() if os.getpid() != os.getsid(0) else 0; "])
def test_a_program_that_kills_its_watcher(system, then):
    if system == "namespaces":
        pytest.skip("cannot see its watcher")
    find = "watcher = int(open(f'/proc/{os.getppid()}/stat').read().split()[3])"  # the parent of its parent
    outcome = python(f"{find}; os.kill(watcher, signal.SIGKILL); {then}time.sleep(60)")
    assert outcome.reason == "killed: the watcher"


def test_a_program_that_kills_every_process_it_may(system):
    if system == "bare":
        pytest.skip("would kill the tests: does not hold without namespaces")
    assert "ProcessLookupError" in python("os.kill(-1, signal.SIGKILL)").output  # there is no other


def test_folders_that_resist_removal():
    program = (
        "os.mkdir('a'); os.mkdir('a/b'); open('a/b/c', 'w').close(); os.symlink('/', 'a/root')\n"
        "os.chmod('a/b/c', 0); os.chmod('a/b', 0); os.chmod('a', 0); os.chmod('.', 0); os.chmod('..', 0)"
    )
    assert python(program).passed
    deep = "for _ in range(1100):\n    os.mkdir('d'); os.chdir('d')"
    assert python(deep, limits=Limits(seconds=5)).passed
    assert Path("/etc").is_dir()


def test_files_and_their_place_in_the_command(tmp_path):
    files = {"completion.txt": "print('é')\r\n", "prompt.json": "{}"}
    outcome = run_limited(["sh", "-c", "cat {completion.txt}; echo {prompt.json} {other}"], "", SMALL, files)
    text, path = outcome.output.split("\r\n")
    assert text == "print('é')"
    assert path.startswith(str(tmp_path))
    assert path.endswith("/prompt.json {other}\n")


def test_a_command_that_cannot_start(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for words, why in [
        (["no-such-command"], "cannot start no-such-command: No such file or directory"),
        ([str(plain)], "cannot start .*plain: Permission denied"),
        ([], "not a command that can be run"),
        (["echo", "a\0b"], "not a command that can be run"),
    ]:
        with pytest.raises(UserError, match=why):
            run_limited(words, "", SMALL)
    plain.chmod(0o755)
    with pytest.raises(UserError, match=r"cannot start .*plain: Exec format error"):
        run_limited([str(plain)], "", SMALL)


def test_limits_are_checked():
    for name, value in [("seconds", 0), ("memory_mb", -1), ("processes", 1.5), ("seconds", float("nan"))]:
        with pytest.raises(UserError, match=f"the limit {name} must be a positive"):
            Limits(**{name: value})


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(UserError, match="not on Windows"):
        run_limited(["true"], "", SMALL)
    monkeypatch.undo()


def test_several_at_a_time_and_in_order():
    program = "start = time.monotonic(); time.sleep(2); print({n}, start, time.monotonic()); sys.exit({n} % 2)"
    outcomes = run_many([Job(command(program.format(n=n))) for n in range(6)], Limits(seconds=SOON), workers=6)
    told = [outcome.output.split() for outcome in outcomes]
    assert [(int(n), outcome.exit_code) for (n, _, _), outcome in zip(told, outcomes, strict=True)] == [
        (n, n % 2) for n in range(6)
    ]
    spans = sorted((float(start), float(end)) for _, start, end in told)
    assert any(later < end for (_, end), (later, _) in itertools.pairwise(spans))  # one after the other, none
    assert threading.active_count() < 6


def test_one_that_cannot_start_ends_the_many():
    with pytest.raises(UserError, match="cannot start nothing-here"):
        run_many([Job(["nothing-here"]), Job(["true"])], SMALL, workers=2)


def test_the_program_dies_with_the_run(system, tmp_path):
    if system == "namespaces":
        pytest.skip("the same watcher; this takes its time to import torch")
    run = (
        "import sys, tempfile\nfrom pathlib import Path\nfrom sdpo_kernels.stepwise.sources import sandbox\n"
        f"sandbox.WATCHER = Path({str(sandbox.WATCHER)!r}); tempfile.tempdir = {str(tmp_path)!r}\n"
        f"sandbox.run_limited({command('time.sleep(60)')!r}, '', sandbox.Limits(seconds=50))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", run], cwd=Path(__file__).parents[3])
    try:
        assert comes_true(lambda: any("-S" in line for _, line in survivors()), 120)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert comes_true(lambda: survivors() == [], SOON)


def comes_true(condition, seconds):
    """Whether `condition` holds within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
