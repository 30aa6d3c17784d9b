"""What the adapter serves besides plain DPO, in ms-swift's own pipeline: every logged number against stock's.

Run at the end of `benchmarks.trainers.swift --way adapter`; a mode that differs, or makes logits, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import torch
from peft import LoraConfig, get_peft_model
from swift.arguments import RLHFArguments
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.trainers import swift as run
from benchmarks.trainers.problem import read_pairs
from sdpo_kernels.integrations import swift as adapter

STEPS, PAIRS_A_STEP = 3, 4
LARGEST_DEVIATION = 1e-4  # relative to 1 or the value, of every logged number; measured: at most a few 1e-5
OTHER_MEANS = ("logits/chosen", "logits/rejected")  # of CPO, SimPO and ORPO: over scored tokens instead of all
NOT_COMPARED = ("epoch", "runtime", "per_second", "speed", "memory", "global_step")
LORA = {"tuner_type": "lora", "lora_rank": 4, "learning_rate": 1e-2}
FLASH = {"padding_free": "true"}


def modes(problem: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `swift rlhf`."""
    pairs, answers = run.write_pairs(problem, folder), write_answers(problem, folder)
    full = {"tuner_type": "full", "model": problem / "model", "dataset": pairs, "rlhf_type": "dpo"}
    adapters = write_adapter(problem, folder)
    return {
        "ld_alpha, rpo_alpha": full | {"ld_alpha": 0.5, "rpo_alpha": 0.1},
        "ipo and sft": full | {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]},
        "accumulation, checkpointing": full | {"gradient_accumulation_steps": 2, "gradient_checkpointing": "true"},
        "left padding": full | {"padding_side": "left"},
        "padding_free": full | FLASH,
        "packing": full | FLASH | {"packing": "true", "packing_length": 512, "per_device_train_batch_size": 1},
        "LoRA": full | LORA,
        "LoRA with lm_head": full | LORA | {"target_modules": ["q_proj", "lm_head"]},
        "LoRA with ref_adapters": full | LORA | {"adapters": adapters, "ref_adapters": adapters},
        "router loss": full | write_experts(problem, folder) | {"router_aux_loss_coef": 0.1},
        "evaluation": full | {"split_dataset_ratio": 0.1, "eval_strategy": "steps", "eval_steps": 2},
        "kto": full | {"rlhf_type": "kto", "dataset": answers},
        "kto, padding_free": full | FLASH | {"rlhf_type": "kto", "dataset": answers},
        "kto, LoRA": full | LORA | {"rlhf_type": "kto", "dataset": answers},
        "cpo": full | {"rlhf_type": "cpo"},
        "simpo": full | {"rlhf_type": "simpo", "cpo_alpha": 0.0},
        "orpo": full | {"rlhf_type": "orpo"},
    }


def check_modes(problem: Path, folder: Path) -> None:
    """Train every mode stock and adapted; AssertionError if one of them differs."""
    for name, arguments in modes(problem, folder).items():
        common = {"max_steps": STEPS, "per_device_train_batch_size": PAIRS_A_STEP, "output_dir": folder / "modes"}
        stock = logged("stock", common | arguments)
        with adapter.patch():
            ours = logged("adapter", common | arguments)
        other = OTHER_MEANS if arguments["rlhf_type"] in ("cpo", "simpo", "orpo") else ()
        worst, key = compare(stock, ours, other)
        print(f"MODE {name}: {len(stock)} logs of {len(stock[0])} numbers differ by at most {worst:.1e} ({key})")
        if worst > LARGEST_DEVIATION:
            raise AssertionError(f"{name}: {key} differs from the stock trainer's by {worst:.2g}")


def logged(way: str, arguments: dict[str, Any]) -> list[dict[str, float]]:
    """The numbers that the trainer logs; its loss without rounding."""
    trainers: list[Any] = []
    padding_free = replaced.object(RLHFArguments, "_check_padding_free", allow_without_flash_attention)
    with run.counted_heads() as calls, padding_free:
        run.train(arguments, trainers.append, call)
    run.check_calls(way, calls)
    return [log for log in trainers[0].state.log_history if "train_runtime" not in log]


def call(train: Callable[[], Any]) -> None:
    """Just train."""
    train()


def allow_without_flash_attention(self: Any) -> None:
    """Packed rows need flash attention, says ms-swift; transformers' own masks keep sequences apart, too."""
    self.padding_free = self.padding_free or self.packing


def compare(stock: list[dict[str, Any]], ours: list[dict[str, Any]], other: tuple[str, ...]) -> tuple[float, str]:
    """The largest difference of two logs, and whose it is."""
    if [log.keys() for log in stock] != [log.keys() for log in ours]:
        raise AssertionError(f"logged {[*map(list, ours)]}, must be {[*map(list, stock)]}")
    return max(
        (abs(log[key] - mine[key]) / max(1.0, abs(log[key])), key)
        for log, mine in zip(stock, ours, strict=True)
        for key in log
        if isinstance(log[key], (int, float)) and not any(word in key for word in (*NOT_COMPARED, *other))
    )


def write_answers(problem: Path, folder: Path) -> Path:
    """KTO's rows: a chosen answer, a rejected one, and so on."""
    path = folder / "answers.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in read_pairs(problem):
            for key in ("chosen", "rejected"):
                texts = [("user", row["prompt"]), ("assistant", row[key])]
                messages = [{"role": role, "content": text} for role, text in texts]
                file.write(json.dumps({"messages": messages, "label": key == "chosen"}) + "\n")
    return path


def write_adapter(problem: Path, folder: Path) -> Path:
    """A LoRA adapter to start from, which changes the model's log-probs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(problem / "model")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def write_experts(problem: Path, folder: Path) -> dict[str, Any]:
    """A small mixture of experts with the problem's tokenizer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=50257, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=1024, pad_token_id=50256, bos_token_id=50256, eos_token_id=50256,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "experts")
    AutoTokenizer.from_pretrained(problem / "model").save_pretrained(folder / "experts")
    return {"model": folder / "experts", "model_type": "qwen3_moe"}
