"""The field `deepspeed` of `trainer`: DeepSpeed's own config, completed from the other fields of `trainer`."""

from __future__ import annotations

from importlib.util import find_spec
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
    # without it accelerate's message names neither the setting nor what to install
    if find_spec("deepspeed") is None:
        raise ValueError("deepspeed: the package is not installed; run: pip install deepspeed")
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    read = HfDeepSpeedConfig(given)  # as transformers will read it
    if read.is_true("torch_autocast.enabled"):
        raise ValueError("deepspeed: torch_autocast: was enabled, must be left out; use trainer: {bf16: true}")

    tp_size = read.get_value("tensor_parallel.autotp_size", 1)
    if tp_size != 1:
        raise ValueError(
            f"deepspeed: tensor_parallel.autotp_size: was {tp_size}, must be left out; use trainer: {{tp_size: …}} "
            "without deepspeed"
        )

    buffers = read.get_value("data_types.buffer_dtype")
    if buffers is not None:
        raise ValueError(
            f"deepspeed: data_types.buffer_dtype: was {buffers!r}, must be left out; references are scored with "
            "buffers as they were loaded"
        )
    return _FROM_TRAINER | read.config


def require_match(args: TrainingArguments) -> None:
    """ValueError if the config and `trainer` set something differently; Trainer would find out when it trains."""
    found = getattr(getattr(args, "hf_deepspeed_config", None), "mismatches", [])
    if found:
        # "- ds bf16.enabled=True vs hf bf16|bf16_full_eval=False"
        key, _, field = found[0].removeprefix("- ds ").partition(" vs hf ")
        raise ValueError(
            f'deepspeed: {key} differs from trainer ({field}); write "auto" there, the value under trainer'
        )
