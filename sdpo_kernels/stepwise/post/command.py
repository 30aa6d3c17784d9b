"""`sdpo expo`: extrapolate between any two checkpoints, with a given α or the best of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.post.dev_score import CommandScore, PairScore
from sdpo_kernels.stepwise.post.expo import extrapolate, require_free
from sdpo_kernels.stepwise.post.search import Score, search, search_notes, search_table
from sdpo_kernels.stepwise.settings.post import ALPHAS, DEFAULT_METRIC, Metric
from sdpo_kernels.stepwise.settings.run_file import load_config


def expo_command(
    start: Path,
    aligned: Path,
    output: Path,
    *,
    alpha: float | None,
    alphas: str | None,
    data: Sequence[str],
    metric: str | None,
    config: Path | None,
    score_command: str | None,
    timeout: float | None,
    reporter: Reporter,
) -> None:
    """Write the extrapolated model to `output`, and report it; see `cli.expo` for the options.

    1. Check that the options go together.
    2. With `alpha`, extrapolate: no search.
    3. Otherwise search: score the model of every α, by preference pairs or by the user's own command.
    4. Extrapolate by the best α, with the trials in the model card.
    """
    given: dict[str, Any] = {"--search": alphas, "--data": data, "--metric": metric, "--config": config}
    given |= {"--score-command": score_command, "--timeout": timeout}
    _require_sense(alpha, {name for name, value in given.items() if value not in (None, [], ())})

    if alpha is not None:
        extrapolate(start, aligned, output, alpha)
        reporter.say(f"α {alpha:g}: {output}")
        return

    # a search takes a while: what would fail at its end is checked first
    tried = ALPHAS if alphas is None else parse_alphas(alphas)
    require_free(output)

    score: Score
    if score_command is not None:
        name, score = "score", CommandScore(score_command, timeout)
    else:
        name = metric or DEFAULT_METRIC
        settings = None if config is None else load_config(config)
        score = PairScore(start, aligned, data, _metric(name), settings, reporter)

    # next to the output, so that the trials are on the disk that must hold the result
    found = search(start, aligned, tried, score, output.absolute().with_name(f".{output.absolute().name}.search"))
    extrapolate(start, aligned, output, found.best.alpha, search_notes(found, name))

    reporter.say(search_table(found, name))
    if not found.gained:
        reporter.say("no α above 0 scored higher than the aligned model; its own weights are kept (α 0)")
    reporter.say(f"α {found.best.alpha:g}: {output}")


def _require_sense(alpha: float | None, given: set[str]) -> None:
    """Raise UserError for options that do not go together, or if one is missing."""
    if alpha is not None and given:
        raise UserError(f"{min(given)}: only a search uses it; leave out either it or --alpha")

    scored = given & {"--data", "--score-command"}
    if alpha is None and not scored:
        raise UserError("give --alpha, or --data or --score-command to search by")

    # the two kinds of score have options of their own
    if len(scored) == 2:
        raise UserError("--data: a search has one score; leave out either it or --score-command")
    useless = given & ({"--metric", "--config"} if "--score-command" in given else {"--timeout"})
    if useless:
        raise UserError(f"{min(useless)}: {min(scored)} does not use it; leave it out")


def parse_alphas(text: str) -> tuple[float, ...]:
    """'0.1,0.3' as numbers, each above 0 (0 is tried anyway)."""
    try:
        alphas = tuple(float(part) for part in text.split(","))
    except ValueError:
        alphas = ()
    if not alphas or not all(0 < alpha < float("inf") for alpha in alphas):
        raise UserError(f"--search: was {text!r}, must be numbers above 0 such as 0.1,0.3,0.5")
    return alphas


def _metric(name: str) -> Metric:
    if name not in get_args(Metric):
        raise UserError(f"--metric: was {name!r}, must be one of {', '.join(get_args(Metric))}")
    return cast(Metric, name)
