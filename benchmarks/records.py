"""Results as they are made: one JSON object a line in `results.jsonl`, on the disk before the next call is timed.

    run = Run(path, {"benchmark": "head", "name": "head-8192-4096-128256", …})   # the first line says what was run
    run.add(case="ours", seconds=0.0123)                                         # each measurement is a line

A process that is killed leaves whole lines, except perhaps the last, which `read` drops. Several processes may write to
one file: each line is one append. `reports` makes of the lines what `--json` writes at a benchmark's end.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import measure

Record = dict[str, Any]
FLOORS = ("gemms", "gemms_fp32")  # cases of rivals.py, which imports torch


def append(path: Path, record: Record) -> None:
    """Write `record` as one line at the end of `path`, and wait until it is on the disk."""
    line = (json.dumps(record) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # one write: lines of processes that run side by side do not mix
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[Record]:
    """The whole lines of `path`."""
    *whole, _ = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in whole]


class Run:
    """One benchmark's lines; without a path they are kept in memory alone."""

    def __init__(self, path: Path | None, about: Record) -> None:
        self.path = path
        self.id = uuid.uuid4().hex[:8]
        self.lines: list[Record] = []
        self._write(about)

    def add(self, **found: Any) -> None:
        """One more measurement."""
        self.lines.append(found)
        self._write(found)

    def _write(self, found: Record) -> None:
        if self.path is not None:
            append(self.path, {"run": self.id} | found)


def case_answers(lines: Iterable[Record]) -> dict[str, Record]:
    """The lines of a run by case, in the form that `measure.summary` takes."""
    answers: dict[str, Record] = {}
    for line in lines:
        if "case" not in line:
            continue
        answer = answers.setdefault(line["case"], {"times_s": [], "peak_extra_bytes": None})
        if "seconds" in line:
            answer["times_s"].append(line["seconds"])
        answer |= {key: value for key, value in line.items() if key not in ("case", "seconds", "run")}

    # a case that was killed before its first timed call
    for answer in answers.values():
        if not answer["times_s"] and "skipped" not in answer:
            answer |= {"skipped": "the run ended before it was timed", "failed": True}
    return answers


def case_results(answers: dict[str, list[Record]]) -> list[Record]:
    """A report's results from the answers of every case: median, spread, memory, error, ratio to the faster floor."""
    results = [{"case": case} | measure.summary(found) for case, found in answers.items()]

    # no ratio if the floor was not measured
    floor = min((r["median_s"] for r in results if r["case"] in FLOORS and "median_s" in r), default=None)
    for result in results:
        if "median_s" in result:
            result["error_nat"] = answers[result["case"]][0].get("error_nat")
        if floor and "median_s" in result:
            result["ratio_to_floor"] = result["median_s"] / floor
    return results


def reports(path: Path) -> dict[str, Record]:
    """The reports in a results file by name: the name of the run and that of the file."""
    started: dict[str, Record] = {}
    measured: dict[str, list[Record]] = {}
    for line in read(path):
        if "benchmark" in line:
            started[line["run"]] = line
        elif "run" in line:
            measured.setdefault(line["run"], []).append(line)

    found = {}
    for run, about in started.items():
        lines = measured.get(run, [])
        whole = [line["result"] for line in lines if "result" in line]
        results = whole or case_results({case: [answer] for case, answer in case_answers(lines).items()})
        # a run that was killed at once has nothing to show
        if results:
            found[f"{about['name']}-{path.stem}"] = about | {"results": results}
    return found
