"""How close to bare GEMMs is one DPO step at the head? `python -m benchmarks.head [--json results.json]`

Every case gets the same tensors and gives the same log-probs and gradients: reference forward, policy forward and
backward into hidden states and weight (see `rivals.py`). Ours, the bare GEMMs and trl_fused_scored multiply the scored
rows alone, the others all rows. Each is measured in fresh processes, and the cases take turns (A B C A B C), so that
other load on the machine affects all of them; on CUDA they take turns in one process (`together.py`). The bare-GEMM
baseline ("floor") is the four matrix products on the scored rows and nothing else: the faster of gemms, in the
problem's dtype, and gemms_fp32, which wins on a CPU without bf16 instructions. Columns: median, minimum and maximum
time; ratio of the medians to the floor; peak extra memory (see `measure.py`); the largest error of a sequence's summed
log-prob against float64.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, records, together
from benchmarks.problem import DATA, IGNORE_INDEX, CannotRun, Problem, Step, has_real_masks, true_logps
from benchmarks.records import FLOORS
from benchmarks.rivals import RIVALS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PATIENCE = 10.0  # seconds of timed calls in one process, after which no new call starts
SCORED = 0.4  # share of the positions, if there are no real masks
QUICK = {"pairs": 1, "length": 16, "hidden": 32, "vocab": 200, "scored": SCORED, "repeats": 1, "rounds": 1}
SHAPE = ("pairs", "length", "hidden", "vocab", "scored", "dtype", "device")


def main(arguments: list[str] | None = None) -> int:
    """Measure all cases; as a child process, one of them once."""
    options = parse(arguments)
    if options.child:
        print(json.dumps(measure_case(options)))
        return 0

    start = measure.report("head", arguments, options.threads, torch.device(options.device))
    report = start | (measure_together(options, start) if options.together else measure_all(options))
    print(show(report))
    measure.write_json(options.json, report)
    return measure.exit_status(report["results"], options.device)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=(__doc__ or "").splitlines()[0])
    # the problem
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="positions per sequence")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument(
        "--scored", type=scored, default="real" if has_real_masks() else SCORED,
        help="share of scored positions, or `real` (the default if the real data is there): masks of real pairs",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())

    # the measurement
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per case")
    parser.add_argument(
        "--repeats", type=int, default=3, help=f"timed calls per process; none starts after {PATIENCE:.0f} s"
    )
    parser.add_argument("--cases", nargs="+", choices=RIVALS, default=list(RIVALS), metavar="CASE")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--jsonl", type=Path, help="with --together: append each measurement here as it is made")
    parser.add_argument("--together", action="store_true", help="all cases in one process, as always on CUDA")
    parser.add_argument("--quick", action="store_true", help=f"a tiny run: {QUICK}")

    # for the processes that it starts itself
    parser.add_argument("--child", choices=RIVALS, help=argparse.SUPPRESS)
    parser.add_argument("--with-error", action="store_true", help=argparse.SUPPRESS)

    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    options.together = options.together or options.device.startswith("cuda")
    return options


def scored(text: str) -> float | str:
    """Parse the value of --scored."""
    if text != "real":
        return float(text)
    if not has_real_masks():
        raise argparse.ArgumentTypeError(f"{DATA} or the package tokenizers is missing")
    return text


def problem_of(options: argparse.Namespace) -> Problem:
    """The problem of the shape in `options`."""
    shape = (options.pairs, options.length, options.hidden, options.vocab, options.scored)
    return Problem.random(*shape, DTYPES[options.dtype], options.device)


def measure_case(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one case; runs in a fresh process.

    1. Run a tiny problem, which loads the libraries.
    2. Measure peak memory on the first call of full size; it also warms up.
    3. Time calls, until there are enough or they took too long.
    4. With --with-error, compare the log-probs with float64.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    rival = RIVALS[options.child]

    try:
        rival(Problem.random(1, 8, 64, 128, 0.5, DTYPES[options.dtype], options.device))()
        problem = problem_of(options)
        step = rival(problem)
    except CannotRun as reason:
        return {"skipped": str(reason)}

    memory = measure.peak_extra_bytes(step, device)
    times: list[float] = []
    while len(times) < options.repeats and sum(times) < PATIENCE:
        problem.zero_grad()
        times.append(measure.seconds(step, device))

    rows = int((problem.labels != IGNORE_INDEX).sum())
    answer: dict[str, Any] = {"times_s": times, "peak_extra_bytes": memory, "rows": rows}

    # last, so that float64 disturbs neither memory nor time
    if options.with_error and options.child not in FLOORS:
        problem.zero_grad()
        found = step()
        assert found is not None
        truth = true_logps(problem.hidden, problem.weight, problem.labels)
        answer["error_nat"] = (found.policy_logps.double() - truth).abs().max().item()

    return answer


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases in rounds of fresh processes; returns the report's shape and results."""
    report: dict[str, Any] = {"shape": {name: getattr(options, name) for name in SHAPE}}
    answers: dict[str, list[dict[str, Any]]] = {case: [] for case in options.cases}

    # a case that cannot run is tried once; the error is the same in every round
    for number in range(options.rounds):
        for case, found in answers.items():
            if found and "skipped" in found[-1]:
                continue
            found.append(
                measure.run_fresh("benchmarks.head", child_arguments(options, case, number == 0), options.threads)
            )

    report["shape"]["rows"] = next((a["rows"] for found in answers.values() for a in found if "rows" in a), None)
    return report | {"results": records.case_results(answers)}


def measure_together(options: argparse.Namespace, start: dict[str, Any]) -> dict[str, Any]:
    """Measure all cases in this process, which draws the problem once; returns the report's shape and results."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    problem = problem_of(options)
    truth = true_logps(problem.hidden, problem.weight, problem.labels)

    def error_of(case: str, step: Step | None) -> dict[str, float]:
        return {} if step is None else {"error_nat": (step.policy_logps.double() - truth).abs().max().item()}

    shape = {name: getattr(options, name) for name in SHAPE} | {"rows": int((problem.labels != IGNORE_INDEX).sum())}
    name = f"head-{shape['rows']}-{options.hidden}-{options.vocab}"
    run = records.Run(options.jsonl, start | {"name": name, "shape": shape})
    cases = {case: lambda rival=RIVALS[case]: rival(problem) for case in options.cases}
    together.take_turns(
        cases, device, options.rounds * options.repeats, run.add, before_each=problem.zero_grad, check=error_of
    )
    answers = {case: [answer] for case, answer in records.case_answers(run.lines).items()}
    return {"shape": shape, "results": records.case_results(answers)}


def child_arguments(options: argparse.Namespace, case: str, with_error: bool) -> list[str]:
    """The arguments of a case's process."""
    names = (*SHAPE, "repeats", "threads")
    arguments = [f"--{name}={getattr(options, name)}" for name in names]
    return [*arguments, f"--child={case}", *(["--with-error"] if with_error else [])]


def show(report: dict[str, Any]) -> str:
    """The report as a table, with machine and shape above it."""
    lines, skipped = [], []
    for result in report["results"]:
        if "skipped" in result:
            skipped.append(f"{result['case']}: not measured, {result['skipped']}")
            continue

        # a value that was not measured leaves its cell empty
        memory, error, ratio = result["peak_extra_bytes"], result["error_nat"], result.get("ratio_to_floor")
        lines.append([
            result["case"],
            f"{1e3 * result['median_s']:.1f}",
            f"{1e3 * result['min_s']:.1f}",
            f"{1e3 * result['max_s']:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if memory is None else f"{memory / 2**20:.0f}",
            "" if error is None else f"{error:.1e}",
        ])  # fmt: skip

    headings = ["case", "median ms", "min ms", "max ms", "× floor", "extra MiB", "error nat"]
    shape = ", ".join(f"{name} {value}" for name, value in report["shape"].items())
    legend = '× floor: ratio to gemms or gemms_fp32, the bare-GEMM baseline ("floor"), whichever is faster'
    return "\n".join([measure.heading(report), shape, legend, "", measure.table(headings, lines), *skipped])


if __name__ == "__main__":
    raise SystemExit(main())
