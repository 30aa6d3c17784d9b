"""Judges give each completion a score; higher is better. One protocol for reward models and annotators.

    def letters(rows, completions):                    # in my_rewards.py; judge: my_rewards:letters
        return [float(text == row["answer"]) for row, text in zip(rows, completions)]

`rows` are the prompt file's own rows. A judge is either your own function (`judge: module:function`, imported into this
process) or a reward model.
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
from sdpo_kernels.stepwise.common.model_names import load_failure
from sdpo_kernels.stepwise.common.units import counted
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.models.load import release_memory
from sdpo_kernels.stepwise.sources.context import read_json_rows

VERDICTS_AT_ONCE = 256  # verdicts that a kill loses at most
VERDICTS = "verdicts.jsonl"
Judge = Callable[[Sequence[PromptRow], Sequence[str]], list[float]]


def function_judge(name: str) -> Judge:
    """The function named 'module:function', with its answers checked; the current folder is on the import path.

    Raises:
        UserError: it cannot be imported; or, when it is called, it fails or does not return one finite number per
            completion.
    """
    module, _, function = name.partition(":")

    # `python -m` puts the current folder on the path; the console script `sdpo` does not
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        hint = f"must be module:function, importable from the Python path or the current folder {os.getcwd()}"
        raise UserError(f"judge: was {name!r}, {hint}: {error}") from error
    if not callable(found):
        raise UserError(f"judge: {name!r} is a {type(found).__name__}, must be a function")

    def judge(rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float]:
        try:
            given = found([row.values for row in rows], list(completions))
        except Exception as error:  # a user's function may raise anything
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}:{last.lineno}"
            raise UserError(f"judge: {name!r} failed: {type(error).__name__}: {error} ({where})") from error

        try:
            scores = [float(score) for score in given]
        except (TypeError, ValueError) as error:
            raise UserError(f"judge: {name!r} must return a list of numbers: {error}") from error
        if len(scores) != len(completions):
            raise UserError(
                f"judge: {name!r} returned {counted(len(scores), 'score')} for "
                f"{counted(len(completions), 'completion')}, must be one for each"
            )
        require_finite(f"judge: {name!r}", "return a low score where there is none", rows, completions, scores)
        return scores

    return judge


def require_finite(
    who: str, remedy: str, rows: Sequence[PromptRow], completions: Sequence[str], scores: Sequence[float]
) -> None:
    """UserError, with prompt and completion, for the first score that is NaN or infinite: it ranks nothing."""
    odd = [place for place, score in enumerate(scores) if not math.isfinite(score)]
    if not odd:
        return
    row, text = rows[odd[0]], completions[odd[0]]
    more = f", and for {len(odd) - 1} more of {len(scores)}" if len(odd) > 1 else ""
    raise UserError(
        f"{who} gave {scores[odd[0]]} for a completion of the prompt {row.where} ({text!r:.60}){more}; "
        f"must be finite numbers: {remedy}"
    )


def remembering(judge: Judge, path: Path, version: str) -> Judge:
    """`judge` with its verdicts cached in `path` as they come: it is asked nothing twice, even after a kill.

    A cached verdict is used only if it is from this `version` of the judge.
    """
    lines = read_json_rows(path, half_line=True)
    known: dict[str, float] = {line["of"]: line["score"] for line in lines if line["judge"] == version}

    def remembered(rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float]:
        # the same text may come up several times: ask about one of them
        keys = [_digest(row, text) for row, text in zip(rows, completions, strict=True)]
        new = list({key: place for place, key in enumerate(keys) if key not in known}.values())

        # in portions, each synced to disk: a kill loses at most one
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
    """A digest of a judge's parts: their names, and the contents of those that are files."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0" + (Path(part).read_bytes() if os.path.isfile(part) else b""))
    return digest.hexdigest()[:16]


def function_version(name: str) -> str:
    """The version of the judge 'module:function': a digest of its module's file, not of what that file imports."""
    return code_version(name, getattr(sys.modules[name.partition(":")[0]], "__file__", None) or "")


def _digest(row: PromptRow, text: str) -> str:
    return hashlib.sha256(json.dumps([row.values, text], sort_keys=True, default=str).encode()).hexdigest()[:24]


def check_reward_model(path: str, trust_remote_code: bool) -> None:
    """UserError unless `path` is a sequence classifier with one output; reads its config, not its weights."""
    from transformers import AutoConfig

    try:
        outputs = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).num_labels
    except (OSError, ValueError) as error:
        raise UserError(f"reward_model: {load_failure(path, 'config', error)}") from error
    if outputs != 1:
        raise UserError(f"reward_model: {path} has {outputs} outputs, must have 1")


def reward_model_judge(
    path: str, device: torch.device, max_length: int, batch_size: int, trust_remote_code: bool = False
) -> Judge:
    """A sequence classifier with one output as judge of prompt + completion (conversations by its chat template)."""
    from transformers import AutoTokenizer

    check_reward_model(path, trust_remote_code)

    # the generator is no longer needed: free it before the next model is loaded
    release_memory()
    options = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"reward_model: {load_failure(path, 'model', error)}") from error
    model.to(device).eval()

    def judge(rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float]:
        ids = [encode(row, text, tokenizer, max_length) for row, text in zip(rows, completions, strict=True)]
        with torch.no_grad():
            scores = [
                score
                for start in range(0, len(ids), batch_size)
                for score in classify(model, ids[start : start + batch_size], tokenizer).float().tolist()
            ]
        require_finite(f"reward_model: {path}", "it may be broken, or need another dtype", rows, completions, scores)
        return scores

    return judge


def encode(row: PromptRow, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """Token ids of prompt, completion and end token; text over `max_length` keeps its end."""
    return row.whole_ids(tokenizer, text)[-max_length:]


def classify(model: Any, ids: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Scores [n] of sequences, padded on the right."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model.config.pad_token_id = pad  # the model finds each row's last token by it
    width = max(map(len, ids))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=model.device)
    return model(input_ids=tokens, attention_mask=mask).logits[:, 0]


def judge_groups(judge: Judge, rows: Sequence[PromptRow], groups: Sequence[Sequence[str]]) -> list[list[float]]:
    """Scores of each prompt's completions, from one call of the judge."""
    flat = [(row, text) for row, group in zip(rows, groups, strict=True) for text in group]
    scores = iter(judge([row for row, _ in flat], [text for _, text in flat]) if flat else [])
    return [[next(scores) for _ in group] for group in groups]


def best_and_worst(texts: Sequence[str], scores: Sequence[float]) -> tuple[int, int] | None:
    """Indices of the first best and the first worst; None if all score alike, or there are none."""
    if not texts or max(scores) == min(scores):
        return None
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return (best, worst) if texts[best] != texts[worst] else None
