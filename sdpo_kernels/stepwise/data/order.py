"""How pairs are divided into stages, and the order of the stages.

The paper (arXiv 2403.19270, section 3) makes each data source a stage and sorts the stages by the fraction of pairs
that the initial model already ranks right, easiest first. The implicit reward cannot be used for that: while model and
reference are the same, it is 0 everywhere. So pairs are ranked by log-probs (summed or per token) or by an external
score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig

Score = Callable[[TokenizedPairs], Tensor]  # summed log-probs [n, 2] under the initial model


@dataclass(frozen=True)
class StageData:
    """The pairs of one stage, before or after ordering."""

    config: StageConfig
    tokens: TokenizedPairs
    where: list[str]  # 'file:line' of each pair
    scores: NDArray[np.float64] | None = None  # external score of each pair, chosen minus rejected
    accuracy: float | None = None  # fraction of pairs ranked right, if it was computed
    prompts: list[PromptRow] | None = None  # of a stage with generated pairs, which has none before it starts
    skipped: int = 0  # bad rows of its files, left out


def order_stages(config: RunConfig, stages: Sequence[StageData], score: Score) -> list[StageData]:
    """The stages in training order; `score` is called only if the order needs log-probs."""
    if config.order == "pair_accuracy":
        return _by_accuracy(config, stages, score)
    if config.order == "margin":
        return _tiers(config, stages[0], score)
    if config.order == "random":
        return _shuffled(stages, int(config.trainer["seed"]))
    return list(stages)


def scored_counts(tokens: TokenizedPairs) -> Tensor:
    """Number of scored tokens of each sequence, [n, 2]; the first token of a sequence is never scored."""
    return torch.from_numpy(tokens.scored)


def margins(config: RunConfig, tokens: TokenizedPairs, score: Score) -> NDArray[np.float64]:
    """Log-prob of chosen minus rejected, [n], under the initial model, summed or per token (`order_score`)."""
    logps = score(tokens).double()
    if config.order_score == "mean":
        logps = logps / scored_counts(tokens)
    return (logps[:, 0] - logps[:, 1]).numpy()


def _by_accuracy(config: RunConfig, stages: Sequence[StageData], score: Score) -> list[StageData]:
    ranked = []
    for stage in stages:
        # a tie counts as ranked wrong
        margin = stage.scores if stage.scores is not None else margins(config, stage.tokens, score)
        accuracy = float((margin > 0).mean())
        ranked.append(replace(stage, accuracy=accuracy))
    return sorted(ranked, key=lambda stage: -(stage.accuracy or 0.0))  # stable: ties keep their given order


def tier_name(stage: str, number: int) -> str:
    """The name of tier `number` (from 1) of a stage that is split."""
    return f"{stage}-{number}"


def _tiers(config: RunConfig, stage: StageData, score: Score) -> list[StageData]:
    """The pairs of one stage split into `config.tiers` stages of equal size, by falling margin."""
    assert config.tiers is not None
    if config.tiers > len(stage.tokens):
        raise UserError(f"tiers: was {config.tiers}, must be at most {len(stage.tokens)}, the number of pairs")

    margin = margins(config, stage.tokens, score)
    easiest_first = np.argsort(-margin, kind="stable")
    tiers = []
    for number, members in enumerate(np.array_split(easiest_first, config.tiers), 1):
        named = stage.config.model_copy(update={"name": tier_name(stage.config.name, number)})

        # within a tier the pairs keep their given order
        chosen = np.sort(members)
        accuracy = float((margin[chosen] > 0).mean())

        # pairs dropped and rows skipped before the split belong to no tier; the first one counts them, once
        dropped_from, skipped = (stage.tokens, stage.skipped) if number == 1 else (None, 0)
        tiers.append(StageData(named, *_take(stage, chosen, dropped_from), accuracy=accuracy, skipped=skipped))
    return tiers


def _shuffled(stages: Sequence[StageData], seed: int) -> list[StageData]:
    """All pairs dealt out to the stages at random; every stage keeps its size."""
    pool = StageData(
        stages[0].config,
        TokenizedPairs.concatenate([stage.tokens for stage in stages]),
        [where for stage in stages for where in stage.where],
    )

    # the seed of the run decides, so that a resumed run deals the same pairs
    dealt = np.random.default_rng(seed).permutation(len(pool.tokens))
    borders = np.cumsum([len(stage.tokens) for stage in stages])[:-1]
    hands = np.split(dealt, borders)

    return [
        StageData(stage.config, *_take(pool, hand, stage.tokens), skipped=stage.skipped)
        for stage, hand in zip(stages, hands, strict=True)
    ]


def _take(
    stage: StageData, indices: NDArray[np.int64], dropped_from: TokenizedPairs | None
) -> tuple[TokenizedPairs, list[str]]:
    return stage.tokens.take(indices, dropped_from), [stage.where[i] for i in indices]
