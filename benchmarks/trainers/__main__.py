"""Other projects' own DPO trainers, stock and with our adapter, on the same pairs: `make trainers`.

    python -m benchmarks.trainers [llamafactory …] [--steps 12] [--rounds 2] [--json PATH] [--page]

Each trainer gets an environment of its own under build/trainers (its pins: benchmarks/trainers/<name>.txt), because it
needs other versions than this project. Every way of a trainer is a fresh process in that environment, and the ways take
turns. Model: a Llama of two layers, width 256 and GPT-2's vocabulary (50,257), float32, random; data: pairs of
`compact`, eight a step. Seconds are the median time of an optimiser step, the first one left out; memory is the
process's peak minus its memory before training. The losses of every step are compared with the stock trainer's:
`deviation` is the largest difference. The exit status is 1 if a way failed or deviates by more than LARGEST_DEVIATION.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.trainers import page
from benchmarks.trainers.environment import environment
from benchmarks.trainers.problem import write_problem

# name -> ways, stock first; `python -m benchmarks.trainers.<name> --way <way>` runs one of them
TRAINERS: dict[str, tuple[str, ...]] = {
    "llamafactory": ("stock", "adapter"),
    "swift": ("stock", "adapter"),
    "openrlhf": ("stock", "adapter"),
    "axolotl": ("stock", "chunked", "adapter"),  # chunked: TRL's own, dpo_use_liger_kernel without our patch
}
FOLDER = measure.ROOT / "build/trainers"
LARGEST_DEVIATION = 1e-5  # of the loss, in float32 over twelve steps; measured: see docs/integrations.md
OFFLINE = {
    "DO_NOT_TRACK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named trainers, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(TRAINERS)}; default: all")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the report here; trainers not run keep their old entries")
    parser.add_argument("--page", action="store_true", help="write the report's table into docs/integrations.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(TRAINERS):
        parser.error(f"NAME: was {', '.join(sorted(unknown))}, must be of {', '.join(TRAINERS)}")

    problem = write_problem(FOLDER / "problem")
    report = measure.report("trainers", None, options.threads, torch.device("cpu")) | {
        "results": _previous(options.json)
    }
    for name in options.names or TRAINERS:
        python = environment(name, FOLDER / name)
        report["results"][name] = results = measured(name, python, problem, options)
        for way, result in results["ways"].items():
            print(page.line(name, way, result), flush=True)
        measure.write_json(options.json, report)

    if options.page:
        page.write(report)
    return exit_status(report["results"])


def measured(name: str, python: Path, problem: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Versions of the trainer, and for each of its ways the median of all rounds or why it failed."""
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in TRAINERS[name]}
    for _ in range(options.rounds):
        for way, answers in rounds.items():
            answers.append(run_way(name, way, python, problem, options))

    stock = TRAINERS[name][0]
    ways = {way: _summary(answers, rounds[stock][0]) for way, answers in rounds.items()}
    versions = next((a["versions"] for answers in rounds.values() for a in answers if "versions" in a), {})
    return {"versions": versions, "ways": ways}


def run_way(name: str, way: str, python: Path, problem: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `benchmarks.trainers.<name>` wrote, or {"failed": why}; everything it said is in <way>.log."""
    folder = FOLDER / name
    answer, log = folder / f"{way}.json", folder / f"{way}.log"
    answer.unlink(missing_ok=True)
    command = [
        str(python), "-m", f"benchmarks.trainers.{name}", "--way", way, "--steps", str(options.steps),
        "--problem", str(problem), "--output", str(folder / f"{way}-run"), "--answer", str(answer),
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    with log.open("w") as said:
        done = subprocess.run(
            command, cwd=measure.ROOT, env=os.environ | OFFLINE | threads, stdout=said, stderr=subprocess.STDOUT
        )
    if done.returncode == 0 and answer.exists():
        found: dict[str, Any] = json.loads(answer.read_text())
        return found

    last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
    return {"failed": f"exit status {done.returncode}: {last}"}


def _summary(answers: list[dict[str, Any]], stock: dict[str, Any]) -> dict[str, Any]:
    """The median of the rounds, and how far the losses are from the stock trainer's."""
    if why := next((answer["failed"] for answer in answers if "failed" in answer), None):
        return {"failed": why}

    times = [time for answer in answers for time in answer["times_s"][1:]]  # the first step warms up
    found = {
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "peak_extra_bytes": statistics.median_high([answer["peak_extra_bytes"] for answer in answers]),
        "losses": answers[0]["losses"],
        "replaced": answers[0]["replaced"],
    }
    if "losses" in stock:
        pairs = [(a, b) for answer in answers for a, b in zip(answer["losses"], stock["losses"], strict=True)]
        found["deviation"] = max(abs(a - b) for a, b in pairs)
    return found


def _previous(path: Path | None) -> dict[str, Any]:
    """The results of an earlier report."""
    if path is None or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return found


def exit_status(results: dict[str, Any]) -> int:
    """1 if a way failed, or its losses are not the stock trainer's; says which."""
    status = 0
    for name, result in results.items():
        for way, found in result["ways"].items():
            wrong = found.get("failed")
            if wrong is None and found.get("deviation", 0.0) > LARGEST_DEVIATION:
                wrong = f"its losses differ from the stock trainer's by {found['deviation']:.2g}"
            if wrong is not None:
                print(f"FAILED {name}, {way}: {wrong}", file=sys.stderr, flush=True)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
