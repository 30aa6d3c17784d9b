"""Memory by model size: the planner of `sdpo check` over known models and ways to train.

    python -m benchmarks.memory_sizes          # plan; benchmarks/results/memory-sizes.json and docs/memory_by_size.md
    python -m benchmarks.memory_sizes --page   # the page alone, from that file

The architectures are written down here, so that no model is needed. Nothing is measured, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import measure
from benchmarks.memory_plans import GIB, LLAMA_8B, LLAMA_70B
from benchmarks.page import markdown

RESULTS = measure.ROOT / "benchmarks/results/memory-sizes.json"
PAGE = measure.ROOT / "docs/memory_by_size.md"
GPUS = (8, 12, 16, 24, 40, 48, 80, 141)  # GiB that GPUs have; 1 GiB of it is CUDA's and gaps


def qwen(hidden: int, intermediate: int, layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    """A Qwen2.5."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": 152064, "model_type": "qwen2"}
    return sizes | more


def llama(sizes: dict[str, int], **more: Any) -> dict[str, Any]:
    """A Llama 3."""
    return sizes | {"num_key_value_heads": 8, "vocab_size": 128256, "model_type": "llama"} | more


TIED = {"vocab_size": 151936, "tie_word_embeddings": True}
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2 135M": llama(SMALL, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "Qwen2.5 0.5B": qwen(896, 4864, 24, 14, 2, **TIED),
    "Qwen2.5 1.5B": qwen(1536, 8960, 28, 12, 2, **TIED),
    "Qwen2.5 3B": qwen(2048, 11008, 36, 16, 2, **TIED),
    "Qwen2.5 7B": qwen(3584, 18944, 28, 28, 4),
    "Llama 3 8B": llama(LLAMA_8B),
    "Qwen2.5 14B": qwen(5120, 13824, 48, 40, 8),
    "Qwen2.5 32B": qwen(5120, 27648, 64, 40, 8),
    "Llama 3 70B": llama(LLAMA_70B),
}


def ways() -> dict[str, Any]:
    """The ways to train, by the heading of their column."""
    from sdpo_kernels.stepwise.memory.setup import Setup
    from sdpo_kernels.stepwise.settings.lora import LoraSettings

    full = Setup(compute=torch.bfloat16, checkpointing=True, pairs=1)
    adapter = replace(full, lora=LoraSettings(), dtype=torch.bfloat16)
    return {
        "all weights": full,
        "LoRA": adapter,
        "QLoRA": replace(adapter, quantization={"bits": 4, "double": True}),
        "all weights, 8 GPUs": replace(full, gpus=8, sharded=True),
        "LoRA, 8 GPUs": replace(adapter, gpus=8, sharded=True),
    }


def planned(model: str, way: str) -> dict[str, int]:
    """Weights of the model, and bytes that each GPU needs."""
    from transformers import AutoConfig

    from sdpo_kernels.stepwise.memory.batch import Lengths
    from sdpo_kernels.stepwise.memory.of_run import Task
    from sdpo_kernels.stepwise.memory.sizes import Measured

    sizes = dict(MODELS[model])
    config = AutoConfig.for_model(sizes.pop("model_type"), max_position_embeddings=8192, **sizes)
    lengths = Lengths(*(np.full(8, count) for count in (1023, 1023, 300, 2 * 724)))
    plan = Task(Measured(config), lengths, packed=True, shared=True).plan(ways()[way])
    return {"weights": plan.sizes.numbers, "bytes": plan.total}


def smallest(needed: int) -> str:
    """GiB that are needed, and the smallest GPU that has them."""
    fits = next((size for size in GPUS if needed + GIB <= size * GIB), None)
    return f"{needed / GIB:.1f} ({fits})" if fits else f"{needed / GIB:.1f} (–)"


def page(report: dict[str, Any]) -> str:
    """The page, from a report."""
    lines = []
    for result in report["results"]:
        weights = max(way["weights"] for name, way in result["ways"].items() if "LoRA" not in name)
        cells = [smallest(way["bytes"]) for way in result["ways"].values()]
        lines.append([result["model"], f"{weights / 1e9:.2f}", *cells])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""<!-- made by python -m benchmarks.memory_sizes; do not edit -->

# Memory by model size

GiB that each GPU needs, and in brackets the smallest GPU that has them (of {", ".join(map(str, GPUS))} GiB, 1 GiB of it
for CUDA and gaps); – where none has. Planned, not measured: [memory](memory.md) says what is counted, and how far plans
of small models are from measured peaks.

{markdown(["model", "billion weights", *report["results"][0]["ways"]], lines)}

- A step of one pair, 1,024 tokens a sequence, a prompt of 300 tokens that goes through the model once; references are
  scored eight pairs at a time. `bf16: true`, `gradient_checkpointing: true`, AdamW.
- **All weights**: float32 weights, gradients and optimizer states: 16 bytes a weight, before anything else.
- **LoRA**: `lora: {{r: 16}}` on a `dtype: bfloat16` base. **QLoRA**: `quantization: {{bits: 4}}`, too.
- **8 GPUs**: FSDP2 (`fsdp: true`), which divides weights, gradients and states.

For your model, your pairs and your GPUs, with what to change if they do not fit:

    sdpo check run.yaml --gpus 8 --memory 80GiB

`python -m benchmarks.memory_sizes`: {versions}; commit {report["commit"]}; {report["date"][:10]}.
"""


def main(arguments: list[str] | None = None) -> int:
    """Plan everything, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_sizes", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the page from the result, and plan nothing")
    options = parser.parse_args(arguments)

    if not options.page:
        report = measure.report("memory_sizes", arguments, 1, torch.device("cpu"))
        found = [{"model": name, "ways": {way: planned(name, way) for way in ways()}} for name in options.models]
        measure.write_json(options.json, report | {"results": found})
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
