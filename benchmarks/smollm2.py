"""DPO and stepwise DPO on a real chat model: `python -m benchmarks.smollm2 [--json results.json]`; an hour on one core.

SmolLM2-135M-Instruct with LoRA (examples/smollm2.yaml), on short pairs of the full pack. sDPO trains on them in three
stages, DPO in one; each pair is seen once. Every model is judged on the same held-out pairs:

    pair accuracy     share of pairs whose chosen answer has the higher log-prob
    reward margin     β times what training has added to log π(chosen) − log π(rejected)
    KL                Σ_v π(v) · log(π(v) / π₀(v)), π₀ the initial model: mean over the answers' tokens, nat a token

Intervals are 95 % of 2,000 bootstrap samples of the pairs: they say what other held-out pairs would change, not what
another seed of training would. Runs and data are in runs/smollm2: what is finished is not repeated, what was stopped
resumes. `--prepare` only makes the model and the data.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import measure, real
from benchmarks.real_models import model_folder
from benchmarks.smollm2_data import LONGEST, STAGES, heldout_files, write_slices
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.references.cache import read_scores
from sdpo_kernels.stepwise.references.evaluation import EVAL_FILE
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

EXAMPLE = measure.ROOT / "examples/smollm2.yaml"
FOLDER = measure.ROOT / "runs/smollm2"
KL_PAIRS = 6  # of each held-out file: every logit of these is computed
SAMPLES = 2000

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Make what is needed, train both, and judge all models."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prepare", action="store_true", help="only make the model and the data of the example")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)

    start = model_folder("smollm2", real.RUNS)
    write_slices(FOLDER / "data", AutoTokenizer.from_pretrained(start))
    if options.prepare:
        return 0

    found = measure.report("smollm2", arguments, torch.get_num_threads(), torch.device("cpu"))
    found["versions"]["peft"] = metadata.version("peft")
    configs = {"sDPO": load_config(EXAMPLE), "DPO": load_config(EXAMPLE, in_one_stage())}
    manifests = {name: run(config) for name, config in configs.items()}
    found |= about(configs["sDPO"], manifests) | {"results": judge(configs, manifests)}
    measure.write_json(options.json, found)
    print(measure.heading(found), table(found), sep="\n\n")
    return 0


def in_one_stage() -> list[str]:
    """What turns the example into DPO: all pairs in one stage."""
    files = ", ".join(str(FOLDER / f"data/{stage}.jsonl") for stage in STAGES)
    return [f"output_dir={FOLDER / 'dpo'}", f"stages=[{{name: all, data: [{files}]}}]"]


def about(config: RunConfig, manifests: dict[str, Row]) -> Row:
    """What the runs had in common, and how long each took."""
    assert config.lora is not None
    trainer = {key: config.trainer[key] for key in ("learning_rate", "per_device_train_batch_size", "seed")}
    seconds = {name: sum(stage["seconds"] for stage in found["stages"]) for name, found in manifests.items()}
    return {
        "settings": {"beta": config.beta, "max_length": config.max_length, "lora.r": config.lora.r} | trainer,
        "pairs": {stage["name"]: stage["pairs"] for found in manifests.values() for stage in found["stages"]},
        "stage_seconds": seconds,
        "kl_pairs": KL_PAIRS * len(heldout_files(FOLDER)),
    }


def judge(configs: dict[str, RunConfig], manifests: dict[str, Row]) -> list[Row]:
    """A row for the initial model and for each stage of each run."""
    folder = Path(configs["sDPO"].output_dir)
    counts = [len(file.read_text(encoding="utf-8").splitlines()) for file in heldout_files(FOLDER / "data")]
    initial = scores(folder, sum(counts))
    states = hidden_states(configs["sDPO"].model)

    rows = [{"run": "", "stage": "initial model"} | judged(initial, initial, counts, configs["sDPO"].beta)]
    for name, manifest in manifests.items():
        for stage in manifest["stages"]:
            place = Path(configs[name].output_dir) / f"stage-{stage['index']}-{stage['name']}"
            row = judged(scores(place, sum(counts)), initial, counts, configs[name].beta)
            row["kl"] = interval(*kl_sums(hidden_states(str(place)), states))
            rows.append({"run": name, "stage": stage["name"]} | row)

    last = {row["run"]: row for row in rows}
    both = [torch.tensor(last[name]["right"]).double() for name in ("sDPO", "DPO")]
    last["sDPO"]["accuracy_minus_dpo"] = interval(both[0] - both[1])
    return rows


def scores(folder: Path, pairs: int) -> Tensor:
    """The log-probs [pairs, 2] of the held-out pairs under the model in `folder`, as the run has left them."""
    logps, reason = read_scores(folder / EVAL_FILE, None, pairs)
    if logps is None:
        raise UserError(f"{folder / EVAL_FILE}: {reason or 'is missing'}")
    return logps.double()


def judged(logps: Tensor, initial: Tensor, counts: list[int], beta: float) -> Row:
    """Pair accuracy, over all held-out pairs and those of each file, reward accuracy and margin, and change."""
    right = (logps[:, 0] > logps[:, 1]).double()
    rewards = beta * (logps - initial)
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "right": right.int().tolist(),
        "pair_accuracy": interval(right),
        "accuracy_minus_initial": interval(right - (initial[:, 0] > initial[:, 1]).double()),
        "pair_accuracy_of_files": {
            file.stem: part.mean().item() for file, part in zip(heldout_files(Path()), right.split(counts), strict=True)
        },
        "reward_accuracy": interval((margins > 0).double()),
        "reward_margin": interval(margins),
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
    drawn = torch.randint(len(values), (SAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
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
