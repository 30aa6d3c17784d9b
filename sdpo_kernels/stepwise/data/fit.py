"""Do model and tokens belong together? Looked at before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.settings.run_settings import RunConfig


def load_model_config(config: RunConfig) -> Any:
    """The config that lies with the run's model; UserError where there is none."""
    try:
        return AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"model: no config can be loaded from {config.model}: {first}") from error


def check_fit(config: RunConfig, model_config: Any, parts: Sequence[TokenizedPairs]) -> None:
    """UserError where a token is past the model's vocabulary, or a sequence longer than its table of positions."""
    if not parts:
        return
    vocabulary = getattr(model_config.get_text_config(), "vocab_size", None)
    highest = max(int(tokens.ids.max()) for tokens in parts)
    if vocabulary is not None and highest >= vocabulary:
        raise UserError(
            f"model: the tokenizer makes token {highest}, the model's vocabulary ends at {vocabulary - 1}; "
            "they do not belong together"
        )
    check_positions(config, model_config, max(int(tokens.lengths.max()) for tokens in parts))


def check_positions(config: RunConfig, model_config: Any, longest: int, what: str = "max_length") -> None:
    """UserError where a sequence of `longest` tokens, or a prompt and what is written after it, has no positions."""
    positions = _learned_positions(config, model_config)
    if positions is None or longest <= positions:
        return
    if what == "max_length":
        was = f"max_length: was {config.max_length}, and the longest sequence has {longest} tokens"
    else:
        was = f"{what}: its longest prompt and max_new_tokens make {longest} tokens"
    raise UserError(f"{was}, must be at most {positions}: the model has learned no more positions")


def _learned_positions(config: RunConfig, model_config: Any) -> int | None:
    """How many positions the model has an embedding for; None where positions are computed (rotary, ALiBi)."""
    try:
        with torch.device("meta"):  # modules without weights
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    except (ValueError, KeyError, ImportError):
        return None  # loading it will say what is wrong
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or name.rpartition(".")[2] == "wpe")
    ]
    return min(tables, default=None)
