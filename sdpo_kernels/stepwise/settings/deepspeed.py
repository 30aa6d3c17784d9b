"""The field `deepspeed` of `trainer`: DeepSpeed's own config, completed from the other fields of `trainer`."""

from __future__ import annotations

import copy
from typing import Any

from transformers import TrainingArguments

# what a config that leaves it out gets, so that the fields of `trainer` hold: DeepSpeed's own defaults differ from them
_FROM_TRAINER: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}


def deepspeed_config(given: str | dict[str, Any]) -> dict[str, Any]:
    """The config in the JSON file `given`, or `given` itself, with "auto" for what it leaves out.

    ValueError if it cannot be read, or for something in it that this driver cannot train with.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # reads it as transformers will, and notes it globally, where only the config in use may be
    config = copy.deepcopy(HfDeepSpeedConfig(given).config)
    unset_hf_deepspeed_config()

    if _part(config, "torch_autocast").get("enabled"):
        raise ValueError("deepspeed: torch_autocast: was enabled, must be left out; use trainer: {bf16: true}, which rounds weights")
    if _part(config, "tensor_parallel").get("autotp_size", 1) > 1:
        raise ValueError("deepspeed: tensor_parallel.autotp_size: is not supported; use trainer: {tp_size: …} without deepspeed")
    if _part(config, "data_types").get("buffer_dtype") is not None:
        raise ValueError("deepspeed: data_types.buffer_dtype: must be left out; rounded positions would change the log-probs")
    return _FROM_TRAINER | config


def require_match(args: TrainingArguments) -> None:
    """ValueError if the config sets something to another value than `trainer` does; Trainer finds out when it trains."""
    found = getattr(getattr(args, "hf_deepspeed_config", None), "mismatches", [])
    if found:
        # "- ds bf16.enabled=True vs hf bf16|bf16_full_eval=False"
        key, _, field = found[0].removeprefix("- ds ").partition(" vs hf ")
        raise ValueError(f'deepspeed: {key} differs from trainer ({field}); write "auto" there, and the value under trainer')


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}
