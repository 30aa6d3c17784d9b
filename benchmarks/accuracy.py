"""How accurate are log-probs and gradients? `python -m benchmarks.accuracy [--json results.json]`

One DPO step of each peer against float64 on the same (rounded) inputs, over dtypes, vocabularies and three inputs:

    plain        logits with standard deviation 3, random targets
    confident    every target's logit raised by 30: p → 1, and the gradient consists of 1 − p
    improbable   every target's logit lowered by 40: log-probs of about −55 per token
    smollm2      with `--inputs smollm2` the answers of real pairs, as a real model scores them; any model that
                 `benchmarks.real` has extracted will do

Nats: the largest error of a sequence's summed log-prob. dX, dW: the norm of the gradient's error over the gradient's
norm. The case gemms, the bare-GEMM baseline ("floor") of the other benchmarks, computes no log-probs and is left out.
One fresh process per problem runs all peers, on CUDA one for all problems: neither time nor memory is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, records, together
from benchmarks.head import DTYPES
from benchmarks.problem import IGNORE_INDEX, CannotRun, Problem, Step, Truth, true_step
from benchmarks.real import answers, load, require
from benchmarks.rivals import RIVALS

INPUTS = "plain, confident, improbable, or a model that benchmarks.real has extracted"
SHIFTS = {"plain": 0.0, "confident": 30.0, "improbable": -40.0}
# cases with the same arithmetic as another one run only if asked for
CASES = [
    "naive", "linear_cross_entropy", "trl_fused_scored", "liger_dpo_eager", "liger_sm90", "cce", "quack", "ours",
    "ours_without_stash", "ours_eager", "ours_native", "ours_native_without_stash",
]  # fmt: skip
QUICK = {"length": 32, "hidden": 64, "vocabs": [300], "dtypes": ["bf16"], "threads": 1}
ERRORS = ("nats", "dx", "dw")


def main(arguments: list[str] | None = None) -> int:
    """Measure all problems; as a child process, one of them."""
    options = parse(arguments)
    if options.child:
        print(json.dumps(measure_problem(options)))
        return 0

    require(kind for kind in options.inputs if kind not in SHIFTS)
    report = measure.report("accuracy", arguments, options.threads, torch.device(options.device))
    report["shape"] = {name: getattr(options, name) for name in ("pairs", "length", "hidden", "device")}
    run = records.Run(options.jsonl, report | {"name": "accuracy"})
    # a real model has its own vocabulary
    shapes = [(v, kind) for kind in options.inputs if kind in SHIFTS for v in options.vocabs]
    shapes += [(len(load(kind).head), kind) for kind in options.inputs if kind not in SHIFTS]
    problems = [(dtype, *shape) for dtype in options.dtypes for shape in shapes]
    one = in_this_process if options.together else one_problem
    report["results"] = []
    for dtype, vocab, kind in problems:
        for result in one(options, dtype, vocab, kind):
            run.add(result=result)
            report["results"].append(result)

    print(show(report))
    measure.write_json(options.json, report)
    return measure.exit_status(report["results"], options.device)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=(__doc__ or "").splitlines()[0])
    # the problems
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence, all of them scored")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabs", type=int, nargs="+", default=[32000, 151936])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--inputs", nargs="+", metavar="INPUT", default=list(SHIFTS), help=INPUTS)

    # the measurement
    parser.add_argument("--cases", nargs="+", choices=RIVALS, default=CASES, metavar="CASE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--jsonl", type=Path, help="append each result here as it is made")
    parser.add_argument("--together", action="store_true", help="all problems in one process, as always on CUDA")
    parser.add_argument("--quick", action="store_true", help=f"a tiny run: {QUICK}")

    # for the processes that it starts itself
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)

    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    options.together = options.together or options.device.startswith("cuda")
    return options


def one_problem(options: argparse.Namespace, dtype: str, vocab: int, kind: str) -> list[dict[str, Any]]:
    """All cases on one problem, measured in a fresh process."""
    numbers = [f"--{name}={getattr(options, name)}" for name in ("pairs", "length", "hidden", "device", "threads")]
    chosen = ["--vocabs", str(vocab), "--dtypes", dtype, "--inputs", kind, "--cases", *options.cases]
    answer = measure.run_fresh("benchmarks.accuracy", ["--child", *numbers, *chosen], options.threads)

    # a process that failed gives its reason for all cases
    found = answer.get("cases", dict.fromkeys(options.cases, answer))
    about = {"dtype": dtype, "vocab": vocab, "input": kind}
    return [about | {"case": case} | errors for case, errors in found.items()]


def in_this_process(options: argparse.Namespace, dtype: str, vocab: int, kind: str) -> Iterator[dict[str, Any]]:
    """All cases on one problem, each as soon as it is measured."""
    problem, truth = problem_and_truth(options, dtype, vocab, kind)
    about = {"dtype": dtype, "vocab": vocab, "input": kind}
    for case in options.cases:
        yield about | {"case": case} | together.attempt(lambda case=case: case_errors(case, problem, truth))


def measure_problem(options: argparse.Namespace) -> dict[str, Any]:
    """In a fresh process: the ground truth once, then each case against it."""
    (dtype,), (vocab,), (kind,) = options.dtypes, options.vocabs, options.inputs
    problem, truth = problem_and_truth(options, dtype, vocab, kind)
    return {"cases": {case: case_errors(case, problem, truth) for case in options.cases}}


def problem_and_truth(options: argparse.Namespace, dtype: str, vocab: int, kind: str) -> tuple[Problem, Truth]:
    """The problem of one dtype, vocabulary and input, and its ground truth."""
    torch.set_num_threads(options.threads)
    if kind not in SHIFTS:
        problem = answers(load(kind), options.pairs, options.length).cast(DTYPES[dtype], options.device)
        return problem, true_step(problem)

    shape = (options.pairs, options.length, options.hidden, vocab)
    problem = with_raised_targets(Problem.random(*shape, 1.0, DTYPES[dtype], options.device), SHIFTS[kind])
    return problem, true_step(problem)


def with_raised_targets(problem: Problem, by: float) -> Problem:
    """`problem` with every scored target's logit raised by `by`, for policy and reference.

    The hidden states are moved along the target's row of the weight, which is nearly orthogonal to all other rows.
    """
    directions = problem.weight.detach()[problem.labels.clamp(min=0)].float()
    directions *= by / directions.square().sum(-1, keepdim=True)
    directions[problem.labels == IGNORE_INDEX] = 0

    # in float32, and rounded once
    dtype = problem.hidden.dtype
    hidden = (problem.hidden.detach().float() + directions).to(dtype).requires_grad_()
    return replace(problem, hidden=hidden, ref_hidden=(problem.ref_hidden.float() + directions).to(dtype))


def case_errors(case: str, problem: Problem, truth: Truth) -> dict[str, Any]:
    """A case's errors on a problem, or the reason why it has none."""
    problem.zero_grad()
    try:
        found = RIVALS[case](problem)()
    except CannotRun as reason:
        return {"skipped": str(reason)}
    if found is None:
        return {"skipped": "computes no log-probs"}
    return errors_of(found, problem, truth)


def errors_of(found: Step, problem: Problem, truth: Truth) -> dict[str, float]:
    """The error in nats, and the relative errors of both gradients."""
    assert problem.hidden.grad is not None
    assert problem.weight.grad is not None
    return {
        "nats": (found.policy_logps.double() - truth.policy_logps).abs().max().item(),
        "dx": relative(problem.hidden.grad, truth.hidden_grad),
        "dw": relative(problem.weight.grad, truth.weight_grad),
    }


def relative(found: Tensor, right: Tensor) -> float:
    """‖found − right‖ ÷ ‖right‖."""
    return ((found.double() - right).norm() / right.norm()).item()


def show(report: dict[str, Any]) -> str:
    """The report as a table; cases that cannot run are listed once, below it."""
    lines, skipped = [], {}
    for result in report["results"]:
        if "skipped" in result:
            skipped[result["case"]] = result["skipped"]
            continue
        problem = f"{result['dtype']} {result['vocab']} {result['input']}"
        lines.append([problem, result["case"], *(f"{result[error]:.1e}" for error in ERRORS)])

    table = measure.table(["problem", "case", "nats", "dX", "dW"], lines)
    reasons = [f"{case}: not measured, {why}" for case, why in skipped.items()]
    return "\n".join([measure.heading(report), "", table, *reasons])


if __name__ == "__main__":
    raise SystemExit(main())
