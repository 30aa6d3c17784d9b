"""A plan in words: one line, or a table with what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sdpo_kernels.stepwise.common.units import counted
from sdpo_kernels.stepwise.memory.changes import Change, changes
from sdpo_kernels.stepwise.memory.moments import PARTS
from sdpo_kernels.stepwise.memory.of_run import PlannedRun
from sdpo_kernels.stepwise.memory.plan import RESERVE, Plan
from sdpo_kernels.stepwise.memory.target import Target

HEADINGS = {
    "scoring": "scoring",
    "forward's end": "forward",
    "head's backward": "head",
    "a layer's backward": "layer",
    "backward's end": "backward",
    "optimizer's step": "step",
}


class _Unit(NamedTuple):
    """What sizes are written in."""

    name: str
    size: int
    digits: int

    def write(self, count: int, more_digits: int = 0) -> str:
        """A size without its unit."""
        return f"{count / self.size:.{self.digits + more_digits}f}"


GIB, MIB, KIB = _Unit("GiB", 2**30, 1), _Unit("MiB", 2**20, 0), _Unit("KiB", 2**10, 0)


def plan_lines(found: PlannedRun, target: Target | None, *, quantises: bool) -> list[str]:
    """The plan in one line; with a `target` also the table and, if it does not fit, what to change.

    `quantises` says whether QLoRA is one of the changes.
    """
    plan = found.plan
    lines = [f"{line(plan)} (stage {found.stage})"]
    if target is not None:
        lines += ["", *table(plan)]
    if target is not None and not plan.fits:
        lines += ["", *change_lines(changes(found.task, plan, quantises=quantises), _unit(plan))]
    return lines


def line(plan: Plan) -> str:
    """The total and its parts at the fullest moment, without those too small to be seen."""
    unit, where = _unit(plan), "a GPU" if plan.setup.device == "cuda" else "on this CPU"
    parts = [f"{name} {unit.write(size)}" for name, size in plan.fullest.parts.items() if float(unit.write(size))]
    return f"about {unit.write(plan.total)} {unit.name} {where}: {', '.join(parts)}"


def table(plan: Plan) -> list[str]:
    """What there is at each moment of a step, and whether it fits."""
    setup, batch, unit = plan.setup, plan.batch, _unit(plan)
    gpus = "one GPU" if setup.gpus == 1 else f"each of {setup.gpus} GPUs"
    most = f"{counted(batch.pairs, 'pair')}, {batch.tokens:,} tokens, {batch.rows:,} scored"
    lines = [f"memory of {gpus} in {unit.name}, with the largest micro-batch ({most}):", ""]

    rows = {part: [moment.parts.get(part) for moment in plan.moments] for part in PARTS}
    rows["together"] = [moment.total for moment in plan.moments]
    lines.append(f"{'':17}" + "".join(f"{HEADINGS[moment.name]:>9}" for moment in plan.moments))
    for name, sizes in rows.items():
        if any(sizes):
            cells = ("" if size is None else unit.write(size, 1) for size in sizes)
            lines.append((f"{name:17}" + "".join(f"{cell:>9}" for cell in cells)).rstrip())
    return [*lines, "", *_legend(plan), _verdict(plan, unit)]


def _legend(plan: Plan) -> list[str]:
    found = [
        "scoring: references and evaluation; forward, backward: at its end; head, layer: in its backward; step: the",
        "optimizer's. The largest of these is what a GPU needs.",
    ]
    if plan.setup.tp > 1:
        found.append(
            f"tp_size {plan.setup.tp}: weights and what belongs to them are a rank's part; activations are whole."
        )
    if not plan.knows_optimizer:
        found.append(f"trainer.optim {plan.setup.optimizer}: its states are not known here; Adam's are assumed.")
    return found


def _verdict(plan: Plan, unit: _Unit) -> str:
    """Whether the fullest moment fits."""
    need = f"{unit.write(plan.total, 1)} {unit.name}, and {GIB.write(RESERVE)} GiB for CUDA and for gaps (assumed)"
    if plan.setup.memory is None:
        return f"It takes {need}."
    verb = "fits" if plan.fits else "does not fit"
    return f"It {verb}: {need}, of {GIB.write(plan.setup.memory)} GiB."


def change_lines(found: Iterable[Change], unit: _Unit) -> list[str]:
    """The changes as a table: what each brings alone, and together with those above it."""
    rows = list(found)
    if not rows:
        return ["No change that is known here makes it smaller."]
    width = max(len(change.text) for change in rows)
    lines = [
        f"What to change, in this order ({unit.name} afterwards):",
        "",
        f"{'':{width}}     alone  with those above",
    ]
    for change in rows:
        alone, together = (unit.write(plan.total, 1) for plan in (change.alone, change.together))
        fits = "  fits" if change.together.fits else ""
        lines.append(f"{change.text:{width}}{alone:>10}{together:>18}{fits}")
    if not rows[-1].together.fits:
        lines += ["", "Even together they do not fit: take more GPUs, GPUs with more memory, or a smaller model."]
    return lines


def _unit(plan: Plan) -> _Unit:
    """GiB, for small models MiB or KiB."""
    return next((unit for unit in (GIB, MIB) if plan.total >= unit.size), KIB)
