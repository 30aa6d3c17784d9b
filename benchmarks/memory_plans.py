"""Memory plans of large runs, as `sdpo check --gpus` prints them: `python -m benchmarks.memory --plans`.

The architectures are written down here, so that no model is needed. Pairs have a prompt of 300 tokens and sequences of
1,024 tokens; the prompt goes through the model once for both answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

GIB = 2**30
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


def large_runs() -> dict[str, tuple[dict[str, Any], Any]]:
    """Architecture and setup of each run, by what it is."""
    from sdpo_kernels.stepwise.memory.setup import Setup
    from sdpo_kernels.stepwise.settings.lora import LoraSettings

    sharded = Setup(compute=torch.bfloat16, checkpointing=True, pairs=1, gpus=8, sharded=True, memory=80 * GIB)
    adapter = replace(sharded, lora=LoraSettings(), dtype=torch.bfloat16)
    packed = replace(adapter, gpus=1, sharded=False, quantization={"bits": 4, "double": True}, memory=24 * GIB)
    return {
        "Llama 3 70B, all weights, FSDP2 on 8 GPUs of 80 GiB": (LLAMA_70B, sharded),
        "Llama 3 70B, all weights, FSDP2 on 32 GPUs of 80 GiB": (LLAMA_70B, replace(sharded, gpus=32)),
        "Llama 3 70B, LoRA on a bfloat16 base, FSDP2 on 8 GPUs of 80 GiB": (LLAMA_70B, adapter),
        "Llama 3 8B, QLoRA on one GPU of 24 GiB": (LLAMA_8B, packed),
    }


def printed(architecture: dict[str, Any], setup: Any) -> str:
    """The plan of a run."""
    from transformers import LlamaConfig

    from sdpo_kernels.stepwise.memory.batch import Lengths
    from sdpo_kernels.stepwise.memory.of_run import PlannedRun, Task
    from sdpo_kernels.stepwise.memory.sizes import Measured
    from sdpo_kernels.stepwise.memory.table import plan_lines
    from sdpo_kernels.stepwise.memory.target import Target

    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, **architecture)
    lengths = Lengths(*(np.full(8, count) for count in (1023, 1023, 300, 2 * 724)))
    task = Task(Measured(config), lengths, packed=True, shared=True)
    found = PlannedRun("s1", task, task.plan(setup))
    return "\n".join(plan_lines(found, Target(setup.gpus, setup.memory), quantises=True))
