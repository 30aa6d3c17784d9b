"""Completions of a stage's prompts: seeded, written to disk as they come, and never sampled twice.

A killed run reads the finished batches back from the file. A batch's seed depends only on its number, so the remaining
batches are the same as without the kill, if the engine keeps to its seeds. The first line of the file is a key of
everything the samples depend on; the file is used only if its key matches. All other lines are one batch each:
{"batch", "ids"} with token ids; a server's have {"batch", "texts", "by"}.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.common.files import read_json, write_json
from sdpo_kernels.stepwise.sources.context import SourceContext
from sdpo_kernels.stepwise.sources.engine import Batch, Completion, Engine, Prompt
from sdpo_kernels.stepwise.sources.engine_transformers import TransformersEngine
from sdpo_kernels.stepwise.sources.engine_url import UrlEngine
from sdpo_kernels.stepwise.sources.engine_vllm import VllmEngine

VERSION = 2
RECORD = "generation.json"  # next to the samples of an engine other than transformers: what answered
Line = dict[str, Any]


def sample(ctx: SourceContext, samples: int, file: str = "samples.jsonl") -> list[list[str]]:
    """Sample `samples` completions of every prompt; leave out those that are empty or did not end."""
    drawn = generate(ctx, [Prompt(row.ids(ctx.tokenizer), row) for row in ctx.prompts], file, samples)
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
    if ctx.settings.generation.engine == "url" and not any(len(set(texts)) > 1 for texts in kept) and any(kept):
        ctx.reporter.warn(
            f"{ctx.label('samples')}: the server's answers to a prompt are all alike: does it sample? "
            "`transformers serve` does if the model's generation_config.json has do_sample: true"
        )
    return kept


def _is_whole(completion: Completion) -> bool:
    return completion.finished and bool(completion.text.strip())


def generate(
    ctx: SourceContext, prompts: Sequence[Prompt], file: str, count: int = 1, *, averaged: bool = False
) -> list[Completion]:
    """Sample `count` completions of each prompt, in the order of the prompts.

    1. Make the engine that the settings name. `averaged`: it uses the EMA weights of the previous stage, if that left
       any (`reference: ema`).
    2. Read the batches already in the file, or start it with its key.
    3. Let the engine answer the remaining batches; each is on disk as soon as it is there.
    """
    path = ctx.folder / file
    engine = _engine(ctx, count, averaged)
    wanted = [prompt for prompt in prompts for _ in range(count)]

    key = _key(ctx, engine, wanted)
    done = _read(path, key)
    if not done:
        path.write_text(json.dumps({"key": key}) + "\n", "utf-8")

    starts = range(0, len(wanted), engine.size)
    batches = [Batch(n, wanted[at : at + engine.size], ctx.seed(file, n)) for n, at in enumerate(starts)]
    _complete(ctx, engine, batches, done, path)

    by = sorted({line["by"] for line in done.values() if line.get("by")})
    if (record := engine.record(by)) is not None:
        write_json(ctx.folder / RECORD, record)
    rows = [row for number in range(len(batches)) for row in done[number][engine.column]]
    return [engine.completion(prompt, row) for prompt, row in zip(wanted, rows, strict=True)]


def generated_by(folder: Path) -> dict[str, Any] | None:
    """What answered the prompts of a source with this folder; None: transformers, in the run's own process."""
    path = folder / RECORD
    return read_json(path) if path.exists() else None


def _engine(ctx: SourceContext, count: int, averaged: bool) -> Engine:
    name = ctx.settings.generation.engine
    if name == "url":
        return UrlEngine(ctx, count)
    return VllmEngine(ctx, count) if name == "vllm" else TransformersEngine(ctx, averaged)


def _complete(ctx: SourceContext, engine: Engine, batches: Sequence[Batch], done: dict[int, Line], path: Path) -> None:
    """Add the lines of the batches that `done` lacks to it and to the file."""
    missing = [batch for batch in batches if batch.number not in done]
    counted = sum(len(batch.prompts) for batch in batches)
    ready = counted - sum(len(batch.prompts) for batch in missing)

    with path.open("a", encoding="utf-8") as stream, ctx.reporter.task(ctx.label("samples"), counted, ready) as task:
        task.update(ready)
        # closed at once after an error: an engine may have a process or connections to end
        with closing(engine.answer(missing)) as answers:
            for number, rows, by in answers:
                done[number] = {"batch": number, engine.column: rows} | ({} if by is None else {"by": by})
                stream.write(json.dumps(done[number]) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
                ready += len(rows)
                task.update(ready)


def _key(ctx: SourceContext, engine: Engine, wanted: Sequence[Prompt]) -> str:
    parts = {
        "version": VERSION,
        "prefixes": [prompt.ids for prompt in wanted],
        "settings": ctx.settings.model_dump(mode="json", exclude={"generation"}),
        "stage": ctx.name,
        **engine.depends_on(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str) -> dict[int, Line]:
    """The finished batches in `path` by number if its key is `key`, else none; an incomplete last line is cut off."""
    if not path.exists():
        return {}

    # bytes after the last line break are a line that a kill cut short
    lines = path.read_bytes().split(b"\n")
    whole = lines[:-1]
    try:
        rows = [json.loads(line) for line in whole]
    except ValueError:
        return {}
    if not rows or rows[0].get("key") != key:
        return {}

    # cut only once the key matches: a file with another key is overwritten anyway
    if lines[-1]:
        with path.open("r+b") as stream:
            stream.truncate(sum(len(line) + 1 for line in whole))

    return {row["batch"]: row for row in rows[1:]}
