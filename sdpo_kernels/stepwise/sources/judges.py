"""Judges: whatever gives each completion a number, higher being better. One protocol for rewards and annotators.

    def letters(rows, completions):                    # in my_rewards.py; judge: my_rewards:letters
        return [float(text == row["answer"]) for row, text in zip(rows, completions)]

`rows` are the prompt file's own rows. A judge is a function of yours (`judge: module:function`, imported in this
process because you asked for it by name) or a reward model.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.models.load import release_memory
from sdpo_kernels.stepwise.sources.context import read_json_rows

VERDICTS_AT_ONCE = 256  # what a kill costs at most
VERDICTS = "verdicts.jsonl"
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
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        hint = f"must be module:function that can be imported, also from the current folder {os.getcwd()}"
        raise UserError(f"judge: was {name!r}, {hint}: {error}") from error
    if not callable(found):
        raise UserError(f"judge: {name!r} is a {type(found).__name__}, must be a function")

    def judge(rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float]:
        try:
            given = found([row.values for row in rows], list(completions))
        except Exception as error:  # a person's function raises what it likes
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}:{last.lineno}"
            raise UserError(f"judge: {name!r} failed: {type(error).__name__}: {error} ({where})") from error
        try:
            scores = [float(score) for score in given]
        except (TypeError, ValueError) as error:
            raise UserError(f"judge: {name!r} must give a list of numbers: {error}") from error
        if len(scores) != len(completions) or not all(map(math.isfinite, scores)):
            raise UserError(f"judge: {name!r} gave {len(scores)} scores, must give {len(completions)} finite ones")
        return scores

    return judge


def remembering(judge: Judge, path: Path, version: str) -> Judge:
    """`judge`, whose verdicts are kept in `path` as they come: nothing is asked twice, not even after a kill.

    Verdicts of another `version` of the judge are not believed.
    """
    lines = read_json_rows(path, half_line=True)
    known: dict[str, float] = {line["of"]: line["score"] for line in lines if line["judge"] == version}

    def remembered(rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float]:
        keys = [_digest(row, text) for row, text in zip(rows, completions, strict=True)]
        new = list({key: place for place, key in enumerate(keys) if key not in known}.values())
        with path.open("a", encoding="utf-8") as stream:
            for start in range(0, len(new), VERDICTS_AT_ONCE):
                places = new[start : start + VERDICTS_AT_ONCE]
                scores = judge([rows[i] for i in places], [completions[i] for i in places])
                known.update(zip([keys[i] for i in places], scores, strict=True))
                stream.writelines(_verdict(keys[i], known[keys[i]], version) for i in places)
                stream.flush()
                os.fsync(stream.fileno())
        return [known[key] for key in keys]

    return remembered


def _verdict(key: str, score: float, version: str) -> str:
    return json.dumps({"of": key, "score": score, "judge": version}) + "\n"


def code_version(*parts: str) -> str:
    """A digest of a judge's parts: names, and the contents of those that are files."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0" + (Path(part).read_bytes() if os.path.isfile(part) else b""))
    return digest.hexdigest()[:16]


def function_version(name: str) -> str:
    """Of the module that holds the judge 'module:function'; what that imports is not looked at."""
    return code_version(name, getattr(sys.modules[name.partition(":")[0]], "__file__", None) or "")


def _digest(row: PromptRow, text: str) -> str:
    return hashlib.sha256(json.dumps([row.values, text], sort_keys=True, default=str).encode()).hexdigest()[:24]


def check_reward_model(path: str, trust_remote_code: bool) -> None:
    """UserError where there is no sequence classifier with one output; its weights are not looked at."""
    from transformers import AutoConfig

    try:
        outputs = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).num_labels
    except (OSError, ValueError) as error:
        raise UserError(f"reward_model: {path} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
    if outputs != 1:
        raise UserError(f"reward_model: {path} has {outputs} outputs, must have 1")


def reward_model_judge(
    path: str, device: torch.device, max_length: int, batch_size: int, trust_remote_code: bool = False
) -> Judge:
    """A sequence classifier with one output, on prompt and completion (through its chat template for conversations)."""
    from transformers import AutoTokenizer

    check_reward_model(path, trust_remote_code)
    release_memory()
    options = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"reward_model: {path} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
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
        whole = row.render(tokenizer, row.prompt + row.completion(text))
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
