"""From prompts to a stage's pairs: the source of its kind makes them, and they are kept as JSONL beside the stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.settings.source import ActiveSource, DiscriminatorSource, ExecutionSource, RankedSource
from sdpo_kernels.stepwise.sources import active, discriminator, execution, ranked, self_augmented
from sdpo_kernels.stepwise.sources.context import PairRow, SourceContext, write_rows
from sdpo_kernels.stepwise.sources.judges import check_reward_model, function_judge
from sdpo_kernels.stepwise.state import Stage

PAIRS_FILE = "pairs.jsonl"  # in a stage's folder
SOURCE_FOLDER = "source"  # beside it: samples, labels, scorers

# one function a kind, from a stage's context to rows of prompt, chosen and rejected
MAKERS: dict[str, Callable[[SourceContext], list[PairRow]]] = {
    "ranked": ranked.make,
    "execution": execution.make,
    "discriminator": discriminator.make,
    "self_augmented": self_augmented.make,
    "active": active.make,
}


def check_source(settings: object, prompts: list[PromptRow], trust_remote_code: bool) -> None:
    """UserError for what can be known before training: a judge that is not there, a row without an answer."""
    if isinstance(settings, (RankedSource, DiscriminatorSource, ActiveSource)) and settings.judge is not None:
        function_judge(settings.judge)
    elif isinstance(settings, ExecutionSource):
        execution.judge_of(settings).check()
    elif isinstance(settings, RankedSource) and settings.reward_model is not None:
        check_reward_model(settings.reward_model, trust_remote_code)
    else:
        for row in prompts:
            self_augmented.answer(row)


def stage_context(stage: Stage) -> SourceContext:
    """What the source of a stage that has prompts works with."""
    config, settings, prompts = stage.run.config, stage.data.config.source, stage.data.prompts
    assert settings is not None
    assert prompts is not None

    # a source of several stages may carry samples or a scorer over from its last finished one
    earlier = [
        stage.run.stage_folder(index) / SOURCE_FOLDER
        for index, other in enumerate(config.stages[: stage.index - 1], 1)
        if other.source is not None and other.source.kind == settings.kind
    ]
    return SourceContext(
        name=stage.name,
        settings=settings,
        prompts=prompts,
        policy=stage.model_before("previous"),
        initial=config.model,
        beta=config.stage_beta(stage.data.config),
        folder=stage.work / SOURCE_FOLDER,
        before=earlier[-1] if earlier else None,
        tokenizer=stage.run.tokenizer,
        scorer=stage.scorer,
        reporter=stage.run.reporter,
    )


def make_pairs(ctx: SourceContext, kind: str, path: Path) -> None:
    """Write the stage's pairs to `path`, unless they are there. UserError if the prompts gave none."""
    if path.exists():
        return
    ctx.folder.mkdir(parents=True, exist_ok=True)
    rows = MAKERS[kind](ctx)
    if not rows:
        raise UserError(
            f"stage {ctx.name}: source {kind}: no pair came of {len(ctx.prompts)} prompts; their samples are all alike "
            "to the judge, or did not end within max_new_tokens"
        )
    write_rows(path, rows)
    ctx.reporter.say(f"{ctx.name}: {len(rows):,} pairs made of {len(ctx.prompts):,} prompts")
