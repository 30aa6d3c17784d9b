"""ms-swift's own DPO run (`swift rlhf --rlhf_type dpo`), stock and with our adapter: its pipeline, data and trainer.

    python -m benchmarks.trainers.swift --way adapter …     # in its environment: see benchmarks.trainers

The adapter is switched on as users do it, by `--external_plugins`. The adapter's way also trains the other modes that
it serves for a few steps each (`swift_modes`), and fails if one of them differs from the stock trainer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swift.pipelines.train.rlhf import SwiftRLHF

from benchmarks.trainers.problem import PAIRS_A_STEP, read_pairs
from benchmarks.trainers.recorder import Recorder, parse_options
from sdpo_kernels.integrations import swift as adapter

PLUGIN = "from sdpo_kernels.integrations.swift import patch\n\npatch()\n"
REPLACED = ("RLHFTrainerMixin.__init__", "RLHFTrainerMixin.get_per_token_logps", "DPOTrainer.concatenated_forward")
FIXED = {
    "model_type": "llama", "template": "default", "torch_dtype": "float32", "attn_impl": "sdpa", "check_model": "false",
    "split_dataset_ratio": 0, "dataset_shuffle": "false", "train_dataloader_shuffle": "false",
    "load_from_cache_file": "false", "dataloader_num_workers": 0, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "false", "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_ratio": 0,
    "save_strategy": "no", "report_to": "none", "logging_steps": 1, "add_version": "false", "seed": 42,
}  # fmt: skip


def main() -> None:
    """Train as the options say and write the answer."""
    options = parse_options(("stock", "adapter"))
    options.output.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "rlhf_type": "dpo", "tuner_type": "full", "model": options.problem / "model", "output_dir": options.output,
        "dataset": write_pairs(options.problem, options.output), "max_steps": options.steps,
        "per_device_train_batch_size": PAIRS_A_STEP,
    }  # fmt: skip
    if options.way == "adapter":
        arguments["external_plugins"] = plugin = options.output / "fused_head.py"
        plugin.write_text(PLUGIN, encoding="utf-8")

    recorder = Recorder()
    with counted_heads() as calls:
        train(arguments, recorder.watch, recorder.run)
    check_calls(options.way, calls)
    recorder.write(options, ["ms-swift", "transformers", "trl"], REPLACED if options.way == "adapter" else ())

    if options.way == "adapter":
        from benchmarks.trainers.swift_modes import check_modes

        adapter.unpatch()
        check_modes(options.problem, options.output)


def train(arguments: dict[str, Any], watch: Callable[[Any], Any], run: Callable[[Callable[[], Any]], Any]) -> None:
    """`swift rlhf` with `arguments`; `watch` gets its trainer, `run` its training."""

    class Watched(SwiftRLHF):
        def train(self, trainer: Any) -> Any:
            watch(trainer)
            run(lambda: super(Watched, self).train(trainer))

    def words(value: Any) -> list[str]:
        return [str(each) for each in (value if isinstance(value, (list, tuple)) else [value])]

    options = {name: value for name, value in (FIXED | arguments).items() if value is not None}
    Watched([word for name, value in options.items() for word in (f"--{name}", *words(value))]).main()


@contextmanager
def counted_heads() -> Iterator[list[Any]]:
    """Every call of a module that makes logits of GPT-2's vocabulary, of any model."""
    from torch.nn import Module, modules

    calls: list[Any] = []

    def count(module: Module, _inputs: Any, output: Any) -> None:
        if getattr(output, "shape", [0])[-1:] == (50257,):
            calls.append(type(module).__name__)

    hook = modules.module.register_module_forward_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


def check_calls(way: str, calls: Sequence[Any]) -> None:
    """Stock makes logits, the adapter never."""
    if bool(calls) != (way == "stock"):
        raise AssertionError(f"{way}: made logits {len(calls)} times")


def write_pairs(problem: Path, folder: Path) -> Path:
    """The problem's pairs as ms-swift's documentation has them."""
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in read_pairs(problem):
            asked = {"role": "user", "content": row["prompt"]}
            answered = {"role": "assistant", "content": row["chosen"]}
            file.write(json.dumps({"messages": [asked, answered], "rejected_response": row["rejected"]}) + "\n")
    return path


if __name__ == "__main__":
    main()
