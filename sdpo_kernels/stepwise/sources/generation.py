"""Completions of the policy by `model.generate`: batched, seeded, and written as they come.

A killed run does not pay twice: whole batches are read back from the file, and a batch's seed depends on its number
alone, so that the rest comes out as it would have. Rows of the file: {"batch", "ids"}; its first line is a key of
everything the samples depend on; under another key they are drawn anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sdpo_kernels.stepwise.models.load import load_generator, weights_hash
from sdpo_kernels.stepwise.references.ema import load_ema_into
from sdpo_kernels.stepwise.sources.context import SourceContext

VERSION = 2


class Completion(NamedTuple):
    """New tokens without the end token, their text, and whether the model ended them itself."""

    ids: list[int]
    text: str
    finished: bool


def sample(ctx: SourceContext, samples: int, file: str = "samples.jsonl") -> list[list[str]]:
    """`samples` completions of every prompt; those that the model did not end, or that are empty, are left out."""
    drawn = generate(ctx, [row.ids(ctx.tokenizer) for row in ctx.prompts for _ in range(samples)], file)
    groups = [drawn[i : i + samples] for i in range(0, len(drawn), samples)]
    kept = [[completion.text for completion in group if _is_whole(completion)] for group in groups]
    lost = len(drawn) - sum(map(len, kept))
    if lost:
        ctx.reporter.warn(
            f"{ctx.label('samples')}: {lost} of {len(drawn)} are left out: empty, or not ended within max_new_tokens"
        )
    return kept


def _is_whole(completion: Completion) -> bool:
    return completion.finished and bool(completion.text.strip())


def generate(
    ctx: SourceContext, prefixes: Sequence[list[int]], file: str, *, averaged: bool = False
) -> list[Completion]:
    """One completion by the newest model of each prefix, token ids that may begin the answer already.

    `averaged`: by the average that the stage before has left, where there is one (reference: ema).
    """
    path = ctx.folder / file
    model = load_generator(ctx.policy, ctx.scorer.config, ctx.scorer.device)
    config = ctx.scorer.config
    if averaged and config.reference == "ema" and ctx.policy != config.model:
        load_ema_into(model, Path(ctx.policy))
    model.generation_config = _generation_config(ctx, model)  # its own might penalise repetition, for one
    key = _key(ctx, model, prefixes, model.generation_config.eos_token_id)
    done = _read(path, key)
    if not done:
        path.write_text(json.dumps({"key": key}) + "\n", "utf-8")
    with path.open("a", encoding="utf-8") as stream, ctx.reporter.task(ctx.label("samples"), len(prefixes)) as task:
        for number, start in enumerate(range(0, len(prefixes), ctx.settings.batch_size)):
            stop = min(start + ctx.settings.batch_size, len(prefixes))
            if number >= len(done):
                done.append(_generate_batch(ctx, model, prefixes[start:stop], ctx.seed(file, number)))
                stream.write(json.dumps({"batch": number, "ids": done[-1]}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            task.update(stop)
    ends = set(model.generation_config.eos_token_id)
    drawn = [ids for batch in done for ids in batch]
    return [_completion(prefix, ids, ends, ctx.tokenizer) for prefix, ids in zip(prefixes, drawn, strict=True)]


def text_after(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` where they follow `prefix`: alone, many tokenizers would drop the space before them."""
    before = str(tokenizer.decode(list(prefix), skip_special_tokens=True))
    return str(tokenizer.decode([*prefix, *ids], skip_special_tokens=True))[len(before) :]


@torch.no_grad()
def _generate_batch(ctx: SourceContext, model: Any, prefixes: Sequence[list[int]], seed: int) -> list[list[int]]:
    """New token ids of each, up to and with the end token; what follows it is padding and cut off."""
    width, pad = max(map(len, prefixes)), model.generation_config.pad_token_id
    device = ctx.scorer.device
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in prefixes], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prefixes], device=device)
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), ctx.scorer.precision.autocast():
        torch.manual_seed(seed)
        out = model.generate(input_ids=tokens, attention_mask=mask)
    ends = set(model.generation_config.eos_token_id)
    return [_cut(row, ends) for row in out[:, width:].tolist()]


def _generation_config(ctx: SourceContext, model: Any) -> GenerationConfig:
    """Sampling as the settings say and nothing else; it ends at the model's end tokens and the one training appends."""
    tokenizer, settings = ctx.tokenizer, ctx.settings
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=0,
        max_new_tokens=settings.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=pad,
    )  # fmt: skip


def _cut(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in ends), ids)


def _completion(prefix: list[int], ids: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> Completion:
    finished = bool(ids) and ids[-1] in ends
    ids = ids[:-1] if finished else ids
    return Completion(ids, text_after(tokenizer, prefix, ids), finished)


def _key(ctx: SourceContext, model: nn.Module, prefixes: Sequence[list[int]], ends: list[int]) -> str:
    parts = {
        "version": VERSION,
        "model": weights_hash(model),
        "prefixes": list(prefixes),
        "settings": ctx.settings.model_dump(mode="json"),
        "ends": ends,
        "stage": ctx.name,
        "autocast": str(ctx.scorer.precision.dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str) -> list[list[list[int]]]:
    """The whole batches in `path` where they were drawn under `key`; a half line at its end is cut away."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    whole = lines[:-1]  # what follows the last line break is a line that a kill cut short
    try:
        rows = [json.loads(line) for line in whole]
    except ValueError:
        return []
    if not rows or rows[0].get("key") != key:
        return []
    if lines[-1]:
        with path.open("r+b") as stream:
            stream.truncate(sum(len(line) + 1 for line in whole))
    return [row["ids"] for row in rows[1:]]
