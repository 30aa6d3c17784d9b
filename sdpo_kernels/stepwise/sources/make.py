"""From prompts to a stage's generated pairs, kept as JSONL in the stage's folder; `kind` selects the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.units import counted
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig
from sdpo_kernels.stepwise.settings.source import (
    ActiveSource,
    DiscriminatorSource,
    ExecutionSource,
    RankedSource,
    SelfAugmentedSource,
)
from sdpo_kernels.stepwise.sources import active, discriminator, execution, ranked, self_augmented
from sdpo_kernels.stepwise.sources.context import PairRow, SourceContext, write_rows
from sdpo_kernels.stepwise.sources.engine_url import check_url
from sdpo_kernels.stepwise.sources.engine_vllm import check_adapter, check_vllm
from sdpo_kernels.stepwise.sources.judges import check_reward_model, function_judge
from sdpo_kernels.stepwise.state import Stage

SOURCE_FOLDER = "source"  # next to it: samples, labels, scorers

# one function per kind, from a stage's context to rows of prompt, chosen and rejected
MAKERS: dict[str, Callable[[SourceContext], list[PairRow]]] = {
    "ranked": ranked.make,
    "execution": execution.make,
    "discriminator": discriminator.make,
    "self_augmented": self_augmented.make,
    "active": active.make,
}


def check_source(settings: object, prompts: list[PromptRow], trust_remote_code: bool) -> list[str]:
    """Warnings about a source. UserError before training: a missing judge, reward model, answer or bubblewrap."""
    if isinstance(settings, (RankedSource, DiscriminatorSource, ActiveSource)) and settings.judge is not None:
        function_judge(settings.judge)
    elif isinstance(settings, ExecutionSource):
        execution.judge_of(settings).check()
        return [execution.UNSAFE_WARNING] if settings.unsafe else []
    elif isinstance(settings, RankedSource) and settings.reward_model is not None:
        check_reward_model(settings.reward_model, trust_remote_code)
    else:
        for row in prompts:
            self_augmented.answer(row)
    return []


def check_generation(config: RunConfig, stage: StageConfig, prompts: list[PromptRow]) -> tuple[str | None, list[str]]:
    """What answers a stage's prompts, if it is not transformers, and warnings about it. UserError if it cannot.

    Only rank 0 looks: it alone will ask, and only its node may have vLLM or reach the server.
    """
    assert stage.source is not None
    settings = stage.source.generation
    if settings.engine == "transformers" or not ranks.launched_first():
        return None, []
    if settings.engine == "url":
        return check_url(settings, prompts)
    check_vllm(settings)
    check_adapter(config, stage)
    return "answers are sampled from the policy by vLLM, in a process of its own", []


def stage_context(stage: Stage) -> SourceContext:
    """The context of the source of a stage that has prompts."""
    config, settings, prompts = stage.run.config, stage.data.config.source, stage.data.prompts
    assert settings is not None
    assert prompts is not None

    # stages with the same kind of source share state: labels, a buffer or a scorer go from one to the next
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
        template_time=stage.run.template_time,
        title=stage.label,
    )


def make_pairs(ctx: SourceContext, kind: str, path: Path) -> None:
    """Write the stage's generated pairs to `path`, unless it exists. UserError if the prompts gave no pair."""
    if path.exists():
        return

    ctx.folder.mkdir(parents=True, exist_ok=True)
    with ctx.reporter.waiting(ctx.label(f"generating pairs ({kind})")):
        rows = MAKERS[kind](ctx)
    if not rows:
        raise UserError(
            f"stage {ctx.name}: source {kind}: no pairs from {counted(len(ctx.prompts), 'prompt')}; {_why(ctx)}"
        )

    # the file is written last and in one step: if it exists, it is complete
    write_rows(path, rows)
    made, asked = counted(len(rows), "pair"), counted(len(ctx.prompts), "prompt")
    ctx.reporter.say(ctx.label(f"{made} generated from {asked}"))


def _why(ctx: SourceContext) -> str:
    """Why a source that has run gave no pair, and what to change."""
    if isinstance(ctx.settings, SelfAugmentedSource):
        return "every rewritten segment was like the answer's own; raise temperature or segment_tokens"

    drawn, lost, limit = ctx.samples["drawn"], ctx.samples["left out"], ctx.settings.max_new_tokens
    cut = f"{lost:,} of {counted(drawn, 'sample')} did not end within max_new_tokens ({limit}), or were empty: raise it"
    alike = "no two samples of a prompt differ in the judge's score: correct the judge, or raise samples or temperature"
    if isinstance(ctx.settings, ExecutionSource):
        alike = "of each prompt all samples pass, or none: correct command, or raise samples or temperature"
    if lost == drawn:
        return cut
    return f"{cut}; of the others, {alike}" if lost else alike
