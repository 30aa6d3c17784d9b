"""Compare the methods here on the demo's task, over seeds: `python -m examples.methods.compare`; half an hour.

Each seed has its own warm start and data (prepare.py). Every method starts from it with its YAML file in this folder;
only paths and seeds are changed. Its last model is judged on held-out words. Writes results.json and a picture to
--output; with --docs also docs/methods.png and docs/methods_results.md. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from examples.demo.evaluate import exactly_right, pair_gammas
from examples.demo.preferences import read_pairs
from examples.demo.setup import FULL, HELDOUT, QUICK, Settings, pair_file
from examples.methods.prepare import DEV_PAIRS, FOLDER, prepare
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.settings.yaml_file import read_settings, write_settings
from sdpo_kernels.stepwise.starter.letters import SOURCES, draw_words
from sdpo_kernels.stepwise.starter.tiny_model import load

HERE = Path(__file__).parent
SEEDS = (7, 8, 9)
# in the order of the table; docs/methods.md describes them
METHODS = (
    "sft", "dpo", "sdpo", "minor_dpo", "length_dpo", "dpop", "mpo", "ld_dpo", "wpo", "simpo", "mrpo", "sapo_reference",
    "ranked", "execution", "discriminator", "self_augmented", "active", "expo",
)  # fmt: skip


def start_folder(output: Path, seed: int) -> Path:
    """The folder of a seed's warm start."""
    return output / f"seed-{seed}" / "start"


def write_run_file(output: Path, seed: int, method: str) -> Path:
    """Write the method's YAML for one seed: only paths and seeds change, and evaluation during the run is off."""
    start = start_folder(output, seed)
    source = start / f"{method}.yaml" if method in ("dpo", "sdpo") else HERE / f"{method}.yaml"
    path = output / f"seed-{seed}" / f"{method}.yaml"
    path.write_text(source.read_text(encoding="utf-8").replace(str(FOLDER), str(start)), encoding="utf-8")
    settings = read_settings(path)
    settings["output_dir"] = str(output / f"seed-{seed}" / method)
    settings["trainer"]["seed"] = seed

    # evaluation takes time and changes no result, except for expo, which searches by it
    if "post" not in settings:
        settings.pop("eval_data", None)
    for stage in settings["stages"]:
        if "source" in stage:
            stage["source"]["sample_seed"] = seed
    path.write_text(write_settings(settings), encoding="utf-8")
    return path


def prepare_seed(output: Path, seed: int, settings: Settings) -> None:
    """Prepare the warm start and data of a seed; runs in a process of its own."""
    torch.set_num_threads(1)
    prepare(start_folder(output, seed), settings, Reporter(quiet=True))


def train_and_judge(output: Path, seed: int, method: str, settings: Settings) -> dict[str, Any]:
    """One row of the results.

    1. If <method>.json exists, return it: the row was computed before.
    2. Train the method by its run file; sft is the warm start itself.
    3. Judge its last model, and keep the row.
    """
    torch.set_num_threads(1)
    # make this Python execution.yaml's python3: a shim would take a third of a second to find it
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = output / f"seed-{seed}" / f"{method}.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))

    folder, pairs, seconds = start_folder(output, seed) / "start", 0, 0.0
    if method != "sft":
        record = run(load_config(write_run_file(output, seed, method)), Reporter(quiet=True))
        stage = record["stages"][-1]
        run_folder = output / f"seed-{seed}" / method
        folder = run_folder / f"stage-{stage['index']}-{stage['name']}"
        if method == "expo":
            folder = run_folder / "expo"
        pairs = sum(stage["pairs"] for stage in record["stages"])
        seconds = sum(stage["seconds"] for stage in record["stages"])

    row = judge(folder, start_folder(output, seed), settings)
    row |= {"method": method, "seed": seed, "pairs": pairs, "seconds": seconds}
    kept.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def judge(model_folder: Path, start: Path, settings: Settings) -> dict[str, float]:
    """Shares of held-out prompts answered exactly right, and of held-out pairs ranked right, over all sources."""
    model, tokenizer = load(model_folder)
    right, ranked, length = [], [], []
    for source in SOURCES:
        problems = draw_words(source, HELDOUT, settings.heldout_prompts, settings.seed)
        right.append(exactly_right(model, tokenizer, problems))

        # expo chose α by the first pairs; small data has no others
        pairs = read_pairs(pair_file(start, source.name, HELDOUT))
        rest = pairs[DEV_PAIRS:] or pairs
        ranked.append(pair_gammas(model, tokenizer, rest) > 0)
        length.append(len(right[-1]))

    return {
        "exactly_right": torch.cat(right).double().mean().item(),
        "ranked_right": torch.cat(ranked).double().mean().item(),
        "prompts": sum(length),
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, smallest and largest value over seeds, and the gain over DPO with the same seed."""
    dpo = {row["seed"]: row["exactly_right"] for row in rows if row["method"] == "dpo"}

    found = []
    for method in METHODS:
        of = [row for row in rows if row["method"] == method]
        if not of:
            continue

        # seed by seed, as both runs share their warm start and data
        gains = [row["exactly_right"] - dpo[row["seed"]] for row in of if row["seed"] in dpo]
        line: dict[str, Any] = {"method": method, "seeds": len(of)}
        for key in ("exactly_right", "ranked_right", "pairs", "seconds"):
            values = [row[key] for row in of]
            line[key] = {"mean": statistics.mean(values), "least": min(values), "largest": max(values)}
        line["gain"] = {"mean": statistics.mean(gains), "least": min(gains), "largest": max(gains)} if gains else None
        found.append(line)

    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    head = "| method | exactly right % | gain over DPO (points) | pairs ranked right % | pairs trained on |\n"
    head += "|---|---|---|---|---|\n"
    rows = []
    for line in lines:
        cells = [f"`{line['method']}`", shown(line["exactly_right"], 100)]
        cells += ["–" if line["gain"] is None else shown(line["gain"], 100, sign="+")]
        cells += [shown(line["ranked_right"], 100), f"{line['pairs']['mean']:,.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return head + "\n".join(rows) + "\n"


def shown(value: dict[str, float], scale: float, sign: str = "") -> str:
    """mean (least … largest)."""
    mean, least, largest = (f"{scale * value[key]:{sign}.1f}" for key in ("mean", "least", "largest"))
    return f"{mean} ({least} … {largest})"


def picture(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of exactly right answers with their span over seeds, and a line at DPO's mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.33 * len(lines) + 1.2), layout="constrained")

    # bars are drawn from the bottom up, the table from the top down
    names = [line["method"] for line in lines][::-1]
    values = [line["exactly_right"] for line in lines][::-1]
    means = [100 * value["mean"] for value in values]
    spans = [[100 * (v["mean"] - v["least"]) for v in values], [100 * (v["largest"] - v["mean"]) for v in values]]
    axes.barh(names, means, xerr=spans, color="#4477aa", ecolor="#222222", capsize=2, height=0.7)

    dpo = next((line["exactly_right"]["mean"] for line in lines if line["method"] == "dpo"), None)
    if dpo is not None:
        axes.axvline(100 * dpo, color="#cc6677", linewidth=1, label="DPO")
        axes.legend(loc="lower right", frameon=False)

    axes.set_xlabel("held-out words sorted exactly right (%), mean and span over seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)

    # without the version of matplotlib, so that the file changes only with the results
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write_results(output: Path, rows: Sequence[dict[str, Any]], docs: Path | None) -> None:
    """Write results.json and the picture, and with `docs` the documentation's table and picture."""
    lines = summary(rows)
    (output / "results.json").write_text(json.dumps({"rows": rows, "summary": lines}, indent=1) + "\n")
    picture(lines, output / "methods.png")
    if docs is None:
        return

    picture(lines, docs / "methods.png")
    seeds = sorted({row["seed"] for row in rows})
    text = (
        "<!-- made by python -m examples.methods.compare --docs docs; do not edit -->\n\n"
        f"Mean (least … largest) over the seeds {', '.join(map(str, seeds))}; each seed has its own start and data\n"
        f"and {rows[0]['prompts']:,} held-out prompts. A difference of means below the spans shows nothing.\n\n"
        f"{table(lines)}"
    )
    (docs / "methods_results.md").write_text(text, encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/methods/compare"))
    parser.add_argument("--docs", type=Path, help="also write methods.png and methods_results.md here")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=2, help="processes, with one thread each")
    parser.add_argument("--quick", action="store_true", help="small data, short warm-up: checks that all runs work")
    options = parser.parse_args()

    reporter = Reporter()
    sizes = {seed: replace(QUICK if options.quick else FULL, seed=seed) for seed in options.seeds}
    rows, failed = [], []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        starts = [pool.submit(prepare_seed, options.output, seed, sizes[seed]) for seed in sizes]
        for start in starts:
            start.result()

        # results arrive in any order and are sorted below
        jobs = {
            pool.submit(train_and_judge, options.output, seed, method, sizes[seed]): (seed, method)
            for method in options.methods
            for seed in options.seeds
        }
        for done in as_completed(jobs):
            seed, method = jobs[done]
            try:
                rows.append(done.result())
                reporter.say(f"seed {seed} {method}: {rows[-1]['exactly_right']:.1%} exactly right")
            except Exception as error:  # one method's failure must not lose the others' results
                failed.append(f"seed {seed} {method}: {error}")
                reporter.warn(failed[-1])

    rows.sort(key=lambda row: (METHODS.index(row["method"]), row["seed"]))
    write_results(options.output, rows, options.docs)
    reporter.say(table(summary(rows)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
