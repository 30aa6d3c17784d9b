"""The page of results, generated and never typed by hand: `python -m benchmarks.page`.

Reads benchmarks/results/**/*.json and *.jsonl (what benchmarks/gpu.sh brings back, see `records.py`) and writes
docs/benchmarks.md, docs/benchmarks-*.png and the table at the top of README.md. Each table names command, machine,
versions, commit and date of its JSON. Benchmarks without a result are listed as not measured yet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    betas_page,
    grad_tol_page,
    grad_tol_training_page,
    mismatch_page,
    pictures,
    readme_table,
    records,
)  # fmt: skip
from benchmarks.measure import ROOT
from benchmarks.names import name as name_of

Report = dict[str, Any]
TITLES = {
    "head": "One DPO step at the head",
    "floor": "Ours against the bare-GEMM baseline, over shapes",
    "accuracy": "Log-probs and gradients against float64",
    "mismatch": "The error of a token's probability as logits grow",
    "grad_tol": "A backward that leaves small gradients out",
    "grad_tol_training": "Training with small gradients left out",
    "scaling": "How time and memory scale",
    "step": "A whole training step against TRL's DPOTrainer",
    "body": "What shared prompts save in a model's body",
    "sharded": "A head sharded over two processes",
    "vocab_parallel": "A vocabulary cut over two processes",
    "stages": "SFT, DPO and stepwise DPO over seeds",
    "betas": "Stages and references at equal distance",
    "parts": "Parts of a step on a GPU",
}
ROWS = (
    "Ours, the bare GEMMs and `trl_fused_scored` multiply the scored rows alone, the other cases all rows. On a GPU "
    "TRL itself leaves the others out, on a CPU it does not."
)
# listed only where it was measured
NOT_ANNOUNCED = {"parts", "body", "sharded", "vocab_parallel", "betas", "grad_tol", "grad_tol_training"}


def main(arguments: list[str] | None = None) -> int:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--readme", type=Path, help="default: README.md, if --docs is the project's own")
    options = parser.parse_args(arguments)
    if options.readme is None and options.docs == ROOT / "docs":
        options.readme = ROOT / "README.md"

    reports = read_reports(options.results)
    for name, report in reports.items():
        pictures.draw(report, options.docs / f"benchmarks-{name}.png")
    (options.docs / "benchmarks.md").write_text(page(reports), encoding="utf-8")
    if options.readme:
        old = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(readme_table.put(old, reports), encoding="utf-8")
    return 0


def read_reports(folder: Path) -> dict[str, Report]:
    """All reports by the name of their file, sorted, then those of results files; other JSON files are ignored."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))}
    for path in sorted(folder.rglob("*.jsonl")):
        found |= records.reports(path)
    return {name: report for name, report in found.items() if report.get("benchmark") in TITLES}


def page(reports: dict[str, Report]) -> str:
    """The text of the page: one section per benchmark, with all of its reports."""
    parts = ["<!-- made by python -m benchmarks.page from benchmarks/results; do not edit -->", "# Benchmarks"]
    parts.append(
        "Each script in [benchmarks](../benchmarks) describes at its top how it measures. The "
        "[notes](../benchmarks/results/notes.md) record what was expected before the runs. The bare-GEMM "
        'baseline ("floor") is only the four matrix products of a step on the scored rows: `gemms` in the problem\'s '
        "dtype or `gemms_fp32` in float32, whichever is faster. On a CPU without bf16 instructions float32 is."
    )

    for kind, title in TITLES.items():
        of_kind = {name: report for name, report in reports.items() if report["benchmark"] == kind}
        if kind in NOT_ANNOUNCED and not of_kind:
            continue
        parts.append(f"## {title}")
        if not of_kind:
            parts.append(f"Not measured yet: `python -m benchmarks.{kind}`.")
        if kind in SUMMARIES:
            parts += SUMMARIES[kind](list(of_kind.values()))

        for name, report in of_kind.items():
            parts += [source(report), *SECTIONS[kind](report)]
            if kind in pictures.DRAWN:
                parts.append(f"![{title}](benchmarks-{name}.png)")

    return "\n\n".join(parts) + "\n"


def source(report: Report) -> str:
    """Where the numbers of a report come from: command, machine, versions, commit, date."""
    machine = report["machine"]
    command = report.get("command", f"python -m benchmarks.{report['benchmark']}")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    instructions = f" ({machine['instructions']})" if "instructions" in machine else ""
    processor = machine["processor"] + instructions if machine["device"] == "cpu" else machine["device"]
    return (
        f"`{command}` on {processor}, {machine['threads']} threads, load {machine['load_average']:.1f}; {versions}; "
        f"commit {report['commit']}; {report['date'][:10]}."
    )


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(headings)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines))


def not_run(skipped: dict[str, str]) -> list[str]:
    """The cases that could not run, with the reason."""
    return ["Not run:\n\n" + "\n".join(f"- `{case}`: {why}" for case, why in skipped.items())] if skipped else []


def mebibytes(count: int | None) -> str:
    """Bytes in MiB."""
    return "–" if count is None else f"{count / 2**20:.0f}"


def named(case: str) -> str:
    """What a reader knows the case by, and what the command line calls it."""
    return f"{name_of(case)} (`{case}`)"


def milliseconds(seconds: float | None) -> str:
    """Seconds in milliseconds."""
    return "–" if seconds is None else f"{1e3 * seconds:.1f}"


def described(shape: dict[str, Any]) -> str:
    """A shape in words."""
    return ", ".join(f"{name} {value}" for name, value in shape.items() if value is not None)


def head_section(report: Report) -> list[str]:
    """Times, ratios to the floor, memory and error of each case."""
    lines, skipped = [], {}
    for result in report["results"]:
        if "skipped" in result:
            skipped[result["case"]] = result["skipped"]
            continue
        error, ratio = result.get("error_nat"), result.get("ratio_to_floor")
        spread = f"{1e3 * result['min_s']:.1f} … {1e3 * result['max_s']:.1f}"
        cells = [f"{1e3 * result['median_s']:.1f}", spread, "–" if ratio is None else f"{ratio:.2f}"]
        cells += [mebibytes(result["peak_extra_bytes"]), "–" if error is None else f"{error:.1e}"]
        lines.append([named(result["case"]), *cells])

    headings = ["case", "median ms", "min … max", "× floor", "extra MiB", "error (nat)"]
    above = f"Shape: {described(report['shape'])}. {ROWS} Extra memory includes the gradients."
    return [above, markdown(headings, lines), *not_run(skipped)]


def floor_section(report: Report) -> list[str]:
    """Medians of each case, and their ratios to the floor."""
    first = report["results"][0]
    cases = list(dict.fromkeys(case for result in report["results"] for case in result["median_s"]))
    lines = [
        [f"{r['dtype']} {r['shape']}", str(r["rows"]), *(milliseconds(r["median_s"].get(case)) for case in cases)]
        + [f"{ratio:.2f}" for ratio in r["ratio"].values()]
        for r in report["results"]
    ]

    headings = ["", "rows", *(f"{case} ms" for case in cases), *(f"{case} ÷ floor" for case in first["ratio"])]
    return [markdown(headings, lines)]


def accuracy_section(report: Report) -> list[str]:
    """One table per dtype and vocabulary: nats, dX and dW of each case on each input."""
    skipped = {r["case"]: r["skipped"] for r in report["results"] if "skipped" in r}
    parts = [
        f"Shape: {described(report['shape'])}. nats: the largest error of a sequence's summed log-prob; dX, dW: "
        "relative errors of the gradients. One random problem each; a model's name stands for its answers to real "
        "pairs. Rivals run as they come: with bf16 operands they round logits to bf16, `linear_cross_entropy` its "
        "losses, too."
    ]

    ran = [r for r in report["results"] if "skipped" not in r]
    for dtype, vocab in dict.fromkeys((r["dtype"], r["vocab"]) for r in ran):
        of = {(r["case"], r["input"]): r for r in ran if (r["dtype"], r["vocab"]) == (dtype, vocab)}
        inputs = list(dict.fromkeys(kind for _, kind in of))

        # a row per case; three errors per input side by side
        lines = [
            [named(case), *(errors(of.get((case, kind)), key) for kind in inputs for key in ("nats", "dx", "dw"))]
            for case in dict.fromkeys(case for case, _ in of)
        ]
        headings = [f"{dtype}, V {vocab}", *(f"{kind} {key}" for kind in inputs for key in ("nats", "dX", "dW"))]
        parts.append(markdown(headings, lines))

    return parts + not_run(skipped)


def errors(result: dict[str, Any] | None, key: str) -> str:
    """A cell: the error `key`, or a dash if the case did not run."""
    return "–" if result is None else f"{result[key]:.1e}"


def scaling_section(report: Report) -> list[str]:
    """Milliseconds / extra MiB of each case at each point."""
    skipped: dict[str, str] = {}
    cases = [result["case"] for result in report["results"][0]["results"]]
    lines = []

    for point in report["results"]:
        cells = []
        for result in point["results"]:
            if "skipped" in result:
                skipped[result["case"]] = result["skipped"]
                cells.append("–")
            else:
                cells.append(f"{1e3 * result['median_s']:.1f} / {mebibytes(result['peak_extra_bytes'])}")
        lines.append([f"{point['factor']} {point['value']}", str(point["shape"]["rows"]), *cells])

    above = f"Base: {described(report['base'])}. Each cell: median ms / extra MiB. {ROWS}"
    return [above, markdown(["point", "scored rows", *map(named, cases)], lines), *not_run(skipped)]


def step_section(report: Report) -> list[str]:
    """Time, speed and memory of the driver, with and without shared prompts, and of TRL."""
    lines, skipped = [], {}
    for result in report["results"]:
        for side, found in result["sides"].items():
            if "skipped" in found:
                skipped[side] = found["skipped"]
                continue
            spread = f"{1e3 * found['min_s']:.1f} … {1e3 * found['max_s']:.1f}"
            speed = found["tokens_a_second"]
            cells = [f"{1e3 * found['median_s']:.1f}", spread, "–" if speed is None else f"{speed:.0f}"]
            through, ratio = found.get("through_the_model"), result.get(f"{side}_over_ours")
            cells += ["–" if through is None else f"{through:.0f}", mebibytes(found["peak_extra_bytes"])]
            if ratio is not None:
                least, largest = result[f"{side}_over_ours_spread"]
                cells.append(f"{ratio:.2f} ({least:.2f} … {largest:.2f})")
            lines.append([result["task"], side, *cells, *([""] if ratio is None else [])])

    headings = ["task", "side", "median ms", "min … max", "tokens/s", "through the model", "extra MiB", "÷ ours (time)"]
    above = (
        "Mean step of an epoch over the same pairs; median and spread over rounds, ratios within a round. `ours` "
        "shares a pair's prompt between its answers, `unshared` does not; `trl` is its DPOTrainer with its fused head. "
        "On a CPU TRL multiplies prompt and padding rows in its head, which it leaves out on a GPU. These models are "
        "small and their heads a large part of a step: where the body is large, expect less."
    )
    return [above, markdown(headings, lines), *not_run(skipped)]


def body_section(report: Report) -> list[str]:
    """Tokens and seconds both ways, and the part of the time that was saved beside the parts of tokens and work."""
    lines = []
    for result in report["results"]:
        unshared, shared = result["unshared"], result["shared"]
        cells = [f"{side['tokens']:,} / {side['seconds']:.1f}" for side in (unshared, shared)]
        cells += [f"{unshared[key] / shared[key]:.2f}" for key in ("tokens", "work", "seconds")]
        lines.append(
            [result["task"], *cells, *(f"{100 * result[f'saved_of_{key}']:.0f} %" for key in ("tokens", "work"))]
        )
    headings = [
        "task",
        "tokens / s unshared",
        "shared",
        "tokens ÷",
        "work ÷",
        "seconds ÷",
        "saved of tokens",
        "of work",
    ]
    return [markdown(headings, lines)]


def sharded_section(report: Report) -> list[str]:
    """Times, bytes received and memory of each side."""
    lines = [
        [*times_of(r), *(mebibytes(r[key]) for key in ("received_bytes", "extra_bytes"))] for r in report["results"]
    ]
    headings = ["case", "median ms", "min … max", "received MiB", "extra MiB"]
    above = "Which one is faster depends on the chip. `gathered` fetches the whole head once and keeps it."
    return [f"Shape of each process: {described(report['shape'])}. {above}", markdown(headings, lines)]


def vocab_parallel_section(report: Report) -> list[str]:
    """The same and the error of each side, with how many times as long it took as ours."""
    ours = report["results"][0]["median_s"]
    lines = []
    for r in report["results"]:
        sizes = [f"{r['received_bytes'] / 2**20:.2f}", mebibytes(r["extra_bytes"])]
        lines.append([*times_of(r), f"{r['median_s'] / ours:.2f}", *sizes, f"{r['error_nat']:.1e}"])
    headings = ["case", "median ms", "min … max", "÷ ours", "received MiB", "extra MiB", "error (nat)"]
    cores = report["machine"]["cores"]
    return [
        f"Shape: {described(report['shape'])}; each process has all rows and half of the vocabulary. The two processes "
        f"share the machine's {cores} cores and one memory, so times are those of small ranks with free links, and "
        "what counts is how the cases stand to each other. received, extra: of one process. error: the largest of a "
        "log-prob against float64. On a chip without bf16 instructions torch's bf16 products are very slow, those of "
        "both `loss_parallel` cases, too: there `naive_fp32` alone is a fair rival in time.",
        markdown(headings, lines),
    ]


def times_of(result: dict[str, Any]) -> list[str]:
    """The first cells of a line: its case, median, least and largest time."""
    spread = f"{1e3 * result['min_s']:.0f} … {1e3 * result['max_s']:.0f}"
    return [f"`{result['case']}`", f"{1e3 * result['median_s']:.0f}", spread]


def stages_section(report: Report) -> list[str]:
    """Means over seeds, and sDPO minus DPO seed by seed."""

    def shown(value: dict[str, float] | None, sign: str = "") -> str:
        if value is None:
            return "–"
        mean, least, largest = (f"{100 * value[key]:{sign}.1f}" for key in ("mean", "least", "largest"))
        return f"{mean} ({least} … {largest})"

    lines = [
        [
            f"`{r['method']}`",
            str(r["seeds"]),
            shown(r["exactly_right"]),
            shown(r["gain"], "+"),
            shown(r["ranked_right"]),
        ]
        for r in report["results"]
    ]

    headings = ["method", "seeds", "exactly right %", "gain over DPO (points)", "pairs ranked right %"]
    apart = ", ".join(f"{100 * difference:+.1f}" for difference in report["sdpo_minus_dpo"])
    return [markdown(headings, lines), f"sDPO minus DPO in exactly right answers (points), seed by seed: {apart}."]


SECTIONS: dict[str, Callable[[Report], list[str]]] = {
    "head": head_section,
    "parts": head_section,  # cases side by side, too
    "floor": floor_section,
    "accuracy": accuracy_section,
    "mismatch": mismatch_page.section,
    "grad_tol": grad_tol_page.section,
    "grad_tol_training": grad_tol_training_page.section,
    "scaling": scaling_section,
    "step": step_section,
    "body": body_section,
    "sharded": sharded_section,
    "vocab_parallel": vocab_parallel_section,
    "stages": stages_section,
    "betas": betas_page.section,
}
# what stands above the reports of a benchmark
SUMMARIES: dict[str, Callable[[list[Report]], list[str]]] = {
    "grad_tol": grad_tol_page.summary,
    "grad_tol_training": grad_tol_training_page.summary,
}


if __name__ == "__main__":
    raise SystemExit(main())
