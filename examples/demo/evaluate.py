"""Evaluate a model on held-out words: how many answers are exactly right, and how many pairs it ranks right.

    right = exactly_right(model, tokenizer, draw_words(SOURCES[0], "heldout", 500, seed=0))       # bool [500]
    gammas = pair_gammas(model, tokenizer, pairs)                                               # float32 [pairs]

This is plain transformers code with padding and full logits: it shares nothing with the driver it evaluates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.demo.generate import write_answers
from examples.demo.sft import NOT_SCORED, answer_tensors
from sdpo_kernels.stepwise.starter.letters import Problem


def exactly_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> torch.Tensor:
    """Bool [problems]: whether the greedy answer is exactly the right one."""
    answers = write_answers(model, tokenizer, [problem.prompt for problem in problems])
    return torch.tensor([answer == problem.answer for answer, problem in zip(answers, problems, strict=True)])


def pair_gammas(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[dict[str, str]]
) -> torch.Tensor:
    """Float32 [pairs]: log-probability of the chosen answer minus that of the rejected one; above 0 is ranked right."""
    chosen, rejected = (
        answer_logps(model, tokenizer, [(pair["prompt"], pair[side]) for pair in pairs])
        for side in ("chosen", "rejected")
    )
    return chosen - rejected


@torch.no_grad()
def answer_logps(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]], batch_size: int = 256
) -> torch.Tensor:
    """Float32 [rows]: summed log-probability of each answer with its end token."""
    sums = []
    for start in range(0, len(rows), batch_size):
        ids, labels = answer_tensors(tokenizer, rows[start : start + batch_size])

        # logits at position t predict the token at t + 1
        logps = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        targets = labels[:, 1:]

        # -100 is no index: gather any token there, and drop it from the sum
        scored = targets != NOT_SCORED
        taken = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        sums.append((taken * scored).sum(1))

    return torch.cat(sums)


def difference(right: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) of `right` minus `other`, bool [n] each, paired by prompt."""
    gains = right.double() - other.double()
    return gains.mean().item(), 1.96 * gains.std().item() / math.sqrt(len(gains))
