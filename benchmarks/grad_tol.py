"""What leaving out small gradients saves on a real model's logits: `python -m benchmarks.grad_tol --model smollm2`.

`grad_tol` depends on the values, so hidden states, head and targets are a real model's (`benchmarks.real` gets them
once). The baseline is torch's four matrix products in float32; it and our steps, each with reference forward, policy
forward and backward, take turns in one process. A step with a tolerance is also compared with today's exact one.
Times are the process's CPU seconds on one thread, to which other load on a shared machine adds little.

    kept            share of (row, tile of 64 columns) pairs that the backward takes
    dX, dW error    ‖found − exact‖ ÷ ‖exact‖
    rows of dX      the same of each row's own: the median, 99 of 100, the worst

`--relative 0.0156` measures tolerances of `grad_tol_relative` beside the others; 2**-6 keeps about as much as 2**-8
without. `--model random` shows what it costs where nothing can be left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.problem import CannotRun, Problem
from benchmarks.real import load, single_tokens
from benchmarks.rivals import gemms
from sdpo_kernels import fused_linear_dpo
from sdpo_kernels.backends import choose_backend
from sdpo_kernels.backends.base import HeadCall, Keep, Request
from sdpo_kernels.backends.grad_tol import TILE, unpacked
from sdpo_kernels.head import Head

ALL = 10**12  # stash_bytes that holds everything
STASHES = {"auto": "auto", "all": ALL, "none": 0}
TOLERANCES = (2.0**-8, 2.0**-10)
ROWS = {"median": 0.5, "99 %": 0.99, "worst": 1.0}
RANDOM = (576, 49152)  # hidden, vocab


class Case(NamedTuple):
    """One way to compute the step."""

    grad_tol: float
    stash: str = "auto"  # of STASHES
    frozen: bool = False  # a head that is not trained
    relative: bool = False

    @property
    def name(self) -> str:
        """As the table and the JSON call it."""
        part, exponent = math.frexp(self.grad_tol)
        power = f"2**{exponent - 1}" if part == 0.5 else f"{self.grad_tol:g}"
        tolerance = power + " relative" * self.relative if self.grad_tol else "exact"
        return f"{tolerance}, {'frozen head' if self.frozen else f'stash {self.stash}'}"

    @property
    def exact(self) -> Case:
        """The same without a tolerance."""
        return self._replace(grad_tol=0.0, relative=False)


class Times(NamedTuple):
    """Seconds."""

    step: float
    backward: float


def main(arguments: list[str] | None = None) -> int:
    """Measure one model's head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grad_tol", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="one that benchmarks.real has extracted, or random")
    parser.add_argument("--rows", type=int, default=2048, help="scored rows, spread over all answers")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES, help="0.00390625 is 2**-8")
    parser.add_argument("--relative", type=float, nargs="+", default=(), help="tolerances of grad_tol_relative, too")
    parser.add_argument("--stashes", choices=STASHES, nargs="+", default=list(STASHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="a tiny random problem")
    options = parser.parse_args(arguments)
    for tolerance in (*options.tolerances, *options.relative):
        if not 0 < tolerance < 1:
            parser.error(f"--tolerances, --relative: was {tolerance:g}, must be above 0 and below 1; 0 is always there")
    if options.rounds < 1:
        parser.error(f"--rounds: was {options.rounds}, must be at least 1")
    torch.set_num_threads(1)

    try:
        problem = problem_of(options.model, options.rows, options.quick)
    except CannotRun as reason:
        parser.error(str(reason))
    tolerances = [Case(one) for one in options.tolerances] + [Case(one, relative=True) for one in options.relative]
    exact_and_some = [Case(0.0), *tolerances]
    cases = [case._replace(stash=stash) for stash in options.stashes for case in exact_and_some]
    cases += [case._replace(frozen=True) for case in exact_and_some]

    report = measure.report("grad_tol", arguments, 1, torch.device("cpu"))
    n_columns, width = problem.weight.shape
    model = "random" if options.quick else options.model
    report |= {"model": model, "rows": problem.labels.numel(), "hidden": width, "vocab": n_columns}
    report["tolerances"] = [quality(problem, case) for case in tolerances]
    report |= timed(problem, cases, options.rounds)
    print(show(report))
    measure.write_json(options.json, report)
    return 0


def problem_of(model: str, rows: int, quick: bool) -> Problem:
    """Rows that are sequences of their own: the first half chosen ones, the others rejected."""
    if model != "random" and not quick:
        return single_tokens(load(model), rows // 2)
    hidden, vocab = (16, 500) if quick else RANDOM
    return Problem.random(8 if quick else rows // 2, 1, hidden, vocab, 1.0, torch.float32, "cpu")


def run(problem: Problem, case: Case) -> Times:
    """One step; its gradients are left in the problem."""
    problem.zero_grad()
    weight = problem.weight.detach() if case.frozen else problem.weight
    start = time.process_time()
    out = fused_linear_dpo(
        problem.hidden, weight, problem.labels, ref_hidden=problem.ref_hidden, ref_weight=problem.ref_weight,
        beta=problem.beta, stash_bytes=STASHES[case.stash], grad_tol=case.grad_tol, grad_tol_relative=case.relative,
    )  # fmt: skip
    middle = time.process_time()
    out.loss.backward()
    end = time.process_time()
    return Times(end - start, end - middle)


def timed(problem: Problem, cases: list[Case], rounds: int) -> dict[str, Any]:
    """Medians of every case, which take turns, so that other load on the machine affects all alike."""
    floor = gemms(problem)
    floors: list[float] = []
    times: dict[Case, list[Times]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        start = time.process_time()
        floor()
        seconds = time.process_time() - start
        found = {case: run(problem, case) for case in cases}
        if number:  # the first round warms up
            floors.append(seconds)
            for case, one in found.items():
                times[case].append(one)
    problem.zero_grad()

    step, backward = (
        {case: statistics.median(getattr(one, part) for one in some) for case, some in times.items()}
        for part in Times._fields
    )
    base = statistics.median(floors)
    return {"gemms_s": base, "gemms_spread_s": [min(floors), max(floors)]} | {
        "cases": [
            case._asdict()
            | {"name": case.name, "step_s": step[case], "backward_s": backward[case]}
            | {"spread_s": [min(one.step for one in times[case]), max(one.step for one in times[case])]}
            | {"step_to_gemms": step[case] / base, "step_to_exact": step[case] / step[case.exact]}
            | {"backward_to_exact": None if case.frozen else backward[case] / backward[case.exact]}
            for case in cases
        ]
    }


def quality(problem: Problem, case: Case) -> dict[str, Any]:
    """Share of kept pairs, and errors of the gradients relative to exact ones."""
    exact, found = (gradients(problem, each) for each in (case.exact, case))
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    of_rows = ((found[0] - exact[0]).norm(dim=-1) / exact[0].norm(dim=-1)).flatten().sort().values
    rows = {name: of_rows[int(share * (len(of_rows) - 1))].item() for name, share in ROWS.items()}
    found_share = {"grad_tol": case.grad_tol, "relative": case.relative, "kept": kept_share(problem, case)}
    return found_share | {"dx_error": errors[0], "dw_error": errors[1], "dx_rows": rows}


def gradients(problem: Problem, case: Case) -> tuple[Tensor, Tensor]:
    """Of the hidden states and of the head."""
    run(problem, case)
    assert problem.hidden.grad is not None
    assert problem.weight.grad is not None
    return problem.hidden.grad, problem.weight.grad


def kept_share(problem: Problem, case: Case) -> float:
    """The share of (row, tile) pairs."""
    hidden, weight = problem.hidden.detach().flatten(0, 1), problem.weight.detach()
    dtype = hidden.dtype
    call = HeadCall(hidden, weight, None, problem.labels.flatten(), Head(), dtype, (), len(hidden))
    backend = choose_backend("auto", Request(hidden.device, dtype, dtype, Head(), ()))
    words = backend.forward(call, Keep.columns(0, case.grad_tol, case.relative)).tiles
    assert words is not None
    return unpacked(words, -(-len(weight) // TILE)).double().mean().item()


def show(report: dict[str, Any]) -> str:
    """The report as two tables."""
    about = f"{report['model']}: {report['rows']} rows, H {report['hidden']}, V {report['vocab']}"
    quality_lines = [
        [f"{one['grad_tol']:.5f}" + " relative" * one["relative"], f"{one['kept']:.3f}"]
        + [f"{error:.1e}" for error in (one["dx_error"], one["dw_error"], *one["dx_rows"].values())]
        for one in report["tolerances"]
    ]
    # an exact step with a frozen head has no product in its backward
    ratios = ("step_to_gemms", "step_to_exact", "backward_to_exact")
    lines = [
        [one["name"], f"{one['step_s']:.3f}", f"{one['backward_s']:.3f}"]
        + ["–" if one[ratio] is None else f"{one[ratio]:.2f}" for ratio in ratios]
        for one in report["cases"]
    ]
    headings = ["", "step s", "backward s", "step ÷ gemms", "step ÷ exact", "backward ÷ exact"]
    return "\n".join([
        measure.heading(report), about, "",
        measure.table(["grad_tol", "kept", "dX error", "dW error", *(f"row {name}" for name in ROWS)], quality_lines),
        "", f"four bare GEMMs in float32: {report['gemms_s']:.3f} s", measure.table(headings, lines),
    ])  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
