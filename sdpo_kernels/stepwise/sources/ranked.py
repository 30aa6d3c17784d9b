"""`ranked` (iLR-DPO, arXiv 2406.11817): the best of a prompt's samples is chosen, the worst rejected, by a reward."""

from __future__ import annotations

from sdpo_kernels.stepwise.settings.source import RankedSource
from sdpo_kernels.stepwise.sources.context import PairRow, SourceContext
from sdpo_kernels.stepwise.sources.generation import sample
from sdpo_kernels.stepwise.sources.judges import (
    VERDICTS,
    Judge,
    best_and_worst,
    code_version,
    function_judge,
    function_version,
    judge_groups,
    remembering,
    reward_model_judge,
)


def make(ctx: SourceContext) -> list[PairRow]:
    """Generate one pair per prompt.

    1. Sample completions of every prompt from the newest model.
    2. Score them with the judge, a function or a reward model; verdicts already on disk are reused.
    3. Pair the best of each prompt with the worst. A prompt whose samples all score alike gives no pair.
    """
    settings = ctx.settings
    assert isinstance(settings, RankedSource)

    groups = sample(ctx, settings.samples)

    # verdicts are kept under the judge's version, so that an edited judge is asked again
    judge = _judge(ctx, settings)
    version = code_version(settings.reward_model or "") if settings.judge is None else function_version(settings.judge)
    judge = remembering(judge, ctx.folder / VERDICTS, version)
    scores = judge_groups(judge, ctx.prompts, groups)

    rows = []
    for row, texts, values in zip(ctx.prompts, groups, scores, strict=True):
        if (found := best_and_worst(texts, values)) is not None:
            best, worst = found
            rows.append(row.pair(texts[best], texts[worst], score_chosen=values[best], score_rejected=values[worst]))
    return rows


def _judge(ctx: SourceContext, settings: RankedSource) -> Judge:
    if settings.judge is not None:
        return function_judge(settings.judge)
    assert settings.reward_model is not None
    config = ctx.scorer.config
    return reward_model_judge(
        settings.reward_model, ctx.scorer.device, config.max_length, ctx.scorer.batch_size, config.trust_remote_code
    )
