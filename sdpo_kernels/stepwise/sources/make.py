"""From prompts to a stage's pairs: the source of its kind makes them, and they are kept as JSONL beside the stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdpo_kernels.stepwise.errors import UserError
from sdpo_kernels.stepwise.source_settings import ActiveSource, DiscriminatorSource, ExecutionSource, RankedSource
from sdpo_kernels.stepwise.sources import active, discriminator, execution, ranked, self_augmented
from sdpo_kernels.stepwise.sources.context import PairRow, SourceContext, write_rows
from sdpo_kernels.stepwise.sources.judges import check_reward_model, function_judge
from sdpo_kernels.stepwise.sources.prompts import PromptRow

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


def check_source(settings: object, prompts: list[PromptRow], trust_remote_code: bool) -> list[str]:
    """Warnings about a source. UserError for what can be known before training: a missing judge, bubblewrap, answer."""
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


def make_pairs(ctx: SourceContext, kind: str, path: Path) -> None:
    """Write the stage's pairs to `path`, where they are not there yet. UserError where none could be made."""
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
