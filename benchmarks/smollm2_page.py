"""docs/smollm2.md and its picture, from what `smollm2.py` has measured: `python -m benchmarks.smollm2_page`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from benchmarks.page import markdown, source

RESULTS = ROOT / "benchmarks/results/smollm2-cpu.json"
FILES = {
    "heldout_stage1_orca_gsm8k": "Orca, GSM8K",
    "heldout_stage2_ultrafeedback": "UltraFeedback",
    "heldout_stage3_human_chat": "human chat",
    "heldout_eval": "eval",
}
COLOURS = {"": "#999999", "sDPO": "#cc6677", "DPO": "#4477aa"}
TEXT = """\
<!-- made by python -m benchmarks.smollm2_page from {results}; do not edit -->

# A real chat model: SmolLM2-135M

DPO and stepwise DPO with LoRA on SmolLM2-135M-Instruct (Apache-2.0), on {total} short pairs of real preference data.
The weights come from a package of the registry, as a GGUF file of 4 bits (8 in the head), dequantised to float32: they
are not exactly the original ones. From the repository's root, with ../shared/data beside it:

    make bench-env                           # gguf, which reads the file
    python -m benchmarks.smollm2 --prepare   # the model, and the pairs to train on and to judge by
    sdpo train examples/smollm2.yaml         # sDPO; stop it at any time, and run it again
    python -m benchmarks.smollm2 --json {results}  # both runs, as far as they are not finished, and all figures
    python -m benchmarks.smollm2_page        # this page

sDPO trains on {stages}, one stage after the other; DPO trains on the same pairs at once. Both see
each pair once, with the same settings: {settings}.
The stages of a run took {seconds} with {threads}, evaluation included, beside other work on the machine.

{table}

![Held-out pair accuracy, reward margin and KL of the initial model, of each stage, and of DPO](smollm2.png)

Judged on {held_out} held-out pairs. In brackets: 95 % intervals over these pairs. Seeds, over which figures are means:
{seeds}; how much another order of the pairs would change is not in any interval. KL is from the initial model, on the
answers of {kl_pairs} of the pairs. The rewards are relative to the initial model, with β {beta}.

{difference}

Pair accuracy by the file that the held-out pairs come from:

{by_file}

{source}
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the page and its picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2_page", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)

    report = json.loads(options.results.read_text(encoding="utf-8"))
    (options.docs / "smollm2.md").write_text(page(report), encoding="utf-8")
    picture(report, options.docs / "smollm2.png")
    return 0


def page(report: dict[str, Any]) -> str:
    """The text of the page."""
    rows, settings = report["results"], dict(report["settings"])
    pairs = {name: count for name, count in report["pairs"].items() if name != "all"}
    return TEXT.format(
        results=RESULTS.relative_to(ROOT),
        total=sum(pairs.values()),
        stages=", ".join(f"{name} ({count} pairs)" for name, count in pairs.items()),
        settings=", ".join(f"{name} {value}" for name, value in settings.items()),
        seconds=" and ".join(
            f"{sum(values) / len(values) / 60:.0f} minutes ({name})" for name, values in report["stage_seconds"].items()
        ),
        seeds=", ".join(map(str, report["seeds"])),
        threads="one thread" if report["machine"]["threads"] == 1 else f"{report['machine']['threads']} threads",
        table=markdown(
            ["model", "pair accuracy %", "change (points)", "reward accuracy %", "reward margin", "KL (nat a token)"],
            [cells(row) for row in rows],
        ),
        held_out=rows[0]["pairs"],
        kl_pairs=report["kl_pairs"],
        beta=settings["beta"],
        difference=difference(rows),
        by_file=markdown(
            ["model", *FILES.values(), "all, by seed"],
            [
                [name(row), *(f"{100 * row['accuracy_of_files'][file]:.0f}" for file in FILES), by_seed(row)]
                for row in rows
            ],
        ),
        source=source(report),
    )


def name(row: dict[str, Any]) -> str:
    """What the tables call a model."""
    return f"{row['run']}, after {row['stage']}" if row["run"] else row["stage"]


def by_seed(row: dict[str, Any]) -> str:
    """The pair accuracy with each seed."""
    return ", ".join(f"{100 * value:.1f}" for value in row["pair_accuracy"]["seeds"])


def cells(row: dict[str, Any]) -> list[str]:
    """A model's row of the table."""
    if not row["run"]:
        return [name(row), shown(row["pair_accuracy"], 100, 1), "–", "–", "–", "–"]
    return [
        name(row),
        shown(row["pair_accuracy"], 100, 1),
        shown(row["accuracy_minus_initial"], 100, 1, "+"),
        shown(row["reward_accuracy"], 100, 1),
        shown(row["reward_margin"], 1, 3, "+"),
        shown(row["kl"], 1, 4),
    ]


def shown(value: dict[str, float], scale: float, digits: int, sign: str = "") -> str:
    """mean (low … high)."""
    mean, low, high = (f"{scale * value[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} … {high})"


def difference(rows: list[dict[str, Any]]) -> str:
    """What can be said of sDPO against DPO."""
    found = rows[-1]["sdpo_minus_dpo"]
    words = "no difference can be told" if found["low"] <= 0 <= found["high"] else "more than other pairs would change"
    seeds = ", ".join(f"{100 * value:+.1f}" for value in found["seeds"])
    points = f"{shown(found, 100, 1, '+')} points (by seed: {seeds})"
    return f"Pair accuracy of sDPO minus DPO, on the same pairs: {points}: {words}."


def picture(report: dict[str, Any], path: Path) -> None:
    """Dots with intervals: pair accuracy, reward margin and KL of every model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # drawn from the bottom up, the table from the top down
    rows = report["results"][::-1]
    panels = {"pair_accuracy": ("held-out pairs ranked right (%)", 100), "reward_margin": ("reward margin", 1)}
    panels["kl"] = ("KL from the initial model (nat a token)", 1)
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 2.6), sharey=True, layout="constrained")

    for ax, (key, (label, scale)) in zip(axes, panels.items(), strict=True):
        for place, row in enumerate(rows):
            value = row.get(key, {"mean": 0.0, "low": 0.0, "high": 0.0})
            mean, low, high = (scale * value[part] for part in ("mean", "low", "high"))
            ax.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=COLOURS[row["run"]], capsize=3)
        ax.set_xlabel(label)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes[0].set_yticks(range(len(rows)), [name(row) for row in rows])

    # without the version of matplotlib, so that the file changes only with the results
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
