"""`active` (APL, arXiv 2402.08114): ask the judge for labels where they are most informative.

The first round asks about random prompts. Later rounds rank the prompts not asked about yet by the policy's predictive
entropy −(1/N)·Σ log π(y_n | x), `-mean(logps)`, over N samples, keep the highest, and of these ask about the pairs with
the largest |r̂₁ − r̂₂|, r̂ = β·log(π/π₀), `beta * (logps - initial_logps)`. A stage trains on all labels so far, from the
initial model and with a fresh optimiser.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.data.tokenize import tokenize_pairs
from sdpo_kernels.stepwise.settings.source import ActiveSource
from sdpo_kernels.stepwise.sources.context import PairRow, SourceContext, read_json_rows, write_rows
from sdpo_kernels.stepwise.sources.generation import sample
from sdpo_kernels.stepwise.sources.judges import VERDICTS, function_judge, function_version, remembering

LABELS, ASKED = "labels.jsonl", "asked.jsonl"


class Question(NamedTuple):
    """Two answers to a prompt, for the judge to compare."""

    row: PromptRow
    first: str
    second: str


def make(ctx: SourceContext) -> list[PairRow]:
    """Return all labelled pairs so far.

    1. Read the labels of the last stage with this source, and the prompts it asked about.
    2. Choose the questions of this round: at random in the first one, the most informative ones later.
    3. Let the judge label them.
    4. Keep the questions and all labels for the next stage.
    """
    settings = ctx.settings
    assert isinstance(settings, ActiveSource)

    known = [] if ctx.before is None else read_json_rows(ctx.before / LABELS)
    before = [] if ctx.before is None else read_json_rows(ctx.before / ASKED)
    # a prompt whose answers tied has no label, but is not asked about again
    asked = {str(row["prompt"]) for row in before}
    open_rows = [row for row in ctx.prompts if str(row.prompt) not in asked]

    if ctx.before is None:
        chosen = random.Random(ctx.seed("prompts")).sample(open_rows, min(settings.acquire, len(open_rows)))
        questions = _first_questions(replace(ctx, prompts=chosen), settings)
    else:
        questions = _later_questions(replace(ctx, prompts=open_rows), settings)

    labels = known + annotate(ctx, settings.judge, questions)

    write_rows(ctx.folder / ASKED, before + [{"prompt": question.row.prompt} for question in questions])
    write_rows(ctx.folder / LABELS, labels)
    return labels


def annotate(ctx: SourceContext, judge: str, questions: Sequence[Question]) -> list[PairRow]:
    """Pairs with the better answer as chosen; no pair where the judge scores both alike."""
    # one call of the judge for all answers, two per question
    rows = [question.row for question in questions for _ in range(2)]
    function = function_judge(judge)
    asked = remembering(function, ctx.folder / VERDICTS, function_version(judge))
    scores = asked(rows, [text for q in questions for text in (q.first, q.second)])

    labels = []
    for question, first, second in zip(questions, scores[::2], scores[1::2], strict=True):
        if first != second:
            texts = (question.first, question.second) if first > second else (question.second, question.first)
            labels.append(question.row.pair(*texts))
    return labels


def _first_questions(ctx: SourceContext, settings: ActiveSource) -> list[Question]:
    groups = [list(dict.fromkeys(group)) for group in sample(ctx, settings.samples)]
    return [Question(row, *group[:2]) for row, group in zip(ctx.prompts, groups, strict=True) if len(group) > 1]


def _later_questions(ctx: SourceContext, settings: ActiveSource) -> list[Question]:
    """The most informative questions.

    1. Sample answers of every prompt not asked about yet, and score them under the policy and the initial model.
    2. Compute each prompt's predictive entropy, and find its pair of answers with the largest reward gap.
    3. Keep the `keep_prompts * acquire` prompts of highest entropy, and of these the `acquire` largest gaps.
    """
    groups = sample(ctx, settings.samples)

    # the scorer takes pairs: of an odd number of samples, the last one is paired with the first
    pairs, places = [], []
    for place, (row, group) in enumerate(zip(ctx.prompts, groups, strict=True)):
        for first, second in itertools.zip_longest(group[::2], group[1::2]):
            pairs.append(Question(row, first, group[0] if second is None else second))
            places.append((place, second is None))
    policy, initial = (score_answers(ctx, pairs, path) for path in (ctx.policy, ctx.initial))

    # the partner of an odd sample is already counted in its own pair
    entropy = [0.0] * len(groups)
    best: list[tuple[float, Question] | None] = [None] * len(groups)
    rewards = ctx.beta * (policy - initial)
    for (place, odd), question, logps, reward in zip(places, pairs, policy, rewards, strict=True):
        entropy[place] -= float(logps[0] if odd else logps.sum()) / len(groups[place])
        gap = abs(float(reward[0] - reward[1]))
        if question.first != question.second and (best[place] is None or gap > best[place][0]):  # type: ignore[index]
            best[place] = (gap, question)

    kept = sorted(range(len(groups)), key=lambda place: -entropy[place])
    kept = kept[: math.ceil(settings.keep_prompts * settings.acquire)]
    found = sorted((b for place in kept if (b := best[place]) is not None), key=lambda b: -b[0])
    return [question for _, question in found[: settings.acquire]]


def score_answers(ctx: SourceContext, questions: Sequence[Question], model: str) -> Tensor:
    """Summed log-probs [n, 2] float64 of both answers under `model`; 0 where truncation leaves nothing to score."""
    # some losses weight tokens; entropy and rewards need plain sums
    config = ctx.scorer.config.model_copy(update={"loss": "sigmoid", "loss_options": {}})
    scorer = replace(ctx.scorer, config=config)

    pairs = [q.row.pair_of(q.first, q.second) for q in questions]
    # equal answers too, because the last of an odd number of samples may be paired with itself
    tokens = tokenize_pairs(
        pairs,
        ctx.tokenizer,
        max_length=config.max_length,
        truncation=config.truncation,
        drop_equal=False,
        on_bad_row="skip",  # an answer that the chat template refuses counts like one with nothing to score
        template_time=ctx.template_time,
    )

    scores = torch.zeros((len(questions), 2), dtype=torch.float64)
    scores[torch.from_numpy(tokens.kept)] = scorer.score_path(model, tokens, ctx.label("log-probs")).double()
    return scores
