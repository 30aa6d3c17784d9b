"""Completions sampled from the policy by `model.generate`: batched, seeded, and written batch by batch.

A killed run does not sample anything twice: finished batches are read back from the file, and a batch's seed depends
only on its number, so the remaining batches are the same as without the kill. The first line of the file is a key of
everything the samples depend on; the file is used only if its key matches. All other lines are {"batch", "ids"}.
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
    """New tokens without the end token, their text, and whether the model produced the end token."""

    ids: list[int]
    text: str
    finished: bool


def sample(ctx: SourceContext, samples: int, file: str = "samples.jsonl") -> list[list[str]]:
    """Sample `samples` completions of every prompt; leave out those that are empty or did not end."""
    drawn = generate(ctx, [row.ids(ctx.tokenizer) for row in ctx.prompts for _ in range(samples)], file)
    groups = [drawn[i : i + samples] for i in range(0, len(drawn), samples)]

    # a truncated answer would be judged on half of its text
    kept = [[completion.text for completion in group if _is_whole(completion)] for group in groups]
    lost = len(drawn) - sum(map(len, kept))
    ctx.samples.update({"drawn": len(drawn), "left out": lost})
    if lost:
        ctx.reporter.warn(
            f"{ctx.label('samples')}: {lost:,} of {len(drawn):,} left out: empty, or did not end within max_new_tokens "
            f"({ctx.settings.max_new_tokens})"
        )
    return kept


def _is_whole(completion: Completion) -> bool:
    return completion.finished and bool(completion.text.strip())


def generate(
    ctx: SourceContext, prefixes: Sequence[list[int]], file: str, *, averaged: bool = False
) -> list[Completion]:
    """Sample one completion of each prefix (token ids; they may include the start of the answer).

    1. Load the newest model. `averaged`: with the EMA weights of the previous stage instead, if it left any
       (`reference: ema`).
    2. Read the batches already in the file, or start it with its key.
    3. Generate the remaining batches; each is on disk before the next one starts.
    """
    path = ctx.folder / file
    with ctx.reporter.waiting(f"loading the model {ctx.policy}"):
        model = load_generator(ctx.policy, ctx.scorer.config, ctx.scorer.device)
    config = ctx.scorer.config
    if averaged and config.reference == "ema" and ctx.policy != config.model:
        load_ema_into(model, Path(ctx.policy))
    # replace the model's own generation config, which may for example penalise repetition
    model.generation_config = _generation_config(ctx, model)

    key = _key(ctx, model, prefixes, model.generation_config.eos_token_id)
    done = _read(path, key)
    if not done:
        path.write_text(json.dumps({"key": key}) + "\n", "utf-8")

    before = min(len(done) * ctx.settings.batch_size, len(prefixes))
    shown = ctx.reporter.task(ctx.label("samples"), len(prefixes), before)
    with path.open("a", encoding="utf-8") as stream, shown as task:
        for number, start in enumerate(range(0, len(prefixes), ctx.settings.batch_size)):
            stop = min(start + ctx.settings.batch_size, len(prefixes))
            if number >= len(done):
                done.append(_generate_batch(ctx, model, prefixes[start:stop], ctx.seed(file, number)))
                stream.write(json.dumps({"batch": number, "ids": done[-1]}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            task.update(max(stop, before))

    ends = set(model.generation_config.eos_token_id)
    drawn = [ids for batch in done for ids in batch]
    return [_completion(prefix, ids, ends, ctx.tokenizer) for prefix, ids in zip(prefixes, drawn, strict=True)]


def text_after(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` after `prefix`; decoded alone, many tokenizers would drop the leading space."""
    before = str(tokenizer.decode(list(prefix), skip_special_tokens=True))
    return str(tokenizer.decode([*prefix, *ids], skip_special_tokens=True))[len(before) :]


@torch.no_grad()
def _generate_batch(ctx: SourceContext, model: Any, prefixes: Sequence[list[int]], seed: int) -> list[list[int]]:
    """New token ids of each prefix, up to and including the end token; the padding after it is cut off."""
    width, pad = max(map(len, prefixes)), model.generation_config.pad_token_id
    device = ctx.scorer.device

    # padding on the left: the new tokens of all rows start in the same column
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in prefixes], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prefixes], device=device)

    # the samples depend on `seed` alone, and training's random state stays as it was
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), ctx.scorer.precision.autocast():
        torch.manual_seed(seed)
        out = model.generate(input_ids=tokens, attention_mask=mask)

    ends = set(model.generation_config.eos_token_id)
    return [_cut(row, ends) for row in out[:, width:].tolist()]


def _generation_config(ctx: SourceContext, model: Any) -> GenerationConfig:
    """Plain sampling by the settings; ends at the model's own end tokens and at the one that training appends."""
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
    """The finished batches in `path` if its key is `key`, else none; an incomplete last line is cut off."""
    if not path.exists():
        return []

    # bytes after the last line break are a line that a kill cut short
    lines = path.read_bytes().split(b"\n")
    whole = lines[:-1]
    try:
        rows = [json.loads(line) for line in whole]
    except ValueError:
        return []
    if not rows or rows[0].get("key") != key:
        return []

    # cut only once the key matches: a file with another key is overwritten anyway
    if lines[-1]:
        with path.open("r+b") as stream:
            stream.truncate(sum(len(line) + 1 for line in whole))

    return [row["ids"] for row in rows[1:]]
