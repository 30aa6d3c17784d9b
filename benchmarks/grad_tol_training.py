"""Is training harmed by `grad_tol`? `python -m benchmarks.grad_tol_training [--json file]`; 40 minutes on one core.

SmolLM2-135M-Instruct is trained by DPO on short pairs of PIQA, all weights (the head is tied to the embedding, so both
dX and dW of the head count), once for each tolerance and seed. A seed is an order of the pairs. Every model is judged
on the same held-out pairs, beside the model of the same seed that was trained with exact gradients:

    pair accuracy, reward margin, KL    as in smollm2.py
    distance                            ‖w − w_exact‖ ÷ ‖w_exact − w_initial‖ in the body, in the head's rows of
                                        tokens that training has seen, and in its other rows

Intervals are 95 % of 2,000 bootstrap samples of the held-out pairs; differences are paired. Runs and data are in
runs/grad-tol-training: what is finished is not repeated, what was stopped begins again. --quick: a few pairs.
`--pairs 1000 --seeds 1` trains for 500 steps instead of 100, an hour and a quarter: does what is left out add up?
`--relative`: tolerances are relative to 1 − p (`grad_tol_relative`); the exact runs are the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import grad_tol_training_page, measure, problem, real, smollm2, smollm2_data
from benchmarks.real_models import model_folder
from sdpo_kernels.stepwise.common.files import empty_folder, publish_folder
from sdpo_kernels.stepwise.data.pairs import read_pairs
from sdpo_kernels.stepwise.data.tokenize import tokenize_pairs
from sdpo_kernels.stepwise.references.evaluation import EVAL_FILE
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

FOLDER = measure.ROOT / "runs/grad-tol-training"
FILE = "compact/stage2_commonsense.jsonl"  # PIQA: no pair is longer than LONGEST
LONGEST = 96
BATCH = 2
TOLERANCES = (0.0, 2**-8, 2**-6)
SEEDS = [1, 2, 3]
METRICS = "metrics.jsonl"
STAGE = "stage-1-piqa"
EMBEDDING = "model.embed_tokens.weight"  # and head: they are tied
PARTS = ("body", "head_seen", "head_unseen")  # in the head: rows of tokens that training has seen, and of the others

Row = dict[str, Any]


class Sizes(NamedTuple):
    """How many pairs to train on, to hold out, and of the latter to compute every logit of."""

    trained: int
    held_out: int
    kl_pairs: int


FULL, QUICK = Sizes(200, 128, 24), Sizes(8, 4, 2)


def main(arguments: list[str] | None = None) -> int:
    """Train what is not trained yet, and judge all models."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grad_tol_training", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--pairs", type=int, default=FULL.trained, help="to train on, two a step; default: 200")
    parser.add_argument("--relative", action="store_true", help="tolerances relative to 1 - p of each token")
    parser.add_argument("--quick", action="store_true", help="a few pairs: checks that all runs work")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL._replace(trained=options.pairs)
    folder = FOLDER / "quick" if options.quick else FOLDER if sizes == FULL else FOLDER / f"pairs-{sizes.trained}"

    start = model_folder("smollm2", real.RUNS)
    write_pairs(folder / "data", sizes)
    found = measure.report("grad_tol_training", arguments, torch.get_num_threads(), torch.device("cpu"))

    # all tolerances of a seed before the next one: a command that is stopped leaves whole seeds
    configs = {
        (tol, seed): settings(folder, start, sizes, tol, seed, relative=options.relative and tol > 0)
        for seed in options.seeds
        for tol in TOLERANCES
    }
    for config in configs.values():
        train(config, folder)
    found |= about(configs[0.0, options.seeds[0]], sizes, options.seeds) | {"relative": options.relative}
    found |= judge(configs, options.seeds, sizes, folder / "data")

    measure.write_json(options.json, found)
    print(measure.heading(found), table(found), sep="\n\n")
    return 0


def write_pairs(folder: Path, sizes: Sizes) -> None:
    """Write pairs to train on and others with other prompts, both spread over the file; keep what is there."""
    if folder.is_dir():
        return
    rows = [json.loads(line) for line in (problem.DATA / FILE).read_text(encoding="utf-8").splitlines()]
    trained, held_out = smollm2_data.divide(rows, sizes.trained, sizes.held_out)
    staging = empty_folder(folder.with_name(f".{folder.name}"))
    smollm2_data.write_rows(staging / "trained.jsonl", trained)
    smollm2_data.write_rows(staging / "held_out.jsonl", held_out)
    publish_folder(staging, folder)


def settings(
    folder: Path, start: Path, sizes: Sizes, grad_tol: float, seed: int, *, relative: bool = False
) -> RunConfig:
    """The settings of one run: only the tolerance, the seed and the folder differ."""
    given = {
        "model": str(start),
        "output_dir": str(folder / f"tol-{grad_tol:g}{'-relative' * relative}-seed-{seed}"),
        "grad_tol": grad_tol,
        "grad_tol_relative": relative,
        "beta": 0.1,
        "max_length": LONGEST,
        "reference_cache": str(folder / "references"),
        "stages": [{"name": "piqa", "data": str(folder / "data/trained.jsonl")}],
        "eval_data": [str(folder / "data/held_out.jsonl")],
        "trainer": {
            "learning_rate": 2e-5,
            "warmup_steps": 0.1,
            "per_device_train_batch_size": BATCH,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "seed": seed,
        },
    }
    return RunConfig.model_validate(given)


def train(config: RunConfig, folder: Path) -> None:
    """Train a run, unless it is."""
    place = Path(config.output_dir)

    # the initial model is the same in all runs; the driver takes its scores only if they are of these pairs
    scored = next(iter(sorted(folder.glob(f"tol-*/{EVAL_FILE}"))), None)
    if scored is not None and not place.is_dir():
        place.mkdir()
        shutil.copy(scored, place / EVAL_FILE)
    run(config)


def about(config: RunConfig, sizes: Sizes, seeds: list[int]) -> Row:
    """What the runs had in common."""
    trainer = {key: config.trainer[key] for key in ("learning_rate", "warmup_steps", "per_device_train_batch_size")}
    return {
        "settings": {"beta": config.beta, "max_length": config.max_length} | trainer,
        "data": FILE,
        "pairs": sizes.trained,
        "held_out": sizes.held_out,
        "kl_pairs": sizes.kl_pairs,
        "seeds": seeds,
    }


def judge(configs: dict[tuple[float, int], RunConfig], seeds: list[int], sizes: Sizes, data: Path) -> Row:
    """How well the initial model ranks, a row for each tolerance, and how far models differ."""
    config, held_out = configs[0.0, seeds[0]], data / "held_out.jsonl"
    initial = smollm2.scores(Path(config.output_dir), sizes.held_out)
    before = hidden_states(config.model, held_out, sizes.kl_pairs)
    places = {key: Path(one.output_dir) for key, one in configs.items()}
    found = {tol: judged([places[tol, s] for s in seeds], initial, before, config.beta, held_out) for tol in TOLERANCES}

    rows, tokens = [], before.lengths.view(2, -1).sum(0).double()
    for tol, ours in found.items():
        row = {"grad_tol": tol, "losses": [losses(places[tol, seed]) for seed in seeds]} | means(ours, tokens)
        row["accuracy_minus_initial"] = smollm2.interval(ours["pair_accuracy"].mean(0) - smollm2.ranked_right(initial))
        if tol:
            row["minus_exact"] = means({key: values - found[0.0][key] for key, values in ours.items()}, tokens)
        rows.append(row)
    found_apart = apart({key: place / STAGE for key, place in places.items()}, Path(config.model), seeds, data)
    return {"initial_accuracy": smollm2.interval(smollm2.ranked_right(initial)), "results": rows} | found_apart


def judged(places: list[Path], initial: Tensor, before: real.Real, beta: float, held_out: Path) -> dict[str, Tensor]:
    """What the models in `places` make of each held-out pair, [models, pairs] each; `kl` of a part of the pairs."""
    logps = torch.stack([smollm2.scores(place / STAGE, len(initial)) for place in places])
    rewards = beta * (logps - initial)
    states = (hidden_states(str(place / STAGE), held_out, len(before.lengths) // 2) for place in places)
    return {
        "pair_accuracy": smollm2.ranked_right(logps),
        "reward_margin": rewards[..., 0] - rewards[..., 1],
        "reward_chosen": rewards[..., 0],
        "reward_rejected": rewards[..., 1],
        "kl": torch.stack([smollm2.kl_sums(of_model, before)[0] for of_model in states]),
    }


def means(measures: dict[str, Tensor], tokens: Tensor) -> Row:
    """Each measure's mean over the pairs (`kl`: over the `tokens` of their answers), its interval, and by seed."""
    found = {}
    for key, values in measures.items():
        weights = tokens if key == "kl" else torch.ones_like(values[0])
        by_seed = values.sum(1) / weights.sum()
        found[key] = smollm2.interval(values.mean(0), weights) | {"seeds": by_seed.tolist()}
    return found


def hidden_states(model: str, held_out: Path, pairs: int) -> real.Real:
    """What the head of the model in a folder takes for `pairs` of the held-out pairs."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return real.extract(loaded, AutoTokenizer.from_pretrained(model), [held_out], pairs, LONGEST)


def losses(run_folder: Path) -> list[float]:
    """The training loss of each step."""
    lines = (run_folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [step["loss"] for step in map(json.loads, lines) if "loss" in step]


def apart(models: dict[tuple[float, int], Path], start: Path, seeds: list[int], data: Path) -> Row:
    """Lengths of updates, and as multiples of exact ones: distances at each tolerance and between seeds."""
    seen = seen_tokens(start, data / "trained.jsonl")
    updates = {key: lengths(model, start, seen) for key, model in models.items()}

    def ratios(found: list[tuple[int, Row]]) -> Row:
        return {part: [of[part] / updates[0.0, seed][part] for seed, of in found] for part in PARTS}

    tolerances = {
        f"{tol:g}": ratios([(seed, lengths(models[tol, seed], models[0.0, seed], seen)) for seed in seeds])
        for tol in TOLERANCES[1:]
    }
    pairs = [(one, lengths(models[0.0, one], models[0.0, other], seen)) for one, other in combinations(seeds, 2)]
    return {
        "seen_tokens": len(seen),
        "update_lengths": {
            f"{tol:g}": {part: [updates[tol, seed][part] for seed in seeds] for part in PARTS} for tol in TOLERANCES
        },
        "distances": tolerances,
        "distances_between_seeds": ratios(pairs),
    }


def seen_tokens(model: Path, file: Path) -> Tensor:
    """The tokens of a file's pairs, sorted."""
    pairs = read_pairs([str(file)], on_bad_row="error").pairs
    tokens = tokenize_pairs(pairs, AutoTokenizer.from_pretrained(model), max_length=LONGEST, truncation="keep_start")
    return torch.cat(
        [torch.from_numpy(side.ids).long() for pair in tokens for side in (pair.chosen, pair.rejected)]
    ).unique()


def lengths(one: Path, other: Path, seen: Tensor) -> Row:
    """The distance of two models' weights in each of PARTS."""
    ours, theirs = (load_file(model / "model.safetensors") for model in (one, other))
    of_rows = (ours.pop(EMBEDDING) - theirs[EMBEDDING]).square().sum(1, dtype=torch.float64)
    body = sum((weight - theirs[name]).square().sum(dtype=torch.float64).item() for name, weight in ours.items())
    head_seen = of_rows[seen].sum().item()
    squares = {"body": body, "head_seen": head_seen, "head_unseen": of_rows.sum().item() - head_seen}
    return {part: square**0.5 for part, square in squares.items()}


def table(found: Row) -> str:
    """The results in plain text."""
    lines = []
    for row in found["results"]:
        apart = [row.get("minus_exact", {}).get(key) for key in ("reward_margin", "kl")]
        measured = [row["pair_accuracy"], row["reward_margin"], row["kl"], *apart]
        lines.append(
            [grad_tol_training_page.label(found, row["grad_tol"]), *(smollm2.span(value, 4) for value in measured)]
        )
    headings = ["grad_tol", "pair accuracy", "reward margin", "KL", "margin minus exact", "KL minus exact"]
    return measure.table(headings, lines)


if __name__ == "__main__":
    raise SystemExit(main())
