"""Checks that the model fits the tokens, from its config alone, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_kernels.integrations.positions import position_limit
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.model_names import load_failure
from sdpo_kernels.stepwise.common.units import counted
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.settings.run_settings import RunConfig


def load_model_config(config: RunConfig) -> Any:
    """The config in the folder of the run's model. Raises UserError if it cannot be loaded."""
    folder = Path(config.model)
    if (folder / "adapter").is_dir() and not (folder / "config.json").exists():
        raise UserError(
            f"model: {config.model} has no full weights, only an adapter for the base of its own run; train that run's "
            "stage with lora.publish: merged, or merge it with PEFT"
        )
    try:
        return AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: {load_failure(config.model, 'config', error)}") from error


def check_fit(config: RunConfig, model_config: Any, parts: Sequence[TokenizedPairs]) -> None:
    """Raises UserError if a token is outside the model's vocabulary, or a sequence longer than its position table."""
    if not parts:
        return

    vocabulary = getattr(model_config.get_text_config(), "vocab_size", None)
    highest = max(int(tokens.ids.max()) for tokens in parts)
    if vocabulary is not None and highest >= vocabulary:
        raise UserError(
            f"model: the tokenizer produces token {highest}, the model's vocabulary ends at {vocabulary - 1}; "
            "tokenizer and model do not match"
        )

    check_positions(config, model_config, max(int(tokens.lengths.max()) for tokens in parts))


def check_vocabulary(ours: Mapping[str, int], theirs: Mapping[str, int], rule: str) -> None:
    """Raises UserError, which ends with `rule`, if another model's tokenizer differs from the run's in a token."""
    odd = sorted(ours.items() ^ theirs.items())
    if odd:
        token = odd[0][0]
        ids = ["absent" if token not in side else f"{side[token]}" for side in (ours, theirs)]
        raise UserError(
            f"its tokenizer differs from the model's in {counted(len({name for name, _ in odd}), 'token')}: {token!r} "
            f"is {ids[0]} in the model's and {ids[1]} in this one; {rule}"
        )


def check_positions(config: RunConfig, model_config: Any, longest: int, what: str = "max_length") -> None:
    """Raises UserError if the model has fewer than `longest` positions.

    `what` names the cause in the message: 'max_length' for pairs, or a stage whose `longest` is its longest prompt plus
    max_new_tokens.
    """
    positions = _position_limit(config, model_config)
    if positions is None or longest <= positions:
        return

    if what == "max_length":
        was = f"max_length: was {config.max_length}, and the longest sequence has {longest} tokens"
    else:
        was = f"{what}: its longest prompt plus max_new_tokens is {longest} tokens"
    raise UserError(f"{was}, must be at most {positions}: the model has no more positions")


def position_warnings(model_config: Any, parts: Sequence[TokenizedPairs]) -> list[str]:
    """A warning if sequences are longer than the positions the model was trained on, by its config.

    Rotary positions are computed, so training runs all the same; that the model scores such sequences well is unlikely.
    """
    stated = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    longer = sum(int((tokens.lengths.max(1) > stated).sum()) for tokens in parts) if isinstance(stated, int) else 0
    if not longer:
        return []
    longest = max(int(tokens.lengths.max()) for tokens in parts)
    return [
        f"model: its config states max_position_embeddings {stated}, and {longer} pairs are longer, up to {longest} "
        "tokens; set max_length, or the model is trained on positions it has not seen"
    ]


def _position_limit(config: RunConfig, model_config: Any) -> int | None:
    """How many positions the language model has; None if there is no limit (rotary, ALiBi)."""
    # on the meta device the modules have no weights, so even a large model is built at once
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    except (ValueError, KeyError, ImportError):
        return None  # loading the model will report what is wrong

    # configs name the number of positions differently, and rotary models set it too; only a table is a hard limit
    return position_limit(model)
