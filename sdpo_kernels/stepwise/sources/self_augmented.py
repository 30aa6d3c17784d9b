"""`self_augmented` (SAPO, arXiv 2405.20830): the reference answer A·B·C against A·B′·C, B′ written by the EMA model.

Prompt rows hold `answer`, a string. B is a run of `segment_tokens` tokens that starts anywhere in the answer, or what
is left of it. Pairs go into a buffer that all stages share, first in first out; a stage's pairs are drawn from it with
replacement, with weight 1/(uses + 1). With `reference: ema` the EMA that the stage before has left writes B′, else the
newest model does.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.settings.source import SelfAugmentedSource
from sdpo_kernels.stepwise.sources.context import PairRow, SourceContext, read_json_rows, write_rows
from sdpo_kernels.stepwise.sources.generation import generate, text_after

BUFFER = "buffer.jsonl"


class Cut(NamedTuple):
    """A prompt with its reference answer in three, as token ids."""

    row: PromptRow
    prompt: list[int]
    before: list[int]  # A
    segment: list[int]  # B
    after: list[int]  # C


def make(ctx: SourceContext) -> list[PairRow]:
    """The stage's pairs, drawn from the buffer; the buffer with its counts of use stays with the stage."""
    settings = ctx.settings
    assert isinstance(settings, SelfAugmentedSource)
    draw = random.Random(ctx.seed("segments"))
    cuts = [_cut(ctx, row, settings.segment_tokens, draw) for row in ctx.prompts for _ in range(settings.samples)]
    written = generate(ctx, [cut.prompt + cut.before for cut in cuts], "segments.jsonl", averaged=True)
    new = []
    for cut, found in zip(cuts, written, strict=True):
        segment = found.ids[: len(cut.segment)]
        rejected = text_after(ctx.tokenizer, cut.prompt, cut.before + segment + cut.after)
        if segment != cut.segment and rejected.strip() and rejected != answer(cut.row):
            new.append(cut.row.pair(answer(cut.row), rejected) | {"uses": 0})
    buffer = [] if ctx.before is None else read_json_rows(ctx.before / BUFFER)
    buffer = (buffer + new)[-settings.buffer :]
    drawn = draw_from(buffer, settings.pairs, random.Random(ctx.seed("buffer")))
    write_rows(ctx.folder / BUFFER, buffer)
    return drawn


def draw_from(buffer: list[dict[str, Any]], count: int, draw: random.Random) -> list[PairRow]:
    """`count` rows with replacement, each with weight 1/(uses + 1) at the time; `uses` in the buffer goes up."""
    drawn = []
    for _ in range(count if buffer else 0):
        (row,) = draw.choices(buffer, weights=[1 / (entry["uses"] + 1) for entry in buffer])
        row["uses"] += 1
        drawn.append({key: value for key, value in row.items() if key != "uses"})
    return drawn


def answer(row: PromptRow) -> str:
    """The row's reference answer; UserError where there is none."""
    found = row.values.get("answer")
    if not isinstance(found, str) or not found.strip():
        raise UserError(f"{row.where}: 'answer' is missing; self_augmented needs a reference answer, a string")
    return found


def _cut(ctx: SourceContext, row: PromptRow, most: int, draw: random.Random) -> Cut:
    prompt, whole = row.ids(ctx.tokenizer), row.ids(ctx.tokenizer, answer(row))
    length = next((at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    ids = whole[length:]  # tokens may join across the border
    start = draw.randrange(len(ids))
    return Cut(row, whole[:length], ids[:start], ids[start : start + most], ids[start + most :])
