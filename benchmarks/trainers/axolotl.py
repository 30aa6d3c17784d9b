"""axolotl's own command on a YAML, stock, with TRL's chunked head, and with our plugin.

Every way runs `axolotl.cli.train.do_cli`, which is `axolotl train FILE --launcher python`: axolotl's data pipeline, its
reference model, its DPO trainer. `RecorderPlugin` is the only thing added to the YAML; it also counts the calls of
lm_head, of which only the stock trainer may have any. "chunked" is `dpo_use_liger_kernel: true`, with Liger's layers
switched off, because they need a GPU. After the adapter's run, KTO, LoRA and ld_alpha are run for VARIANT_STEPS steps
with and without the plugin, in a process of their own, and must have the same losses.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.train import do_cli
from axolotl.integrations.base import BasePlugin

from benchmarks.trainers.problem import PAIRS_A_STEP, read_pairs
from benchmarks.trainers.recorder import Recorder, parse_options
from sdpo_kernels.integrations.trl import LIGER_LAYERS_OFF, FusedHeadWithEntropy

WAYS = {
    "stock": {},
    "chunked": {"dpo_use_liger_kernel": True},
    "adapter": {"plugins": ["sdpo_kernels.integrations.axolotl.FusedHeadPlugin"]},
}
VARIANTS = {
    "kto": {"rl": "kto", "micro_batch_size": 2 * PAIRS_A_STEP, "remove_unused_columns": False},
    "lora": {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"]},
    "ld_alpha": {"dpo_ld_alpha": 0.5},
}
VARIANT_STEPS, LARGEST_DEVIATION = 3, 1e-5


class RecorderPlugin(BasePlugin):
    """Records the trainer that axolotl makes, and how often its models compute logits."""

    recorder = Recorder()
    logits = 0  # calls of an lm_head
    fused = False  # whether TRL's class was ours during training

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Liger's layers need a GPU."""
        return {"liger_kernel_config": LIGER_LAYERS_OFF} if cfg.dpo_use_liger_kernel else {}

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Watch its steps, its models' heads, and its call of train()."""
        seen, train = type(self), trainer.train
        seen.recorder, seen.logits = Recorder(), 0
        seen.recorder.watch(trainer)

        def count(*args: Any) -> None:
            seen.logits += 1

        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                model.get_output_embeddings().register_forward_hook(count)

        def recorded(**arguments: Any) -> None:
            from trl.trainer import utils

            seen.fused = isinstance(utils._ChunkedLogProbFunction, FusedHeadWithEntropy)
            seen.recorder.run(lambda: train(**arguments))

        trainer.train = recorded


def settings(options: argparse.Namespace, steps: int, **more: Any) -> dict[str, Any]:
    """The YAML: DPO in float32 on the CPU, without shuffling."""
    keys = {"rl": "dpo", **more}
    pairs = options.output / "unpaired.jsonl" if keys["rl"] == "kto" else options.problem / "pairs.jsonl"
    fields = {"prompt_format": "{prompt}\n"} | ({"field_completion": "completion"} if keys["rl"] == "kto" else {})
    return {
        "base_model": str(options.problem / "model"),
        "datasets": [{"path": str(pairs), "ds_type": "json", "split": "train", "type": fields}],
        "dataset_prepared_path": str(options.output / "prepared"),
        "output_dir": str(options.output / "run"),
        "sequence_len": 1024,
        "rl_beta": 0.1,
        "micro_batch_size": PAIRS_A_STEP,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "shuffle_merged_datasets": False,
        "dataset_num_proc": 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 42,
    } | keys  # fmt: skip


def train(options: argparse.Namespace, way: str, steps: int, **more: Any) -> list[float]:
    """Run axolotl's command; the losses of every step."""
    keys = settings(options, steps, **copy.deepcopy(WAYS[way]), **more)
    keys["plugins"] = [*keys.get("plugins", ()), f"{RecorderPlugin.__module__}.{RecorderPlugin.__name__}"]
    file = options.output / f"{way}.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    sys.argv = ["axolotl", str(file)]  # do_cli reads it
    do_cli(str(file))

    if RecorderPlugin.fused != (way == "adapter"):
        raise RuntimeError(f"{way}: TRL's class was {'' if RecorderPlugin.fused else 'not '}replaced")
    if (RecorderPlugin.logits > 0) != (way == "stock"):
        raise RuntimeError(f"{way}: lm_head was called {RecorderPlugin.logits} times in {steps} steps")
    return RecorderPlugin.recorder.losses


def check_variants(options: argparse.Namespace) -> None:
    """RuntimeError if the losses of a variant depend on the plugin."""
    rows = [
        {"prompt": pair["prompt"], "completion": pair[answer], "label": answer == "chosen"}
        for pair in read_pairs(options.problem)
        for answer in ("chosen", "rejected")
    ]
    (options.output / "unpaired.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    # axolotl keeps a plugin once it is loaded, so everything without ours comes first
    losses = {way: {n: train(options, way, VARIANT_STEPS, **more) for n, more in VARIANTS.items()} for way in
              ("stock", "adapter")}  # fmt: skip
    for name in VARIANTS:
        off = max(abs(a - b) for a, b in zip(*(losses[way][name] for way in losses), strict=True))
        print(f"{name}: the losses of {VARIANT_STEPS} steps differ by {off:.1e}", flush=True)
        if not off <= LARGEST_DEVIATION:
            raise RuntimeError(f"{name}: the losses differ by {off:.2g}")


def main() -> None:
    """Run one way."""
    options = parse_options((*WAYS, "variants"))
    options.output = Path(options.output).absolute()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.way == "variants":
        check_variants(options)
        return

    train(options, options.way, options.steps)
    replaced = ["trl.trainer.utils._ChunkedLogProbFunction"] if options.way == "adapter" else []
    RecorderPlugin.recorder.write(options, ["axolotl", "trl", "transformers"], replaced)
    if options.way == "adapter":
        again = ("--problem", options.problem, "--output", options.output, "--answer", options.answer)
        command = [sys.executable, "-m", "benchmarks.trainers.axolotl", "--way", "variants", *map(str, again)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    from benchmarks.trainers.axolotl import main  # the module that axolotl imports the plugin from

    main()
