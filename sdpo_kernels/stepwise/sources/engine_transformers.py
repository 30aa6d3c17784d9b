"""Answers by transformers' `generate`, in this process: batched, with padding on the left."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from sdpo_kernels.stepwise.models.load import load_generator, weights_hash
from sdpo_kernels.stepwise.references.ema import load_ema_into
from sdpo_kernels.stepwise.sources.context import SourceContext
from sdpo_kernels.stepwise.sources.engine import (
    Answers,
    Batch,
    Completion,
    Prompt,
    Row,
    cut,
    end_tokens,
    token_completion,
)


class TransformersEngine:
    """Samples from the policy, which it loads; with `averaged` from the EMA of the stage before, if it left any."""

    column = "ids"

    def __init__(self, ctx: SourceContext, averaged: bool = False) -> None:
        self.ctx, self.size = ctx, ctx.settings.batch_size
        with ctx.reporter.waiting(f"loading the model {ctx.policy}"):
            self.model = load_generator(ctx.policy, ctx.scorer.config, ctx.scorer.device)
        config = ctx.scorer.config
        if averaged and config.reference == "ema" and ctx.policy != config.model:
            load_ema_into(self.model, Path(ctx.policy))

        # replace the model's own generation config, which may for example penalise repetition
        self.model.generation_config = _generation_config(ctx, self.model)

    @property
    def ends(self) -> list[int]:
        """The end tokens, in ascending order."""
        return self.model.generation_config.eos_token_id

    def depends_on(self) -> dict[str, Any]:
        """The weights, the end tokens and the precision."""
        autocast = str(self.ctx.scorer.precision.dtype)
        return {"model": weights_hash(self.model), "ends": self.ends, "autocast": autocast}

    def answer(self, batches: Sequence[Batch]) -> Generator[Answers, None, None]:
        """Answer batch after batch."""
        for batch in batches:
            yield Answers(batch.number, generate_batch(self.ctx, self.model, batch))

    def completion(self, prompt: Prompt, row: Row) -> Completion:
        """The completion of a row of token ids."""
        return token_completion(prompt, row, set(self.ends), self.ctx.tokenizer)

    def record(self, by: Sequence[str]) -> None:
        """Nothing: what every run does needs no record."""


@torch.no_grad()
def generate_batch(ctx: SourceContext, model: Any, batch: Batch) -> list[list[int]]:
    """New token ids of each prompt, up to and including the end token; the padding after it is cut off."""
    prefixes = [prompt.ids for prompt in batch.prompts]
    width, pad = max(map(len, prefixes)), model.generation_config.pad_token_id
    device = ctx.scorer.device

    # padding on the left: the new tokens of all rows start in the same column
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in prefixes], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prefixes], device=device)

    # the samples depend on `seed` alone, and training's random state stays as it was
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), ctx.scorer.precision.autocast():
        torch.manual_seed(batch.seed)
        out = model.generate(input_ids=tokens, attention_mask=mask)

    ends = set(model.generation_config.eos_token_id)
    return [cut(row, ends) for row in out[:, width:].tolist()]


def _generation_config(ctx: SourceContext, model: Any) -> GenerationConfig:
    """Plain sampling by the settings; ends at the model's own end tokens and at the one that training appends."""
    tokenizer, settings = ctx.tokenizer, ctx.settings
    ends = end_tokens(model.generation_config.eos_token_id, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=0,
        max_new_tokens=settings.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=pad,
    )  # fmt: skip
