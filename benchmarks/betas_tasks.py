"""The three tasks of `benchmarks.stages --betas`: training pairs in three stages, and what a model is judged on.

    start = TASKS["grammar"].start(Path("runs/x/grammar/seed-11"), seed=11)
    start.stages                                # {"easy": file, "medium": file, "hard": file}, easiest first
    judge(model, initial, tokenizer, start)     # {"pair_accuracy": 0.71, "kl": 0.04, ...}

`sorting` is the demo's task: a warm start and pairs of its own for every seed. `grammar` (BLiMP) and `reasoning`
(GSM8K) are pairs of ../shared/data/compact for stories260K: a seed draws which prompts are held out and which train.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import ROOT
from examples.demo.evaluate import exactly_right, pair_gammas
from examples.demo.preferences import read_pairs, write_pairs
from examples.demo.setup import FULL, HELDOUT, QUICK, pair_file, set_up
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.starter.letters import SOURCES, Problem, draw_words
from sdpo_kernels.stepwise.starter.tiny_model import load

DATA = ROOT.parent / "shared/data"
TIERS = ("easy", "medium", "hard")
PROMPTS = 96  # held-out prompts that are answered for the KL

Pair = dict[str, str]


@dataclass(frozen=True)
class Start:
    """What every method of one task and seed starts from."""

    model: Path
    stages: dict[str, Path]  # training pairs, easiest first
    heldout: list[Pair]
    prompts: list[str]  # of held-out pairs, each once
    answer_tokens: int  # at most, of the sampled answers
    problems: list[Problem]  # of the sorting task, whose answers can be checked


@dataclass(frozen=True)
class Task:
    """A task, and the learning rate and β it is swept with (chosen on seed 1, which is in no result)."""

    start: Callable[[Path, int, bool], Start]  # folder, seed, whether it is small
    learning_rate: float
    betas: tuple[float, ...]
    batch: int = 16

    @property
    def described(self) -> dict[str, Any]:
        """Its settings, for the report."""
        return {"learning_rate": self.learning_rate, "betas": list(self.betas), "batch": self.batch}


def sorting(folder: Path, seed: int, quick: bool) -> Start:
    """The demo's task: words of four, six and eight letters are the stages."""
    sizes = replace(QUICK, seed=seed) if quick else replace(FULL, seed=seed, heldout_prompts=300)
    start = set_up(folder, sizes, Reporter(quiet=True))
    heldout = [pair for source in SOURCES for pair in start.heldout[source.name]]
    problems = [p for source in SOURCES for p in draw_words(source, HELDOUT, sizes.heldout_prompts, seed)]
    stages = {source.name: pair_file(folder, source.name) for source in SOURCES}
    return Start(start.model, stages, heldout, some_prompts(heldout, quick, seed), 12, problems)


@dataclass(frozen=True)
class Sizes:
    """Of a task with data from a file: pairs, letters of a prompt with its longer answer, tokens of sampled answers."""

    train: int
    heldout: int
    letters: int
    answer_tokens: int


def compact(file: str, sizes: Sizes, folder: Path, seed: int, quick: bool) -> Start:
    """Pairs of one compact file, split by prompt; the stages are thirds by the initial model's log-prob margin.

    This is `order: margin` with `tiers: 3`, written as files so that the stages can be reversed.
    """
    model, stages = DATA / "models/stories260K", {name: folder / f"{name}.jsonl" for name in TIERS}
    pairs = [pair for pair in read_pairs(DATA / "compact" / file) if letters(pair) <= sizes.letters]
    training, heldout = split_by_prompt(pairs, seed)
    training, heldout = training[: 48 if quick else sizes.train], heldout[: 40 if quick else sizes.heldout]

    if not all(path.exists() for path in stages.values()):
        folder.mkdir(parents=True, exist_ok=True)
        margins = gammas(*load(model), training)
        easiest_first = np.argsort(-margins.numpy(), kind="stable")
        for path, members in zip(stages.values(), np.array_split(easiest_first, len(TIERS)), strict=True):
            write_pairs(path, [training[i] for i in sorted(members)])

    return Start(model, stages, heldout, some_prompts(heldout, quick, seed), sizes.answer_tokens, [])


def letters(pair: Pair) -> int:
    """Letters of the prompt and the longer answer."""
    return len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"]))


def split_by_prompt(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs in random order; half of the prompts are held out, with all of their pairs."""
    rows = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]
    prompts = sorted({row["prompt"] for row in rows})
    draw = random.Random(seed)
    draw.shuffle(prompts)
    draw.shuffle(rows)
    held = set(prompts[: len(prompts) // 2])
    return [row for row in rows if row["prompt"] not in held], [row for row in rows if row["prompt"] in held]


def some_prompts(pairs: Sequence[Pair], quick: bool, seed: int) -> list[str]:
    """Different prompts of `pairs`, drawn at random."""
    prompts = sorted({pair["prompt"] for pair in pairs})
    return random.Random(seed).sample(prompts, min(len(prompts), 8 if quick else PROMPTS))


def gammas(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> Tensor:
    """Log-prob of chosen minus rejected, [pairs], a few pairs at a time: of long answers all logits would be large."""
    return torch.cat([pair_gammas(model, tokenizer, pairs[i : i + 50]) for i in range(0, len(pairs), 50)])


def judge(model: Any, initial: Any, tokenizer: Any, start: Start) -> dict[str, float | None]:
    """Held-out shares of pairs ranked right and of answers exactly right (None without a checker), and the KL."""
    kl, tokens = kl_from(model, initial, tokenizer, start.prompts, start.answer_tokens)
    right = exactly_right(model, tokenizer, start.problems).double().mean().item() if start.problems else None
    margins = gammas(model, tokenizer, start.heldout)
    return {
        "pair_accuracy": (margins > 0).double().mean().item(),
        "exactly_right": right,
        "kl": kl,
        "kl_tokens": tokens,
        "margin": margins.double().mean().item(),
    }


@torch.no_grad()
def kl_from(
    model: Any, initial: Any, tokenizer: Any, prompts: Sequence[str], most: int, seed: int = 0
) -> tuple[float, int]:
    """(KL(model ‖ initial) in nat a token, number of tokens), on the model's own answers to `prompts`.

    1. The model samples one answer a prompt, at temperature 1, of at most `most` tokens.
    2. At every token of the answers, the end token included, the KL of the two next-token distributions is summed over
       the whole vocabulary, in float64. This has less noise than the log-ratios of the sampled tokens.
    3. The mean is over tokens.
    """
    batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=most, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    # a token is counted unless an end token came before it
    answers = whole[:, ids.shape[1] :]
    ended = (answers == tokenizer.eos_token_id).cumsum(1)
    counted = (ended - (answers == tokenizer.eos_token_id).long()) == 0
    mask = torch.cat([mask, counted.to(mask.dtype)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)

    # logits at a position are of the next token
    def logps(one: Any) -> Tensor:
        logits = one(input_ids=whole, attention_mask=mask, position_ids=places, use_cache=False).logits
        return logits[:, ids.shape[1] - 1 : -1].double().log_softmax(-1)

    own, other = logps(model), logps(initial)
    kl = (own.exp() * (own - other)).sum(-1)
    return float(kl[counted].mean()), int(counted.sum())


TASKS = {
    "sorting": Task(sorting, 5e-5, (1.0, 3.0, 9.0, 27.0)),
    "grammar": Task(partial(compact, "stage1_grammar.jsonl", Sizes(576, 400, 256, 24)), 3e-4, (0.3, 0.9, 2.7), 8),
    "reasoning": Task(partial(compact, "stage3_reasoning.jsonl", Sizes(120, 150, 340, 32)), 3e-4, (0.1, 0.3, 0.9), 8),
}
