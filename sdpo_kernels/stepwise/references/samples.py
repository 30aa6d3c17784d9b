"""Greedy answers of a model to a few evaluation prompts, for the report: what training changed, in words.

write_answers(model, folder, tokens, 3, tokenizer, scorer)     # folder/samples.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.models.load import load_generator, release_memory
from sdpo_kernels.stepwise.record.samples import write_samples
from sdpo_kernels.stepwise.references.scorer import Scorer

LONGEST = 64  # tokens of an answer


def write_answers(
    model: str,
    folder: Path,
    tokens: TokenizedPairs,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    label: str = "samples",
) -> None:
    """Write the answers of the model in `model` to the first `count` different prompts of `tokens` into `folder`.

    An answer is greedy and has at most LONGEST tokens. The model is loaded for this and released.
    """
    prompts = first_prompts(tokens, count)
    with scorer.reporter.waiting(f"loading the model {model}"):
        loaded = load_generator(model, scorer.config, scorer.device)
    with scorer.reporter.task(label, len(prompts)) as task, scorer.precision.autocast():
        samples = []
        for number, ids in enumerate(prompts, 1):
            answer, ended = greedy_answer(loaded, ids, tokenizer, scorer.device)
            prompt = str(tokenizer.decode(ids, skip_special_tokens=True))
            text = str(tokenizer.decode(answer, skip_special_tokens=True))
            samples.append({"prompt": prompt, "answer": text, "ended": ended})
            task.update(number)
    del loaded
    release_memory()
    write_samples(folder, samples)


def first_prompts(tokens: TokenizedPairs, count: int) -> list[list[int]]:
    """The ids of the first `count` different prompts; a pair without one has nothing to answer."""
    found: dict[tuple[int, ...], None] = {}
    for index in range(len(tokens)):
        ids, length = tokens[index].chosen
        if length:
            found.setdefault(tuple(ids[:length].tolist()))
        if len(found) == count:
            break
    return [list(ids) for ids in found]


@torch.no_grad()
def greedy_answer(
    model: Any, prompt: list[int], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[list[int], bool]:
    """(new token ids without the end token, whether there was one)."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}

    # a model with a table of positions cannot go beyond it
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = LONGEST if positions is None else min(LONGEST, positions - len(prompt))
    if longest < 1:
        return [], False

    # its own generation config may sample, or penalise repetition
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=longest, eos_token_id=sorted(ends) or None, pad_token_id=tokenizer.pad_token_id
    )
    tokens = torch.tensor([prompt], device=device)
    out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0, len(prompt) :].tolist()
    ended = bool(out) and out[-1] in ends
    return out[:-1] if ended else out, ended
