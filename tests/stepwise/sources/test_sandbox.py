"""Programs that misbehave, each for real: every one spoils its own result, and leaves no process and no file."""

import gc
import itertools
import os
import shutil
import signal
import socket
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
from tests.stepwise.sources.bubblewrap import needs_bubblewrap

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are those of Linux")

SMALL = Limits(seconds=20.0, memory_mb=200, processes=16, file_mb=4, output_kb=64)
PYTHON = str(Path(sys.executable).resolve())
SOON = 60  # seconds: less than any program here would take, far more than ending it takes
# an interpreter in /tmp is mounted there: what a program finds in its folder, /tmp, besides that
LISTED = f"[name for name in os.listdir('.') if name not in {Path(sys.prefix).parts}]"
MARK = f"sdpo-test-{os.getpid()}"  # in the command line of every program here


# for a process of its own: the sandbox without torch, whose import takes seconds
IMPORT = """
import signal, sys, tempfile, threading, types
sys.modules["sdpo_kernels"] = package = types.ModuleType("sdpo_kernels")
package.__path__ = ["sdpo_kernels"]
from sdpo_kernels.stepwise.sources.sandbox import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background
"""


every_way = pytest.mark.parametrize("way", [pytest.param("bubblewrap", marks=needs_bubblewrap), "unsafe"])


@pytest.fixture(autouse=True)
def clean(request, monkeypatch, tmp_path):
    """Nothing is left after any test: no process, file or open descriptor."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    gc.collect()  # what other tests of this process have left open would be closed at any time
    open_before = len(os.listdir("/proc/self/fd"))
    yield
    if "unsafe" in request.node.name:  # its process group is killed, but only the first process is waited for
        comes_true(lambda: survivors() == [], SOON)
    assert survivors() == []
    assert os.listdir(temporary) == []
    assert len(os.listdir("/proc/self/fd")) <= open_before


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


def running():
    """Programs that have begun; before that bubblewrap's own processes stand in for them."""
    return [pid for pid, line in survivors() if line[4].startswith("import os, sys, time, signal")]


def command(program):
    return [PYTHON, "-I", "-S", "-c", "import os, sys, time, signal\n" + program, MARK]


def python(program, stdin="", limits=SMALL, way="bubblewrap", **options):
    """The outcome of a Python program."""
    job = Job(command(program), stdin, unsafe=way == "unsafe", **options)
    [outcome] = run_many([job], limits, workers=1)
    assert outcome.isolated == (way != "unsafe")
    return outcome


# --- how a program ends ---------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize(
    ("program", "code", "reason"),
    [
        ("pass", 0, "ok"),
        ("sys.exit(3)", 3, "exit 3"),
        ("raise ValueError", 1, "exit 1"),
        ("os._exit(200)", 200, "exit 200"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "killed: SIGSEGV"),
        ("os.abort()", 134, "killed: SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed: SIGKILL"),
    ],
)
def test_the_end_of_a_program_is_told(way, program, code, reason):
    outcome = python(program, way=way)
    assert (outcome.exit_code, outcome.reason, outcome.passed) == (code, reason, code == 0)


@every_way
def test_stdin_and_output(way):
    outcome = python("print(sys.stdin.read()[::-1], flush=True); print('late', file=sys.stderr)", "olléh", way=way)
    assert (outcome.output, outcome.passed) == ("héllo\nlate\n", True)


@every_way
@pytest.mark.parametrize(
    "program",
    [
        "time.sleep(1000)",
        "for name in ('TERM', 'XCPU'): signal.signal(signal.Signals['SIG' + name], signal.SIG_IGN)\nwhile True: pass",
        "os.close(0); os.close(1); os.close(2); time.sleep(1000)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
    ],
)
def test_a_program_that_does_not_end(way, program):
    start = time.monotonic()
    outcome = python(program, limits=Limits(seconds=0.4), way=way)
    assert (outcome.reason, outcome.exit_code, outcome.passed) == ("timeout", None, False)
    assert 0.4 <= outcome.seconds < SOON
    assert time.monotonic() - start < SOON


@needs_bubblewrap
def test_cpu_time_counts_all_threads():
    program = "import threading\nfor _ in range(3): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    outcome = python(program + "\nwhile True: pass", limits=Limits(seconds=1))
    assert outcome.reason == "timeout"


@every_way
def test_a_program_that_does_not_read_its_input(way):
    assert python("pass", "x" * 3_000_000, way=way).passed
    assert python("os.close(0)", "x" * 3_000_000, way=way).passed


@every_way
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_program_that_prints_for_ever(way, stream):
    outcome = python(f"while True: print('x' * 999, file=sys.{stream})", way=way)
    assert outcome.reason == "killed: output"
    assert outcome.seconds < SOON
    assert len(outcome.output) == 2000


@needs_bubblewrap
def test_output_that_is_no_text():
    assert python("os.write(1, bytes([255, 0, 10]))").output == "�\0\n"


@every_way
def test_the_last_output_is_kept(way):
    assert python("os.write(1, b'x' * 40_000); os._exit(0)", way=way).output == "x" * 2000


# --- what it cannot reach -------------------------------------------------------------------------------------------


@needs_bubblewrap
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # open to everyone else
        program = (
            f"import socket\nprint(socket.if_nameindex(), flush=True)\nsocket.create_connection(('127.0.0.1', {port}))"
        )
        outcome = run_limited([PYTHON, "-I", "-c", program, MARK], "", SMALL)
    assert outcome.exit_code == 1
    assert outcome.output.startswith("[(1, 'lo')]\n")
    assert "Connection refused" in outcome.output


@needs_bubblewrap
def test_sockets_of_the_host_in_its_name_space_of_sockets_are_not_seen(tmp_path):
    """Abstract Unix sockets belong to the network namespace; a D-Bus or X server often has one."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{MARK}")
        server.listen()
        program = f"import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{MARK}')"
        assert "Connection refused" in run_limited([PYTHON, "-I", "-c", program, MARK], "", SMALL).output


@needs_bubblewrap
def test_no_file_of_the_user_is_seen(tmp_path):
    kept = tmp_path / "checkpoint"
    kept.write_text("dear")
    known = [*sandbox.SYSTEM, "/proc", "/dev", sys.prefix, sys.base_prefix]
    program = (
        f"known = {known}\n"
        "for folder, folders, names in os.walk('/'):\n"
        "    folders[:] = [name for name in folders if os.path.join(folder, name) not in known]\n"
        "    for name in names:\n"
        "        if os.path.join(folder, name) not in known: print(folder, name)\n"
        f"os.makedirs({str(kept.parent)!r}); open({str(kept)!r}, 'w').write('x')"  # in its own /tmp
    )
    outcome = python(program)
    assert outcome.output == "" or "Read-only file system" in outcome.output  # where pytest's folder is not in /tmp
    assert kept.read_text() == "dear"
    for path in (kept, Path.home(), Path(__file__), Path(sandbox.__file__), "/etc/shadow", "/sys", "/run", "/var"):
        known_prefix = any(str(prefix).startswith(f"{path}/") for prefix in (sys.prefix, sys.base_prefix))
        assert known_prefix or python(f"print(os.path.exists({str(path)!r}))").output == "False\n"


@needs_bubblewrap
@pytest.mark.parametrize(
    "path", ["/new", "/usr/new", "/etc/new", "/dev/new", "/root/new", f"{sys.prefix}/new", "/proc/new"]
)
def test_nothing_outside_its_own_folder_can_be_written(path):
    outcome = python(f"open({path!r}, 'w')")
    assert "Read-only" in outcome.output or "Permission denied" in outcome.output or "No such file" in outcome.output
    assert outcome.exit_code == 1
    assert not os.path.exists(path)


@needs_bubblewrap
def test_its_own_folders_can_be_written_and_are_gone_afterwards():
    program = f"for name in ('a', '/dev/shm/b'): open(name, 'w').write('x')\nprint({LISTED}, os.listdir('/dev/shm'))"
    for _ in range(2):
        assert python(program).output == "['a'] ['b']\n"
    assert not Path("/tmp/a").exists()
    assert not Path("/dev/shm/b").exists()


@needs_bubblewrap
def test_it_gains_no_privileges():
    program = (
        "told = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(int(told['CapEff'], 16), int(told['CapPrm'], 16), told['NoNewPrivs'].strip(), os.getuid())\n"
        "try: os.setuid(0)\nexcept OSError as error: print(error.strerror)\n"
        "try: open('/dev/tty')\nexcept OSError as error: print(error.strerror)"
    )
    first, *rest = python(program).output.splitlines()
    *privileges, user = map(int, first.split())
    assert privileges == [0, 0, 1]
    assert user == os.geteuid() or (os.geteuid() == 0 and user >= 0x70000000)  # no user of the system
    refused = "Operation not permitted" if os.geteuid() == 0 else "Invalid argument"  # its namespace has no user 0
    assert rest == [refused, "No such device or address"]


@every_way
def test_nothing_of_this_process_is_passed_on(way, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    secret, other = os.pipe()
    os.set_inheritable(secret, True)
    program = (
        "import resource\nprint(sorted(set(os.environ) - {'PWD'}), len(os.listdir('/proc/self/fd')))\n"
        f"print(os.environ['HOME'] == os.environ['TMPDIR'] == os.getcwd(), {LISTED})\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), signal.getsignal(signal.SIGUSR1))"
    )
    try:
        outcome = python(program, way=way, files={"given": ""})
    finally:
        os.close(secret)
        os.close(other)
    # open: the three streams and the listing itself
    assert outcome.output.splitlines() == [
        "['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'TMPDIR'] 4",
        "True ['given']",
        "(0, 0) 0",
    ]


@needs_bubblewrap
def test_no_other_process_is_seen():
    program = (
        "print([name for name in os.listdir('/proc') if name.isdigit()], flush=True)\n"
        f"print(os.path.exists('/proc/{os.getpid()}/environ') and {os.getpid()} > 2, flush=True)\n"
        "os.kill(-1, signal.SIGKILL)"  # every process that it may signal: not even its own first one
    )
    outcome = python(program)
    assert outcome.output.startswith("['1', '2']\nFalse\n")
    assert "ProcessLookupError" in outcome.output


# --- what it cannot use up ------------------------------------------------------------------------------------------

BOMB = """
import errno
end, made = time.monotonic() + 1, 0
while time.monotonic() < end:
    try:
        if os.fork() == 0:
            while True: time.sleep(60)
        made += 1
    except OSError as error:
        assert error.errno == errno.EAGAIN
        break
    if made == 200: break  # bounded: this machine has other work
print(made)
"""
DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number in (0, 1, 2): os.close(number)
        open("started", "w").close()
        time.sleep(600)
    os._exit(0)
while not os.path.exists("started"): time.sleep(0.01)
"""


@needs_bubblewrap
def test_a_fork_bomb():
    outcome = python(BOMB)
    assert outcome.reason == "ok"
    assert 10 <= int(outcome.output) < SMALL.processes


@needs_bubblewrap
def test_threads_count_as_processes():
    program = "import _thread\nfor _ in range(40): _thread.start_new_thread(time.sleep, (60,))"
    outcome = python(program, limits=Limits(seconds=SOON, processes=16))
    assert "can't start new thread" in outcome.output


@needs_bubblewrap
def test_a_bomb_that_never_ends_is_stopped_in_time():
    program = "while True:\n    try: os.fork()\n    except OSError: pass"
    outcome = python(program, limits=Limits(seconds=1, processes=16))
    assert outcome.reason == "timeout"
    assert outcome.seconds < SOON


@needs_bubblewrap
def test_the_number_of_processes_is_each_programs_own():
    jobs = [Job(command(BOMB.replace("print", "time.sleep(2); print"))) for _ in range(3)]
    made = [int(outcome.output) for outcome in run_many(jobs, SMALL, workers=3)]
    assert min(made) >= 10
    assert max(made) < SMALL.processes


@needs_bubblewrap
def test_memory_of_one_process():
    outcome = python("blocks = []\nwhile True: blocks.append(bytearray(1 << 20))")
    assert "MemoryError" in outcome.output or outcome.reason == "killed: memory"
    assert not outcome.passed


@needs_bubblewrap
def test_memory_of_many_processes():
    program = "for _ in range(4):\n    if os.fork() == 0: break\nblock = b'x' * (100 << 20); time.sleep(600)"
    assert python(program).reason == "killed: memory"


@needs_bubblewrap
def test_files_take_no_more_than_their_share():
    assert "File too large" in python("open('a', 'wb').write(bytes(5 << 20))").output
    assert run_limited(["sh", "-c", "exec cat /dev/zero > a", MARK], "", SMALL).reason == "killed: SIGXFSZ"
    for folder in ("/tmp", "/dev/shm"):
        several = f"for n in range(100): open('{folder}/' + str(n), 'wb').write(bytes(1 << 20))"
        assert "No space left on device" in python(several).output


@needs_bubblewrap
def test_a_daemon_dies_with_its_program():
    assert python(DAEMON).reason == "ok"


@needs_bubblewrap
def test_generations_of_processes_that_leave_their_parents():
    # each parent dies at once
    program = "for _ in range(150):\n    if os.fork(): os._exit(0)\n    os.setsid()\ntime.sleep(600)"
    assert python(program).exit_code == 0  # the first has ended well; the last must be dead


@needs_bubblewrap
def test_a_daemon_that_keeps_the_output_open_does_not_hold_the_result():
    start = time.monotonic()
    outcome = python("if os.fork() == 0:\n    os.setsid(); time.sleep(600)\nprint('done')")
    assert (outcome.reason, outcome.output) == ("ok", "done\n")
    assert time.monotonic() - start < SOON


@every_way
@pytest.mark.parametrize("who", ["os.getppid()", "1", "-os.getpgrp()"])
def test_a_program_that_kills_its_first_process(way, who):
    if way == "unsafe" and who == "1":
        pytest.skip("would end this machine")
    outcome = python(f"os.kill({who}, signal.SIGKILL); time.sleep(600)", limits=Limits(seconds=1), way=way)
    assert not outcome.passed
    assert outcome.reason in ("timeout", "exit 1", "killed: SIGKILL", "exit -9")


@needs_bubblewrap
@pytest.mark.parametrize("wait", ["signal.pause()", "run_many([Job(words)] * 2, Limits(seconds=600), 2)"])
def test_a_program_dies_with_the_process_that_runs_it(wait):
    run = (
        f"{IMPORT}\nwords = {command(DAEMON + 'time.sleep(600)')!r}\n"
        "threading.Thread(target=run_limited, args=(words, '', Limits(seconds=600))).start()\n" + wait
    )
    process = subprocess.Popen([sys.executable, "-c", run], cwd=Path(__file__).parents[3])
    try:  # each with its daemon
        assert comes_true(lambda: len(running()) == (2 if "pause" in wait else 6), 120)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert comes_true(lambda: survivors() == [], SOON)


@needs_bubblewrap
@pytest.mark.parametrize("call", ["run_limited(words, '', limits)", "run_many([Job(words)] * 3, limits, 2)"])
def test_nothing_is_left_after_ctrl_c(call, tmp_path):
    run = (
        f"{IMPORT}\ntempfile.tempdir = {str(tmp_path / 'temporary')!r}\n"
        f"words, limits = {command('time.sleep(3)')!r}, Limits(seconds=600)\n{call}"
    )
    process = subprocess.Popen([sys.executable, "-c", run], cwd=Path(__file__).parents[3], stderr=subprocess.PIPE)
    with process:
        assert comes_true(running, 120)
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.stderr.read()
        process.wait(SOON)
    assert comes_true(lambda: survivors() == [], SOON)


def comes_true(condition, seconds):
    """Whether `condition` holds within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# --- files and commands ---------------------------------------------------------------------------------------------


@every_way
def test_folders_that_resist_removal(way):
    program = (
        "os.mkdir('a'); os.mkdir('a/b'); open('a/b/c', 'w').close(); os.symlink('/', 'a/root')\n"
        "os.chmod('a/b/c', 0); os.chmod('a/b', 0); os.chmod('a', 0)"
    )
    assert python(program, way=way).passed
    assert python("for _ in range(1100):\n    os.mkdir('d'); os.chdir('d')", way=way).passed
    assert Path("/etc").is_dir()


@every_way
def test_files_and_their_place_in_the_command(way):
    files = {"completion.txt": "print('é')\r\n", "prompt.json": "{}"}
    words = ["sh", "-c", "cat {completion.txt}; echo {prompt.json} {other}; pwd; rm *.json"]
    [outcome] = run_many([Job(words, files=files, unsafe=way == "unsafe")], SMALL, 1)
    text, rest = outcome.output.split("\r\n")
    path, folder = rest.splitlines()
    assert text == "print('é')"
    assert path == f"{folder}/prompt.json {{other}}"
    assert outcome.passed


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc/passwd", "..", ".", ""])
def test_a_file_is_written_only_into_the_working_folder(name):
    with pytest.raises(UserError, match="must be a file name without a folder"):
        run_limited(["true"], "", SMALL, {name: "x"})


@needs_bubblewrap
def test_files_that_the_command_names_can_be_read_and_no_others(tmp_path):
    (tmp_path / "check.py").write_text(
        "import os\nprint(os.listdir(os.path.dirname(__file__)), open(__file__).read()[:9])"
    )
    (tmp_path / "other.py").write_text("secret")
    outcome = run_limited([PYTHON, str(tmp_path / "check.py")], "", SMALL)
    assert outcome.output == "['check.py'] import os\n"


@needs_bubblewrap
def test_readable_files_and_folders(tmp_path):
    module, data = tmp_path / "modules", tmp_path / "deep" / "data.txt"
    module.mkdir()
    data.parent.mkdir()
    data.write_text("data")
    (module / "mine.py").write_text("name = 'mine'")
    program = f"sys.path.append({str(module)!r}); import mine; print(mine.name, open({str(data)!r}).read())"
    assert "No module named 'mine'" in python(program).output
    places = [str(module), str(data)]
    assert python(program, readable=places).output == "mine data\n"
    assert "Read-only" in python(f"open('{module}/new', 'w')", readable=places).output or os.geteuid() == 0
    assert "exit 1" in python(f"os.remove({str(data)!r})", readable=places).reason
    assert data.exists()


@needs_bubblewrap
def test_what_cannot_be_readable(tmp_path):
    for place in (str(tmp_path / "nothing"), "/", "/tmp", "/proc/"):
        with pytest.raises(UserError, match=f"readable: was {place}, must exist, not be / or /tmp"):
            python("pass", readable=[place])
    (tmp_path / "private").write_text("x")
    (tmp_path / "private").chmod(0o600)
    if os.geteuid() == 0:
        with pytest.raises(UserError, match="private, must exist, not be / or /tmp, and for root be readable by all"):
            python("pass", readable=[str(tmp_path / "private")])
    else:
        assert python(f"open({str(tmp_path / 'private')!r})", readable=[str(tmp_path / "private")]).passed


@every_way
def test_python_is_the_interpreter_of_the_run(way):
    words = ["python", "-c", "import sys; print(sys.prefix)"]
    [outcome] = run_many([Job(words, unsafe=way == "unsafe")], SMALL, 1)
    assert outcome.output == f"{sys.prefix}\n"


@every_way
def test_a_command_that_cannot_start(way, tmp_path):
    def run(words):
        return run_many([Job(words, unsafe=way == "unsafe")], SMALL, 1)

    plain = tmp_path / "plain"
    plain.write_text("no program")
    for words, name in [(["no-such-command"], "no-such-command"), ([str(plain)], str(plain)), ([], "")]:
        with pytest.raises(UserError, match=f"cannot start '{name}': it is not installed, or is not a program"):
            run(words)
    plain.chmod(0o755)
    assert "no: not found" in run([str(plain)])[0].output  # without "#!" a shell runs it


def test_limits_are_checked():
    for name, value in [("seconds", 0), ("memory_mb", -1), ("processes", 1.5), ("seconds", float("nan"))]:
        with pytest.raises(UserError, match=f"the limit {name} must be a positive"):
            Limits(**{name: value})


@needs_bubblewrap
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


@every_way
def test_one_that_cannot_start_ends_the_many(way):
    jobs = [Job([name], unsafe=way == "unsafe") for name in ("nothing-here", "true")]
    with pytest.raises(UserError, match="cannot start 'nothing-here'"):
        run_many(jobs, SMALL, workers=2)


# --- without bubblewrap ---------------------------------------------------------------------------------------------


def test_without_bubblewrap_the_error_names_the_package(monkeypatch, tmp_path):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **options: None if name == "bwrap" else which(name, **options))
    with pytest.raises(
        UserError, match=r"'bwrap': it is not installed.* apt-get install bubblewrap .0.8.* source.unsafe: true"
    ):
        run_limited(["true"], "", SMALL)


def test_a_bubblewrap_that_may_not_make_namespaces(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bwrap: No permissions to create new namespace >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        UserError,
        match=r"No permissions to create new namespace; apt-get install bubblewrap .* allow it .* source.unsafe: true",
    ):
        run_limited(["true"], "", SMALL)


@pytest.mark.parametrize("way", ["unsafe"])
def test_unsafe_programs_have_limits_and_their_group_is_killed(way):
    outcome = python("blocks = []\nwhile True: blocks.append(bytearray(1 << 20))", way=way)
    assert "MemoryError" in outcome.output or outcome.reason == "killed: memory"
    assert "File too large" in python("open('a', 'wb').write(bytes(5 << 20))", way=way).output
    many = "for _ in range(4):\n    if os.fork() == 0: break\nblock = b'x' * (100 << 20); time.sleep(600)"
    assert python(many, way=way).reason == "killed: memory"
    start = time.monotonic()
    outcome = python("if os.fork() == 0: time.sleep(600)\nprint('done')", way=way)
    assert (outcome.reason, outcome.output) == ("ok", "done\n")
    assert time.monotonic() - start < SOON


@pytest.mark.parametrize("way", ["unsafe"])
def test_unsafe_programs_see_everything(way, tmp_path):
    """What the warning says, so that it stays true."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = (
            f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}))\n"
            f"open({str(tmp_path / 'mine')!r}, 'w').write('x')"
        )
        [outcome] = run_many([Job([PYTHON, "-I", "-c", program, MARK], unsafe=True)], SMALL, 1)
    assert outcome.passed
    assert (tmp_path / "mine").read_text() == "x"
