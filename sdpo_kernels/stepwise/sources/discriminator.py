"""`discriminator` (D2PO, arXiv 2405.01511): a scorer labels the policy's samples and is itself kept up to date.

The judge gives few gold labels, and the scorer learns from them to label everything else. Its loss is
−log σ(R_w − R_l), `-logsigmoid(chosen - rejected)`. In the first stage it is the initial model with a new output layer;
each later stage continues with the scorer of the one before.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from sdpo_kernels.stepwise.common.files import empty_folder, publish_folder, remove_folder
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.models.load import release_memory
from sdpo_kernels.stepwise.settings.source import DiscriminatorSource
from sdpo_kernels.stepwise.sources.active import Question, annotate
from sdpo_kernels.stepwise.sources.context import PairRow, SourceContext, read_json_rows, write_rows
from sdpo_kernels.stepwise.sources.generation import sample
from sdpo_kernels.stepwise.sources.judges import best_and_worst, classify, encode, require_finite

GOLD, SCORER = "gold.jsonl", "scorer"


def make(ctx: SourceContext) -> list[PairRow]:
    """Generate one pair per prompt, labelled by the scorer.

    1. Sample completions of every prompt from the newest model.
    2. Ask the judge for `budget` gold labels, on the pairs whose scores are closest; at random in the first stage,
       which has no trained scorer yet.
    3. Train the scorer on all gold labels so far.
    4. Score all samples, and pair the best of each prompt with the worst.
    5. Keep gold labels and scorer with the stage, for the next one.
    """
    settings = ctx.settings
    assert isinstance(settings, DiscriminatorSource)

    groups = [list(dict.fromkeys(group)) for group in sample(ctx, settings.samples)]

    scorer = Discriminator(ctx, settings)
    gold = [] if ctx.before is None else read_json_rows(ctx.before / GOLD)
    scores = None if ctx.before is None else scorer.score(ctx.prompts, groups)
    gold += annotate(ctx, settings.judge, least_certain(ctx.prompts, groups, scores, settings.budget, ctx.seed("gold")))
    if not gold:
        return []  # nothing to train the scorer on
    scorer.train(gold, ctx.seed("scorer"))

    rows = []
    for row, texts, values in zip(ctx.prompts, groups, scorer.score(ctx.prompts, groups), strict=True):
        if (found := best_and_worst(texts, values)) is not None:
            rows.append(row.pair(texts[found[0]], texts[found[1]]))

    write_rows(ctx.folder / GOLD, gold)
    scorer.save(ctx.folder / SCORER)

    # free its memory before the stage loads its own models
    del scorer
    release_memory()
    return rows


def least_certain(
    prompts: Sequence[PromptRow],
    groups: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]] | None,
    budget: int,
    seed: int,
) -> list[Question]:
    """The `budget` pairs with the smallest |R₁ − R₂|, at most one per prompt; random pairs if `scores` is None."""
    draw = random.Random(seed)

    # at most one pair per prompt spreads the labels over the prompts
    closest: list[tuple[float, Question]] = []
    for place, (row, group) in enumerate(zip(prompts, groups, strict=True)):
        found = []
        for i, j in itertools.combinations(range(len(group)), 2):
            gap = draw.random() if scores is None else abs(scores[place][i] - scores[place][j])
            found.append((gap, Question(row, group[i], group[j])))
        if found:
            closest.append(min(found, key=lambda pair: pair[0]))

    return [question for _, question in sorted(closest, key=lambda pair: pair[0])[:budget]]


class Discriminator:
    """A sequence classifier with one output, trained as a Bradley–Terry model."""

    def __init__(self, ctx: SourceContext, settings: DiscriminatorSource) -> None:
        self.ctx, self.settings = ctx, settings
        release_memory()

        # a language model loaded as a classifier gets a randomly initialised output layer: seed it
        path = ctx.initial if ctx.before is None else str(ctx.before / SCORER)
        with torch.random.fork_rng():
            torch.manual_seed(ctx.seed("head"))
            self.model: Any = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, use_safetensors=True, dtype=torch.float32,
                trust_remote_code=ctx.scorer.config.trust_remote_code,
            )  # fmt: skip
        self.model.to(ctx.scorer.device)

    def _labelled(self, label: PairRow) -> PromptRow:
        """The prompt of a label, with what the chat template got."""
        options = {name: label.get(name) for name in ("tools", "chat_template_kwargs")}
        return PromptRow(label["prompt"], label, "", self.ctx.template_time, **options)

    def _ids(self, row: PromptRow, text: str) -> list[int]:
        return encode(row, text, self.ctx.tokenizer, self.ctx.scorer.config.max_length)

    def score(self, prompts: Sequence[PromptRow], groups: Sequence[Sequence[str]]) -> list[list[float]]:
        """A score for every completion, in the groups of their prompts."""
        self.model.eval()
        ids = [self._ids(row, text) for row, group in zip(prompts, groups, strict=True) for text in group]

        found: list[float] = []
        with torch.no_grad(), self.ctx.reporter.task(self.ctx.label("scorer's labels"), len(ids)) as task:
            for start in range(0, len(ids), self.ctx.scorer.batch_size):
                batch = ids[start : start + self.ctx.scorer.batch_size]
                found += classify(self.model, batch, self.ctx.tokenizer).float().tolist()
                task.update(len(found))

        flat = [(row, text) for row, group in zip(prompts, groups, strict=True) for text in group]
        remedy = "lower scorer_learning_rate"
        require_finite("source: the scorer", remedy, [row for row, _ in flat], [text for _, text in flat], found)

        # back from one flat list to one list per prompt
        scores = iter(found)
        return [[next(scores) for _ in group] for group in groups]

    def train(self, gold: Sequence[PairRow], seed: int) -> None:
        """Train for `scorer_epochs` epochs on all gold labels, by AdamW at a constant learning rate."""
        settings = self.settings
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.scorer_learning_rate, weight_decay=0.0)
        pairs = [
            [self._ids(row, _text(label[side])) for side in ("chosen", "rejected")]
            for label in gold
            for row in [self._labelled(label)]
        ]

        # its own generator for the order, so that the same labels give the same scorer
        order = random.Random(seed)
        self.model.train()
        total = settings.scorer_epochs * len(pairs)
        with torch.random.fork_rng(), self.ctx.reporter.task(self.ctx.label("scorer"), total) as task:
            torch.manual_seed(seed)
            for epoch in range(settings.scorer_epochs):
                shuffled = order.sample(pairs, len(pairs))
                for start in range(0, len(pairs), settings.scorer_batch_size):
                    batch = shuffled[start : start + settings.scorer_batch_size]

                    # one forward for both halves
                    ids = [chosen for chosen, _ in batch] + [rejected for _, rejected in batch]
                    chosen, rejected = classify(self.model, ids, self.ctx.tokenizer).chunk(2)
                    loss = -F.logsigmoid(chosen - rejected).mean()

                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    task.update(epoch * len(pairs) + start + len(batch), f"loss {loss.item():.3f}")

    def save(self, folder: Path) -> None:
        """Save weights and config; the folder appears in one rename."""
        staging = empty_folder(folder.with_name(f".{folder.name}.made"))
        self.model.save_pretrained(staging)
        remove_folder(folder)
        publish_folder(staging, folder)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[0]["content"])
