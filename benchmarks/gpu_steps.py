"""Runs steps one after another, or side by side, until a deadline; every failure reaches the exit status.

    runner = Runner(out, seconds=240)
    runner.end_on_signals()
    runner.run([Step("tests-eager", ("python3", "-m", "pytest", …), at_most=90), …])     # side by side
    exit(runner.finish())

What the steps print goes to `out/log.txt`, each line with its step's name before it; how each ended goes to
`out/results.jsonl`. All processes stay in one process group, so that whoever kills the group ends all of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks import records

LEAST = 5.0  # seconds; with less left, a step is not started
RESERVE = 2.0  # seconds kept for the summary
MOST_LOG = 3 * 2**20  # bytes of one step's output in the log: files over 16 MiB do not come back
TAIL, LONG_TAIL = 14, 60  # lines shown at the end of a step, and of one that failed


@dataclass(frozen=True)
class Step:
    """One command of a call."""

    name: str
    command: tuple[str, ...]
    at_most: float  # seconds, or what is left
    environment: Mapping[str, str] = field(default_factory=dict)


class Runner:
    """The steps of one call, against one deadline."""

    def __init__(self, out: Path, seconds: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.ended: list[dict[str, Any]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.log = open(out / "log.txt", "ab", buffering=0)  # noqa: SIM115 - as long as this object
        self.lock = threading.Lock()

    def end_on_signals(self) -> None:
        """From now on a signal that asks this process to end also ends the steps, and is noted in the results."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._interrupted)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - RESERVE - time.monotonic()

    def run(self, steps: Sequence[Step]) -> None:
        """Run `steps` side by side, each until its end or its limit."""
        if self.left() < LEAST:
            for step in steps:
                self._note(step, "not started: no time is left", 0.0)
            return

        tried = [(step, time.monotonic(), self._start(step)) for step in steps]
        started = [(step, since, process) for step, since, process in tried if process is not None]
        readers = [self._read(step, process) for step, _, process in started]
        waiting = list(zip(started, readers, strict=True))
        while waiting:
            for entry in list(waiting):
                (step, since, process), (reader, tail) = entry
                spent, limit = time.monotonic() - since, min(step.at_most, self.deadline - RESERVE - since)
                if process.poll() is None and spent < limit:
                    continue

                too_long = process.poll() is None
                if too_long:
                    kill_tree(process.pid)
                code = process.wait()
                reader.join(timeout=2)
                self._note(step, f"killed after {spent:.0f} s" if too_long else code, spent, tail)
                waiting.remove(entry)
            time.sleep(0.05)

    def finish(self) -> int:
        """Show how all steps ended; 1 if one failed, else 0."""
        failed = [end for end in self.ended if end["exit"] != 0]
        print(f"\n{'step':<28}{'seconds':>8}  exit", flush=True)
        for end in self.ended:
            print(f"{end['step']:<28}{end['seconds']:>8.1f}  {end['exit']}", flush=True)
        names = ", ".join(end["step"] for end in failed)
        print(
            f"FAILED: {names}" if failed else "all steps passed", f"({time.monotonic() - self.start:.0f} s)", flush=True
        )
        return 1 if failed or not self.ended else 0

    def _start(self, step: Step) -> subprocess.Popen[bytes] | None:
        """The step's process; None, and a note, if there is no such program."""
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        environment = os.environ | dict(step.environment)
        pipes: dict[str, int] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        try:
            process = subprocess.Popen(step.command, env=environment, **pipes)
        except OSError as error:
            self._note(step, f"not started: {error}", 0.0)
            return None
        self.processes.append(process)
        return process

    def _read(self, step: Step, process: subprocess.Popen[bytes]) -> tuple[threading.Thread, deque[str]]:
        """Copy the step's output to the log as it comes; the last lines are kept."""
        tail: deque[str] = deque(maxlen=LONG_TAIL)
        assert process.stdout is not None
        reader = threading.Thread(target=self._copy, args=(step.name, process.stdout, tail), daemon=True)
        reader.start()
        return reader, tail

    def _copy(self, name: str, output: IO[bytes], tail: deque[str]) -> None:
        written = 0
        for line in output:
            tail.append(line.decode(errors="replace").rstrip("\n"))
            written += len(line)
            if written < MOST_LOG:
                with self.lock:
                    self.log.write(f"[{name}] ".encode() + line)

    def _note(self, step: Step, code: object, seconds: float, tail: Sequence[str] = ()) -> None:
        end = {"step": step.name, "exit": code, "seconds": round(seconds, 1)}
        self.ended.append(end)
        records.append(self.out / "results.jsonl", end)
        shown = list(tail)[-(TAIL if code == 0 else LONG_TAIL) :]
        print(f"-- {step.name}: exit {code} after {seconds:.1f} s", *shown, sep="\n", flush=True)

    def _interrupted(self, number: int, frame: object) -> None:
        """End what runs, say what was done, and exit."""
        for process in self.processes:
            if process.poll() is None:
                kill_tree(process.pid)
        records.append(self.out / "results.jsonl", {"step": "call", "exit": f"signal {number}", "seconds": 0.0})
        self.finish()
        sys.exit(128 + number)


def kill_tree(root: int) -> None:
    """Kill a process that we started and all that it started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # the second field, a name in parentheses, may hold spaces
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))

    found = [root]
    for process in found:
        found += children.get(process, [])
    for process in found:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
