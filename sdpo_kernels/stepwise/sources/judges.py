"""Judges: whatever gives each completion a number, higher being better. One protocol for rewards and annotators.

    def letters(rows, completions):                    # in my_rewards.py; judge: my_rewards:letters
        return [float(text == row["answer"]) for row, text in zip(rows, completions)]

`rows` are the prompt file's own rows. A judge is a function of yours (`judge: module:function`, imported in this
process because you asked for it by name) or a reward model.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from sdpo_kernels.stepwise.errors import UserError
from sdpo_kernels.stepwise.sources.prompts import PromptRow

Judge = Callable[[Sequence[PromptRow], Sequence[str]], list[float]]


def function_judge(name: str) -> Judge:
    """The function behind 'module:function', found as `python -m` would from the current folder; its answers checked.

    Raises:
        UserError: it cannot be imported, or (when it is called) gives anything but one finite number a completion.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"judge: was {name!r}, must be module:function that can be imported: {error}") from error
    if not callable(found):
        raise UserError(f"judge: {name!r} is a {type(found).__name__}, must be a function")

    def judge(rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float]:
        try:
            scores = [float(score) for score in found([row.values for row in rows], list(completions))]
        except (TypeError, ValueError) as error:
            raise UserError(f"judge: {name!r} must give a list of numbers: {error}") from error
        if len(scores) != len(completions) or not all(map(math.isfinite, scores)):
            raise UserError(f"judge: {name!r} gave {len(scores)} scores, must give {len(completions)} finite ones")
        return scores

    return judge


def reward_model_judge(path: str, device: torch.device, max_length: int, batch_size: int) -> Judge:
    """A sequence classifier with one output, on prompt and completion (through its chat template for conversations)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"reward_model: {path} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
    if model.config.num_labels != 1:
        raise UserError(f"reward_model: {path} has {model.config.num_labels} outputs, must have 1")
    model.to(device).eval()

    def judge(rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float]:
        ids = [encode(row, text, tokenizer, max_length) for row, text in zip(rows, completions, strict=True)]
        with torch.no_grad():
            return [
                score
                for start in range(0, len(ids), batch_size)
                for score in classify(model, ids[start : start + batch_size], tokenizer).float().tolist()
            ]

    return judge


def encode(row: PromptRow, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """Token ids of prompt and completion with its end; of what is too long the end is kept."""
    if row.is_conversational:
        whole = str(tokenizer.apply_chat_template(row.prompt + row.completion(text), tokenize=False))
    else:
        whole = row.prompt + text + str(tokenizer.eos_token or "")
    ids: Any = tokenizer(whole, add_special_tokens=not row.is_conversational)["input_ids"]
    return ids[-max_length:]


def classify(model: Any, ids: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Scores [n] of sequences, padded on the right."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.config.pad_token_id = pad  # it finds the last token by it
    width = max(map(len, ids))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=model.device)
    return model(input_ids=tokens, attention_mask=mask).logits[:, 0]


def judge_groups(judge: Judge, rows: Sequence[PromptRow], groups: Sequence[Sequence[str]]) -> list[list[float]]:
    """Scores of each prompt's completions, in one call of the judge."""
    flat = [(row, text) for row, group in zip(rows, groups, strict=True) for text in group]
    scores = iter(judge([row for row, _ in flat], [text for _, text in flat]) if flat else [])
    return [[next(scores) for _ in group] for group in groups]


def best_and_worst(texts: Sequence[str], scores: Sequence[float]) -> tuple[int, int] | None:
    """Places of the first best and the first worst; None where all score alike, or there is none."""
    if not texts or max(scores) == min(scores):
        return None
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return (best, worst) if texts[best] != texts[worst] else None
