"""LLaMA-Factory's own `run_exp` on the problem: its data pipeline, collator, trainers and reference model.

    python -m benchmarks.trainers llamafactory

After the timed run the adapter's way also checks CASES, three steps each, whose losses and logged figures must be
stock's, and its command in two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.trainers.problem import PAIRS_A_STEP, read_pairs
from benchmarks.trainers.recorder import Recorder, parse_options

LORA = {"finetuning_type": "lora", "lora_dropout": 0.1}  # the trainers switch dropout off
EXPERTS = "mixture of experts"
HEAD = LORA | {"lora_target": "q_proj,v_proj,lm_head"}
CASES: dict[str, dict[str, Any]] = {
    "hinge": {"pref_loss": "hinge"},
    "ipo": {"pref_loss": "ipo"},
    "kto_pair": {"pref_loss": "kto_pair"},
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo"},
    "ftx and bco": {"pref_ftx": 0.5, "pref_bco_weight": 0.5},
    "ld_alpha": {"ld_alpha": 0.3},
    "lora": LORA | {"lora_target": "all"},
    "lora on lm_head": HEAD,
    "lora on lm_head, ld_alpha": HEAD | {"ld_alpha": 0.3},
    "lm_head in modules_to_save": LORA | {"additional_target": "lm_head"},
    "kto": {"stage": "kto", "dataset": "answers", "pref_ftx": 0.5},
    "kto, lora on lm_head": HEAD | {"stage": "kto", "dataset": "answers"},
    "evaluation": {"val_size": 4, "do_eval": True},
    EXPERTS: {"moe_aux_loss_coef": 0.5},
}
SMALL = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "cutoff_len": 64, "max_steps": 3}
SMALL |= {"optim": "sgd", "learning_rate": 0.1}  # Adam enlarges the rounding of gradients close to 0
LARGEST_DEVIATION = 1e-5  # of the loss, relative where it is above 1
LARGEST_OF_FIGURES = 5e-5  # rewards and KL are differences of sums of 300 nats, of which float32 keeps 3e-5
OTHER = re.compile("logits/|runtime|per_second")  # figures that may differ


def main() -> None:
    """Train one way, and write what `benchmarks.trainers` reads."""
    options = parse_options(("stock", "adapter"))
    options.output.mkdir(parents=True, exist_ok=True)
    write_data(options.problem, options.output)

    adapted = options.way == "adapter"
    recorder = Recorder()
    _, replaced = train(options, recorder, adapted, max_steps=options.steps)
    if adapted:
        for case in CASES:
            check(case, options)
        check_command(options, recorder.losses)
    recorder.write(options, ["llamafactory", "transformers", "trl"], replaced)


def write_data(problem: Path, output: Path) -> None:
    """The pairs, and their answers one by one, with LLaMA-Factory's dataset_info.json."""
    pairs = read_pairs(problem)
    answers = [
        {"prompt": pair["prompt"], "answer": pair[name], "good": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    info: dict[str, Any] = {}
    for name, rows in {"pairs": pairs, "answers": answers}.items():
        (output / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
        info[name] = {"file_name": f"{name}.json"}
    info["pairs"] |= {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}
    info["answers"]["columns"] = {"prompt": "prompt", "response": "answer", "kto_tag": "good"}
    (output / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def write_experts(problem: Path, folder: Path) -> str:
    """A small Mixtral with the problem's tokenizer; returns its folder."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(problem / "model")
    config = MixtralConfig(
        vocab_size=50257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=tokenizer.pad_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a run.yaml would contain; everything not named is LLaMA-Factory's default."""
    problem, output = options.problem, options.output
    return {
        "model_name_or_path": str(problem / "model"),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "pairs",
        "dataset_dir": str(output),
        "template": "default",
        "cache_dir": str(output / "cache"),
        "output_dir": str(output / "trained"),
        "per_device_train_batch_size": PAIRS_A_STEP,
        "max_steps": 2,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_shuffling": True,
        "seed": 0,
    }


def train(
    options: argparse.Namespace, recorder: Recorder, adapted: bool, **changes: Any
) -> tuple[list[dict[str, float]], list[str]]:
    """Train with our adapter or without; returns the trainer's log, and what was replaced.

    RuntimeError if the head of policy or reference was called with the adapter, or was not without it.
    """
    from llamafactory.train.tuner import run_exp
    from transformers import Trainer

    from sdpo_kernels.integrations import llamafactory as fused

    own_train = Trainer.train
    trainers, results, calls = [], [], []

    def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        trainers.append(trainer)
        for model in filter(None, (trainer.model, trainer.ref_model)):
            model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
        recorder.watch(trainer)
        recorder.run(lambda: results.append(own_train(trainer, *args, **kwargs)))
        return results[0]

    shutil.rmtree(options.output / "trained", ignore_errors=True)
    replaced = fused.patch().names if adapted else []
    Trainer.train = watched
    try:
        run_exp(settings(options) | changes)
    finally:
        Trainer.train = own_train
        fused.unpatch()

    shutil.rmtree(options.output / "trained", ignore_errors=True)
    if bool(calls) == adapted:
        way = "adapter" if adapted else "stock"
        raise RuntimeError(f"{changes}: the head was called {len(calls)} times by the {way} way")
    return trainers[0].state.log_history, replaced


def check(case: str, options: argparse.Namespace) -> None:
    """RuntimeError if a loss, a gradient norm or another logged figure is not stock's, except the logits' own."""
    recorders, changes = (Recorder(), Recorder()), SMALL | CASES[case]
    if case == EXPERTS:
        changes["model_name_or_path"] = write_experts(options.problem, options.output / "experts")
    stock, ours = (train(options, recorder, adapted == 1, **changes)[0] for adapted, recorder in enumerate(recorders))
    for theirs, mine in zip(stock, ours, strict=True):
        if theirs.keys() != mine.keys():
            raise RuntimeError(f"{case}: logged {sorted(mine)}, must log {sorted(theirs)}")

    losses = [("loss", a, b) for a, b in zip(recorders[0].losses, recorders[1].losses, strict=True)]
    figures = [(n, a[n], b[n]) for a, b in zip(stock, ours, strict=True) for n in a if not OTHER.search(n)]
    for pairs, largest in ((losses, LARGEST_DEVIATION), (figures, LARGEST_OF_FIGURES)):
        deviation, name = max((abs(a - b) / max(1.0, abs(a)), name) for name, a, b in pairs)
        print(f"{case}: {len(pairs)} figures, the largest deviation {deviation:.1e} ({name})", flush=True)
        if not deviation < largest:
            raise RuntimeError(f"{case}: {name} differs by {deviation:.1e}, must be below {largest:.0e}")


def check_command(options: argparse.Namespace, losses: list[float]) -> None:
    """Two steps by the adapter's command, which starts two processes by torchrun: the losses of one process."""
    run_file = options.output / "run.yaml"
    half = {"per_device_train_batch_size": PAIRS_A_STEP // 2, "max_steps": 2}
    run_file.write_text(json.dumps(settings(options) | half), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "sdpo_kernels.integrations.llamafactory", "train", str(run_file)],
        env=os.environ | {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    done.check_returncode()

    # the command's own process, and those of torchrun
    patched = done.stdout.count("scores tokens without logits")
    state = json.loads((options.output / "trained/trainer_state.json").read_text(encoding="utf-8"))
    found = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    deviation = max(abs(a - b) for a, b in zip(found, losses[:2], strict=True))
    print(f"the command: the largest deviation {deviation:.1e} (loss)", flush=True)
    if patched != 3 or "keeps its own way" in done.stdout or not deviation < LARGEST_DEVIATION:
        raise RuntimeError(f"the command: {patched} processes patched, must be 3; losses {found}, must be {losses[:2]}")


if __name__ == "__main__":
    main()
