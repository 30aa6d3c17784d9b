"""What `page.py` and `pictures.py` show of `benchmarks.grad_tol_training`: tables by tolerance, curves of the loss."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Any

from benchmarks.mismatch_page import table

Report = dict[str, Any]
COLOURS = ("#222222", "#4477aa", "#cc6677")
SMOOTHED = 10  # steps that a point of a curve is the mean of
PARTS = {
    "body": "body",
    "head_seen": "head, tokens of the training pairs",
    "head_unseen": "head, other tokens",
}


def summary(_: list[Report]) -> list[str]:
    """What the reports show together, and what they do not."""
    return [
        "Shown: runs of some hundred steps on short answers with one small model, at one learning rate. Not shown: "
        "longer runs, long answers, large models, another optimizer, and training where the tail itself matters. A "
        "vocabulary of at most 64 tokens, as the demo's, is one tile and has nothing to leave out: its models are the "
        "same bit for bit (tests/test_grad_tol_training.py)."
    ]


def section(report: Report) -> list[str]:
    """How the models do, how they differ from exact ones on the held-out pairs, and in their weights."""
    return [about(report), outcomes(report), *changes(report), *weights(report)]


def about(report: Report) -> str:
    """What was trained and judged."""
    settings = ", ".join(f"{key} {value:g}" for key, value in report["settings"].items())
    seeds, held_out = len(report["seeds"]), f"{report['held_out']} held-out pairs"
    orders = "in the same order. Means"
    if seeds > 1:
        orders = f"and each of {seeds} orders of the pairs (seeds). Means over seeds,"
    relative = ", both times 1 − p of each token (`grad_tol_relative`)" if report.get("relative") else ""
    steps, initial = len(report["results"][0]["losses"][0]), report["initial_accuracy"]["mean"]
    return (
        f"SmolLM2-135M-Instruct, trained by DPO with the driver: all weights, {steps} steps on {report['pairs']} pairs "
        f"of `{report['data']}` ({settings}), once for each tolerance {orders} on {held_out}, of which the "
        f"initial model ranks {100 * initial:.1f} % right; KL from it, on the answers of {report['kl_pairs']} of them. "
        "In brackets: 95 % intervals over the held-out pairs, which do not say what another order would change. "
        f"0.00390625 is 2**-8, 0.015625 is 2**-6{relative}."
    )


def outcomes(report: Report) -> str:
    """Losses by thirds of the run, and each model's figures."""
    lines = []
    for row in report["results"]:
        right = by_seed([100 * value for value in row["pair_accuracy"]["seeds"]], ".1f")
        cells = [f"{value:.4f}" for value in thirds(curve(row["losses"]))]
        cells += [f"{shown(row['pair_accuracy'], 100, 1)}; {right}", shown(row["accuracy_minus_initial"], 100, 1, "+")]
        cells.append(shown(row["reward_margin"], 1, 4))
        lines.append([label(report, row["grad_tol"]), *cells, shown(row["kl"], 1, 4)])
    losses = [f"loss, {name} third" for name in ("first", "second", "last")]
    headings = ["grad_tol", *losses, "pair accuracy %; by seed", "change (points)", "reward margin", "KL (nat a token)"]
    return table(headings, lines)


def changes(report: Report) -> list[str]:
    """Differences to the exact models of the same seeds, also as a part of what training has made."""
    exact, *others = report["results"]
    lines = []
    for row in others:
        apart = row["minus_exact"]
        cells = [shown(apart["pair_accuracy"], 100, 1, "+")]
        for key in ("reward_margin", "kl"):
            part = f"{100 * apart[key]['mean'] / exact[key]['mean']:+.1f} %"
            cells += [shown(apart[key], 1, 5, "+"), f"{by_seed(apart[key]['seeds'], '+.5f')}: {part}"]
        rewards = []
        for key in ("reward_chosen", "reward_rejected"):
            part = f"{100 * apart[key]['mean'] / abs(exact[key]['mean']):+.1f} % of its size"
            rewards.append(f"{by_seed(apart[key]['seeds'], '+.4f')}: {part}")
        lines.append([label(report, row["grad_tol"]), *cells, *rewards])

    headings = ["minus exact", "pair accuracy (points)", "reward margin", "by seed: mean ÷ exact"]
    headings += ["KL (nat a token)", "by seed: mean ÷ exact", "chosen reward, by seed", "rejected reward, by seed"]
    margins = exact["reward_margin"]["seeds"]
    by = " by seed" * (len(margins) > 1)
    return [table(headings, lines), f"With exact gradients the reward margin is {by_seed(margins, '.4f')}{by}."]


def weights(report: Report) -> list[str]:
    """How far weights are from the exact run's, beside the distance of two exact runs."""
    found = {f"grad_tol {label(report, float(tol))}": of for tol, of in report["distances"].items()}
    if len(report["seeds"]) > 1:
        found["exact, another seed"] = report["distances_between_seeds"]
    lines = [[name, *(by_seed(of[part], ".3f") for part in PARTS)] for name, of in found.items()]
    for tol, of in report["update_lengths"].items():
        name = f"length of the update, grad_tol {label(report, float(tol))}"
        lines.append([name, *(by_seed(of[part], ".3f") for part in PARTS)])

    exact = report["update_lengths"]["0"]
    seen, unseen = (sum(length**2 for length in exact[part]) for part in ("head_seen", "head_unseen"))
    return [
        table(["distance ÷ length of the exact update", *PARTS.values()], lines),
        "AdamW divides a weight's step by the size of its own gradients, however small they are. So exact gradients "
        f"move rows of tokens that never occur: of the head's squared update {100 * unseen / (seen + unseen):.0f} % is "
        f"there, the rest at the {report['seen_tokens']:,} tokens of the training pairs. What is left out shows there, "
        "too. (The head is tied to the embedding.)",
    ]


def label(report: Report, grad_tol: float) -> str:
    """A tolerance as the tables name it."""
    return f"{grad_tol:g}" + " · (1 − p)" * (report.get("relative", False) and grad_tol > 0)


def by_seed(values: list[float], form: str) -> str:
    """The values of the seeds."""
    return ", ".join(format(value, form) for value in values)


def shown(value: dict[str, Any], scale: float, digits: int, sign: str = "") -> str:
    """mean (low … high)."""
    mean, low, high = (f"{scale * value[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} … {high})"


def curve(losses: list[list[float]]) -> list[float]:
    """The mean over seeds at each step."""
    return [fmean(of_step) for of_step in zip(*losses, strict=True)]


def thirds(values: list[float]) -> list[float]:
    """The means of three parts of equal length, to a step."""
    ends = [len(values) * third // 3 for third in range(4)]
    return [fmean(values[start:end]) for start, end in pairwise(ends)]


def smoothed(values: list[float]) -> list[float]:
    """Means of SMOOTHED values in a row."""
    return [fmean(values[place - SMOOTHED : place]) for place in range(SMOOTHED, len(values) + 1)]


def minus(losses: list[float], others: list[float]) -> list[float]:
    """The difference at each step."""
    return [one - other for one, other in zip(losses, others, strict=True)]


def picture(report: Report, pyplot: Any) -> Any:
    """Curves of the loss, and of its difference to that of the exact runs at the same step."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    exact = report["results"][0]
    steps = range(SMOOTHED, len(exact["losses"][0]) + 1)
    left.axhline(0.693147, color="#999999", linewidth=0.8)  # ln 2, that of a policy that is its reference

    # the exact curve is drawn first, so that those that hide it are seen to lie on it
    for row, colour in zip(report["results"], COLOURS, strict=False):
        style, losses = "-" if row is exact else "--", curve(row["losses"])
        left.plot(
            steps, smoothed(losses), style, lw=1.2, color=colour, label=f"grad_tol {label(report, row['grad_tol'])}"
        )
        if row is exact:
            continue
        for one, exact_one in zip(row["losses"], exact["losses"], strict=True):
            right.plot(steps, smoothed(minus(one, exact_one)), lw=0.5, color=colour)
        right.plot(steps, smoothed(minus(losses, curve(exact["losses"]))), lw=1.6, color=colour)

    left.set_ylabel(f"loss, mean of seeds and {SMOOTHED} steps")
    right.set_ylabel("loss minus exact; thin: each seed")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.4, alpha=0.6)
    left.legend(fontsize=8, frameon=False)
    return figure
