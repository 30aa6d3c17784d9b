"""DPO and stepwise DPO on a real chat model: `python -m benchmarks.smollm2 [--json results.json]`; an hour on one core.

SmolLM2-135M-Instruct with LoRA (examples/smollm2.yaml), on short pairs of the full pack. sDPO trains on them in three
stages, DPO in one; each pair is seen once. Every model is judged on the same held-out pairs:

    pair accuracy     share of pairs whose chosen answer has the higher log-prob
    reward margin     β times what training has added to log π(chosen) − log π(rejected)
    KL                Σ_v π(v) · log(π(v) / π₀(v)), π₀ the initial model: mean over the answers' tokens, nat a token

Figures are means over --seeds (the order of the pairs and the adapters' start), with the accuracy of each seed beside
them. Intervals are 95 % of 2,000 bootstrap samples of the held-out pairs. Runs and data are in runs/smollm2: what is
finished is not repeated, what was stopped resumes. `--prepare` only makes the model and the data.
"""

from __future__ import annotations

import argparse
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import measure, real
from benchmarks.real_models import model_folder
from benchmarks.smollm2_data import LONGEST, STAGES, heldout_files, write_slices
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.record.samples import SAMPLES_FILE
from sdpo_kernels.stepwise.references.cache import read_scores
from sdpo_kernels.stepwise.references.evaluation import EVAL_FILE
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

EXAMPLE = measure.ROOT / "examples/smollm2.yaml"
FOLDER = measure.ROOT / "runs/smollm2"
KL_PAIRS = 6  # of each held-out file: every logit of these is computed
DRAWS = 2000  # of the bootstrap
EXAMPLES_SEED = 42
METHODS = ("sDPO", "DPO")

Row = dict[str, Any]


class Trained(NamedTuple):
    """A finished run."""

    config: RunConfig
    manifest: Row


def main(arguments: list[str] | None = None) -> int:
    """Make what is needed, train all runs, and judge their models."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prepare", action="store_true", help="only make the model and the data of the example")
    parser.add_argument("--seeds", type=int, nargs="+", default=[EXAMPLES_SEED])
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)

    start = model_folder("smollm2", real.RUNS)
    write_slices(FOLDER / "data", AutoTokenizer.from_pretrained(start))
    if options.prepare:
        return 0

    found = measure.report("smollm2", arguments, torch.get_num_threads(), torch.device("cpu"))
    found["versions"]["peft"] = metadata.version("peft")
    runs = {(method, seed): train(method, seed) for seed in options.seeds for method in METHODS}
    trained = {method: [runs[method, seed] for seed in options.seeds] for method in METHODS}
    found |= about(trained) | {"seeds": options.seeds, "results": judge(trained)}
    measure.write_json(options.json, found)
    print(measure.heading(found), table(found), sep="\n\n")
    return 0


def overrides(method: str, seed: int) -> list[str]:
    """What turns the example into another of the runs; DPO has all pairs in one stage."""
    folder = FOLDER / (method.lower() if seed == EXAMPLES_SEED else f"{method.lower()}-{seed}")
    files = ", ".join(str(FOLDER / f"data/{stage}.jsonl") for stage in STAGES)
    stages = [f"stages=[{{name: all, data: [{files}]}}]"] if method == "DPO" else []
    return [f"output_dir={folder}", f"trainer.seed={seed}", *stages]


def train(method: str, seed: int) -> Trained:
    """One run, trained as far as it is not."""
    config = load_config(EXAMPLE, overrides(method, seed))
    folder, first = Path(config.output_dir), Path(load_config(EXAMPLE).output_dir)

    # the initial model is the same in all runs; the driver takes its scores only if they are of these pairs
    if (first / EVAL_FILE).is_file() and not folder.is_dir():
        folder.mkdir(parents=True)
        for name in (EVAL_FILE, SAMPLES_FILE):
            shutil.copy(first / name, folder / name)
    return Trained(config, run(config))


def about(trained: dict[str, list[Trained]]) -> Row:
    """What the runs had in common, and how long their stages took."""
    config, everyone = trained["sDPO"][0].config, [one for runs in trained.values() for one in runs]
    assert config.lora is not None
    settings: Row = {"beta": config.beta, "max_length": config.max_length, "lora.r": config.lora.r}
    return {
        "settings": settings | {key: config.trainer[key] for key in ("learning_rate", "per_device_train_batch_size")},
        "pairs": {stage["name"]: stage["pairs"] for one in everyone for stage in one.manifest["stages"]},
        "kl_pairs": KL_PAIRS * len(heldout_files(FOLDER)),
        "stage_seconds": {
            method: [sum(stage["seconds"] for stage in one.manifest["stages"]) for one in runs]
            for method, runs in trained.items()
        },
    }


def judge(trained: dict[str, list[Trained]]) -> list[Row]:
    """A row for the initial model and for each stage of each method."""
    config = trained["sDPO"][0].config
    counts = [len(file.read_text(encoding="utf-8").splitlines()) for file in heldout_files(FOLDER / "data")]
    initial, states = scores(Path(config.output_dir), sum(counts)), hidden_states(config.model)
    rows = [{"run": "", "stage": "initial model"} | judged(initial[None], initial, counts, config.beta)]

    rights = {}
    for method, runs in trained.items():
        for stage in runs[0].manifest["stages"]:
            places = [Path(one.config.output_dir) / f"stage-{stage['index']}-{stage['name']}" for one in runs]
            logps = torch.stack([scores(place, sum(counts)) for place in places])
            sums = [kl_sums(hidden_states(str(place)), states) for place in places]
            kl = interval(torch.stack([of_pairs for of_pairs, _ in sums]).mean(0), sums[0][1])
            rows.append(
                {"run": method, "stage": stage["name"]} | judged(logps, initial, counts, config.beta) | {"kl": kl}
            )
        rights[method] = ranked_right(logps)

    difference = rights["sDPO"] - rights["DPO"]
    rows[-1]["sdpo_minus_dpo"] = interval(difference.mean(0)) | {"seeds": difference.mean(1).tolist()}
    return rows


def scores(folder: Path, pairs: int) -> Tensor:
    """The log-probs [pairs, 2] of the held-out pairs under the model in `folder`, as the run has left them."""
    logps, reason = read_scores(folder / EVAL_FILE, None, pairs)
    if logps is None:
        raise UserError(f"{folder / EVAL_FILE}: {reason or 'is missing'}")
    return logps.double()


def ranked_right(logps: Tensor) -> Tensor:
    """1 where a pair's chosen answer has the higher of the log-probs [..., 2], else 0."""
    return (logps[..., 0] > logps[..., 1]).double()


def judged(logps: Tensor, initial: Tensor, counts: list[int], beta: float) -> Row:
    """Accuracies and reward margin of log-probs [seeds, pairs, 2]; `counts` are the pairs of each file."""
    right, rewards = ranked_right(logps), beta * (logps - initial)
    margins = rewards[..., 0] - rewards[..., 1]
    of_files = right.mean(0).split(counts)
    return {
        "pairs": sum(counts),
        "pair_accuracy": interval(right.mean(0)) | {"seeds": right.mean(1).tolist()},
        "accuracy_minus_initial": interval(right.mean(0) - ranked_right(initial)),
        "accuracy_of_files": {f.stem: x.mean().item() for f, x in zip(heldout_files(FOLDER), of_files, strict=True)},
        "reward_accuracy": interval((margins > 0).double().mean(0)),
        "reward_margin": interval(margins.mean(0)),
    }


def hidden_states(model: str) -> real.Real:
    """What the head of the model in a folder takes for some held-out pairs of each file."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    return real.extract(loaded, tokenizer, heldout_files(FOLDER / "data"), KL_PAIRS, LONGEST)


def kl_sums(model: real.Real, initial: real.Real) -> tuple[Tensor, Tensor]:
    """The KL from the initial model summed over both answers of each pair, and their tokens; [P] each."""
    tokens = []
    for states, before in zip(model.hidden.split(256), initial.hidden.split(256), strict=True):
        ours, theirs = ((h @ head.T).log_softmax(-1) for h, head in ((states, model.head), (before, initial.head)))
        tokens.append((ours.exp() * (ours - theirs)).sum(-1, dtype=torch.float64))

    answers = torch.stack([part.sum() for part in torch.cat(tokens).split(model.lengths.tolist())])
    return answers.view(2, -1).sum(0), model.lengths.view(2, -1).sum(0).double()


def interval(values: Tensor, weights: Tensor | None = None) -> Row:
    """Mean of `values` [P] (or their sum over the sum of `weights`), and its 95 % bootstrap interval over the pairs."""
    weights = torch.ones_like(values) if weights is None else weights
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[drawn].sum(1) / weights[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return {"mean": (values.sum() / weights.sum()).item(), "low": low, "high": high}


def table(found: Row) -> str:
    """The results in plain text."""
    lines = []
    for row in found["results"]:
        cells = [span(row.get(key), digits) for key, digits in (("pair_accuracy", 3), ("reward_margin", 3), ("kl", 4))]
        lines.append([" ".join([row["run"], row["stage"]]).strip(), *cells])
    return measure.table(["model", "pair accuracy", "reward margin", "KL (nat a token)"], lines)


def span(value: Row | None, digits: int) -> str:
    """mean (low … high)."""
    if value is None:
        return "–"
    mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} … {high})"


if __name__ == "__main__":
    raise SystemExit(main())
