"""Search for α: score the model of each of several α and keep the best; α = 0, the aligned model, is always included.

found = search(start, aligned, (0.1, 0.3, 0.5), score, scratch=Path("runs/.try"))
found.best.alpha, found.gained
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from rich.table import Table

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import empty_folder, remove_folder
from sdpo_kernels.stepwise.models.load import ADAPTER
from sdpo_kernels.stepwise.models.weights import ADAPTER_CONFIG
from sdpo_kernels.stepwise.post.expo import extrapolate

Score = Callable[[Path], float]  # of a model's folder; higher is better


@dataclass(frozen=True)
class Trial:
    """One α and the score of its model."""

    alpha: float
    score: float


@dataclass(frozen=True)
class Found:
    """All trials, by ascending α from 0."""

    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the highest score; of equal ones the smallest α."""
        return max(self.trials, key=lambda trial: (trial.score, -trial.alpha))

    @property
    def gained(self) -> bool:
        """Whether any α above 0 scored higher than the aligned model itself."""
        return self.best.alpha > 0


def search(start: Path, aligned: Path, alphas: Sequence[float], score: Score, scratch: Path) -> Found:
    """Score the extrapolation by each of `alphas`, and `aligned` itself as α = 0.

    1. Take the α in descending order, 0 last: folders that do not match raise at the first one.
    2. For each, write the model to `scratch` (a LoRA adapter to scratch/adapter) and call `score` on its folder.
    3. Remove `scratch`, also after an error.

    UserError if a score is not finite.
    """
    is_adapter = (aligned / ADAPTER_CONFIG).is_file()
    folder = scratch / (ADAPTER if is_adapter else "model")
    trials = []

    try:
        for alpha in sorted({0.0, *alphas}, reverse=True):
            # one model on the disk at a time; α = 0 needs none, but an adapter is scored under its fixed name
            empty_folder(scratch)
            made = alpha > 0 or is_adapter
            if made:
                extrapolate(start, aligned, folder, alpha)

            value = float(score(folder if made else aligned))
            if not isfinite(value):
                raise UserError(f"alpha {alpha:g}: its score is {value}, must be a finite number")
            trials.append(Trial(alpha, value))
    finally:
        remove_folder(scratch)

    return Found(tuple(reversed(trials)))


def search_table(found: Found, metric: str) -> Table:
    """The trials as a table for the terminal, the best one marked."""
    table = Table(title="extrapolation by α")
    for title in ("α", metric, ""):
        table.add_column(title, justify="left" if title == "" else "right")
    for trial in found.trials:
        kept = "kept" if trial == found.best else ""
        aligned = "the aligned model" if trial.alpha == 0 else ""
        table.add_row(f"{trial.alpha:g}", f"{trial.score:.6g}", ", ".join(filter(None, (aligned, kept))))
    return table


def search_notes(found: Found, metric: str) -> list[str]:
    """The trials as lines of Markdown for the model card."""
    lines = [f"| α tried | {metric} |", "|---|---|"]
    lines += [f"| {trial.alpha:g} | {trial.score:.6g} |" for trial in found.trials]
    if not found.gained:
        lines += ["", "No α above 0 scored higher than the aligned model."]
    return lines
