"""A plan in words: one line, or a table with what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Iterable

from sdpo_kernels.stepwise.common.units import counted
from sdpo_kernels.stepwise.memory.changes import Change, changes
from sdpo_kernels.stepwise.memory.moments import PARTS
from sdpo_kernels.stepwise.memory.of_run import PlannedRun
from sdpo_kernels.stepwise.memory.plan import RESERVE, Plan
from sdpo_kernels.stepwise.memory.target import Target

GIB = 2**30
HEADINGS = {
    "forward's end": "forward",
    "head's backward": "head",
    "a layer's backward": "layer",
    "backward's end": "backward",
    "optimizer's step": "step",
}


def plan_lines(found: PlannedRun, target: Target | None, *, quantises: bool) -> list[str]:
    """The plan in one line; with a `target` also the table and, if it does not fit, what to change.

    `quantises` says whether QLoRA is one of the changes.
    """
    plan = found.plan
    lines = [f"{line(plan)} (stage {found.stage})"]
    if target is not None:
        lines += ["", *table(plan)]
    if target is not None and not plan.fits:
        lines += ["", *change_lines(changes(found.task, plan.setup, quantises=quantises))]
    return lines


def line(plan: Plan) -> str:
    """The total and its parts at the fullest moment."""
    unit, size, digits = ("GiB", GIB, 1) if plan.total >= GIB else ("MiB", 2**20, 0)
    where = "a GPU" if plan.setup.device == "cuda" else "on this CPU"
    parts = ", ".join(f"{name} {count / size:.{digits}f}" for name, count in plan.fullest.parts.items())
    return f"about {plan.total / size:.{digits}f} {unit} {where}: {parts}"


def table(plan: Plan) -> list[str]:
    """What there is at each moment of a step, in GiB, and whether it fits."""
    setup, batch = plan.setup, plan.batch
    gpus = "one GPU" if setup.gpus == 1 else f"each of {setup.gpus} GPUs"
    most = f"{counted(batch.pairs, 'pair')}, {batch.tokens:,} tokens, {batch.rows:,} scored"
    lines = [f"memory of {gpus} in GiB, with the largest micro-batch ({most}):", ""]

    names = [part for part in PARTS if any(part in moment.parts for moment in plan.moments)]
    lines.append(f"{'':18}" + "".join(f"{HEADINGS[moment.name]:>10}" for moment in plan.moments))
    for name in names:
        cells = (moment.parts.get(name) for moment in plan.moments)
        lines.append(f"{name:18}" + "".join(f"{'' if c is None else f'{c / GIB:.2f}':>10}" for c in cells))
    lines.append(f"{'together':18}" + "".join(f"{moment.total / GIB:>10.2f}" for moment in plan.moments))
    return [*lines, "", *_legend(plan), _verdict(plan)]


def _legend(plan: Plan) -> list[str]:
    found = ["forward: at its end; head, layer: in their backward; backward: at its end; step: the optimizer's."]
    if not plan.knows_optimizer:
        found.append(f"trainer.optim {plan.setup.optimizer}: its states are not known here; Adam's are assumed.")
    return found


def _verdict(plan: Plan) -> str:
    """Whether the fullest moment fits."""
    need = f"{plan.total / GIB:.2f} GiB, and {RESERVE / GIB:.0f} GiB for CUDA and for gaps (assumed)"
    if plan.setup.memory is None:
        return f"It takes {need}."
    verb = "fits" if plan.fits else "does not fit"
    return f"It {verb}: {need}, of {plan.setup.memory / GIB:.0f} GiB."


def change_lines(found: Iterable[Change]) -> list[str]:
    """The changes as a table: what each brings alone, and together with those above it."""
    rows = [(change.text, change.alone.total, change.together.total, change.together.fits) for change in found]
    if not rows:
        return ["Nothing that is known here makes it smaller."]
    width = max(len(text) for text, *_ in rows)
    lines = ["What to change, in this order (GiB):", "", f"{'':{width}}     alone  with those above"]
    for text, alone, together, fits in rows:
        lines.append(f"{text:{width}}{alone / GIB:>10.2f}{together / GIB:>18.2f}{'  fits' if fits else ''}")
    if not rows[-1][-1]:
        lines += ["", "Even together they do not fit: take more GPUs, GPUs with more memory, or a smaller model."]
    return lines
