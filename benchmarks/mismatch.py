"""How far off is a token's probability? `python -m benchmarks.mismatch [--json results.json]`

Trainer and inference engine compute the same token's log-prob by different code. A head with bfloat16 logits rounds
them to 8 bits: at a logit of 40 to 0.25 nat. Here every peer computes one DPO step in which each sequence is one token,
while the logits grow: the peak, the largest logit of a row, is 5 to 640 on average. Tokens are drawn from the softmax,
as a model samples them. With `--real smollm2` the rows of a real model and its data come last (see `real.py`).

    nat          the largest error of a token's log-prob, against float64 on the same rounded operands
    ÷ peak       the same relative to the peak: what rounding logits to float32 explains is about 1e-7
    probability  the mean of |p̂ ÷ p − 1|
    dX, dW       the norm of the gradient's error over the gradient's norm

Then the log-probs again: pairs in another order, half of them alone, one thread instead of all, and for ours without a
stash. "same bits" names what changed nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.accuracy import relative
from benchmarks.mismatch_cases import CASES, point_of
from benchmarks.problem import CannotRun, Problem, Step, Truth, true_step
from benchmarks.real import load, require, single_tokens
from benchmarks.rivals import RIVALS

PEAKS = [5, 10, 20, 40, 80, 160, 320, 640]
QUICK = {"pairs": 6, "hidden": 64, "vocab": 300, "peaks": [5, 80], "threads": 1}


def main(arguments: list[str] | None = None) -> int:
    """Measure all peaks; as a child process, one case."""
    options = parse(arguments)
    if options.child:
        found = [measured(case, point, options) for case in options.cases for point in [*options.peaks, *options.real]]
        print(json.dumps({"results": found}))
        return 0

    require(options.real)
    report = measure.report("mismatch", arguments, options.threads, torch.device(options.device))
    report["shape"] = {name: getattr(options, name) for name in ("pairs", "hidden", "vocab", "device")}
    report["results"] = []
    for case in options.cases:
        numbers = [f"--{name}={getattr(options, name)}" for name in ("pairs", "hidden", "vocab", "device", "threads")]
        chosen = ["--cases", case, "--peaks", *map(str, options.peaks), "--real", *options.real]
        answer = measure.run_fresh("benchmarks.mismatch", ["--child", *numbers, *chosen], options.threads)
        report["results"] += answer.get("results", [{"case": case} | answer])

    print(show(report))
    measure.write_json(options.json, report)
    return measure.exit_status(report["results"], options.device)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mismatch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32, help="half the number of tokens")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--peaks", type=int, nargs="+", default=PEAKS)
    parser.add_argument("--real", nargs="*", default=[], metavar="MODEL", help="models of benchmarks.real")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help=f"a tiny run: {QUICK}")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    return options


def problem_at(options: argparse.Namespace, point: float | str) -> Problem:
    """The problem at a peak or of a real model, in bfloat16."""
    if isinstance(point, str):
        return single_tokens(load(point), options.pairs).cast(torch.bfloat16, options.device)
    return problem_of(options, point)


def problem_of(options: argparse.Namespace, peak: float) -> Problem:
    """Sequences of one token, drawn from the softmax of logits whose largest is `peak` on average.

    Operands are rounded to bfloat16, whatever the case's own dtype: all cases have the same truth.
    """
    shape = (options.pairs, 1, options.hidden, options.vocab)
    problem = Problem.random(*shape, 1.0, torch.bfloat16, options.device)
    weight = problem.weight.detach()
    factor = peak / peak_of(problem)

    hidden, ref = ((states.detach() * factor) for states in (problem.hidden, problem.ref_hidden))
    probs = (hidden.flatten(0, 1).double() @ weight.double().t()).softmax(1)
    drawn = torch.multinomial(probs, 1, generator=torch.Generator(options.device).manual_seed(0))
    return replace(problem, hidden=hidden.requires_grad_(), ref_hidden=ref, labels=drawn)


def measured(case: str, point: float | str, options: argparse.Namespace) -> dict[str, Any]:
    """A case's errors at one peak or on a real model's rows, and what leaves its bits alone."""
    torch.set_num_threads(options.threads)
    rival, dtype = CASES[case]
    problem = problem_at(options, point)
    truth = true_step(problem)
    peak = peak_of(problem) if isinstance(point, str) else point
    about = {"case": case, "peak": peak} | ({"real": point} if isinstance(point, str) else {})
    try:
        mine = problem.cast(getattr(torch, dtype))
        step = RIVALS[rival](mine)()
    except CannotRun as reason:
        return about | {"skipped": str(reason)}
    assert step is not None
    return about | errors_of(step, mine, truth, peak) | {"same_bits": same_bits(rival, mine, step.policy_logps)}


def peak_of(problem: Problem) -> float:
    """The largest logit of a row, on average."""
    rows, weight = problem.hidden.detach().flatten(0, 1).double(), problem.weight.detach().double()
    return (rows @ weight.t()).amax(1).mean().item()


def errors_of(step: Step, problem: Problem, truth: Truth, peak: float) -> dict[str, float]:
    """Errors of log-probs, of probabilities and of both gradients."""
    assert problem.hidden.grad is not None
    assert problem.weight.grad is not None
    off = step.policy_logps.double() - truth.policy_logps
    return {
        "nats": off.abs().max().item(),
        "of_peak": off.abs().max().item() / peak,
        "probability": off.expm1().abs().mean().item(),
        "dx": relative(problem.hidden.grad, truth.hidden_grad),
        "dw": relative(problem.weight.grad, truth.weight_grad),
    }


def same_bits(rival: str, problem: Problem, logps: Tensor) -> list[str]:
    """Which changes leave every bit of the log-probs as it was."""
    pairs = len(problem.labels) // 2
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(1)).to(problem.labels.device)
    half = torch.arange(pairs // 2, device=order.device)

    def again(chosen: Tensor, case: str = rival) -> Tensor:
        found = RIVALS[case](rows_of(problem, torch.cat([chosen, chosen + pairs])))()
        assert found is not None
        return found.policy_logps

    def of(chosen: Tensor) -> Tensor:
        return torch.cat([logps[chosen], logps[chosen + pairs]])

    every, threads = torch.arange(pairs, device=order.device), torch.get_num_threads()
    checks: dict[str, Callable[[], bool]] = {
        "repeated": lambda: torch.equal(again(every), logps),
        "order": lambda: torch.equal(again(order), of(order)),
        "batch": lambda: torch.equal(again(half), of(half)),
    }
    if rival == "ours":
        checks["stash"] = lambda: torch.equal(again(every, "ours_without_stash"), logps)
    if threads > 1:
        checks["threads"] = lambda: with_one_thread(threads, lambda: torch.equal(again(every), logps))
    return [name for name, holds in checks.items() if holds()]


def with_one_thread(threads: int, check: Callable[[], bool]) -> bool:
    """`check` in one thread; afterwards there are `threads` again."""
    torch.set_num_threads(1)
    try:
        return check()
    finally:
        torch.set_num_threads(threads)


def rows_of(problem: Problem, rows: Tensor) -> Problem:
    """The problem of some sequences."""
    hidden = problem.hidden.detach()[rows].requires_grad_()
    return replace(problem, hidden=hidden, ref_hidden=problem.ref_hidden[rows], labels=problem.labels[rows])


def show(report: dict[str, Any]) -> str:
    """The report as a table."""
    lines, skipped = [], {}
    for result in report["results"]:
        if "skipped" in result:
            skipped[result["case"]] = result["skipped"]
            continue
        figures = [f"{result[name]:.1e}" for name in ("nats", "of_peak", "probability", "dx", "dw")]
        lines.append([result["case"], point_of(result), *figures, " ".join(result["same_bits"])])
    table = measure.table(["case", "peak", "nat", "÷ peak", "probability", "dX", "dW", "same bits"], lines)
    return "\n".join([measure.heading(report), "", table, *(f"{case}: {why}" for case, why in skipped.items())])


if __name__ == "__main__":
    raise SystemExit(main())
