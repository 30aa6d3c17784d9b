"""Everything a run reads and tries before it trains. Whatever is wrong with it is reported here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sdpo_kernels.integrations.router_loss import unused_coefficient
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.common.units import counted
from sdpo_kernels.stepwise.data.fit import check_fit, check_positions, load_model_config, position_warnings
from sdpo_kernels.stepwise.data.formats import format_messages
from sdpo_kernels.stepwise.data.order import StageData, tier_name
from sdpo_kernels.stepwise.data.pairs import Pair, PairSource, read_pairs, refuse_bad_rows, shared_pairs
from sdpo_kernels.stepwise.data.prompts import PromptRow, read_prompts
from sdpo_kernels.stepwise.data.render import RowError
from sdpo_kernels.stepwise.data.schedule import Schedule
from sdpo_kernels.stepwise.data.sources import given_sources, pair_sources
from sdpo_kernels.stepwise.data.suggestions import PROMPT_NAMES, SYSTEM_NAMES
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs, tokenize_pairs
from sdpo_kernels.stepwise.models.load import load_tokenizer
from sdpo_kernels.stepwise.models.trial import try_run
from sdpo_kernels.stepwise.references.others import check_others
from sdpo_kernels.stepwise.references.shared_cache import check_cache_folder
from sdpo_kernels.stepwise.settings.columns import DataEntry, entry_path
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig
from sdpo_kernels.stepwise.settings.trainer import LARGEST
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from sdpo_kernels.stepwise.sources.make import check_generation, check_source

_CUT_NOTED = 0.01  # share of the pairs or scored tokens that truncation may cut without a warning


@dataclass
class Prepared:
    """A run's input, read and checked; the stages are in the order of the config."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    model_config: Any
    stages: list[StageData]
    eval_tokens: TokenizedPairs | None
    template_time: datetime | None = None  # what chat templates read as now; None: the machine's clock
    notes: list[str] = field(default_factory=list)  # what needs no warning
    skipped: list[str] = field(default_factory=list)  # bad rows, 'file:line: what is wrong', with on_bad_row: skip
    warnings: list[str] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)  # source → columns that nothing reads
    reporter: Reporter = field(default_factory=lambda: Reporter(quiet=True))  # shows what is going on

    def say_warnings(self, reporter: Reporter) -> None:
        """Print what the user should know before training."""
        for message in dict.fromkeys(self.warnings):  # of a file that two stages share, some are the same
            reporter.warn(message)
        if self.skipped:
            reporter.warn(f"{counted(len(self.skipped), 'bad row')} skipped, the first: {self.skipped[0]}")

    def say_notes(self, reporter: Reporter) -> None:
        """Print what needs no warning."""
        for note in dict.fromkeys(self.notes):
            reporter.say(f"note       {note}")

    def skip(self, rows: Sequence[str]) -> int:
        """Add bad rows, each once even if several stages share its file; how many there are in this part."""
        self.skipped = list(dict.fromkeys([*self.skipped, *rows]))
        return len(rows)


def prepare(
    config: RunConfig,
    template_time: datetime | None = None,
    reporter: Reporter | None = None,
    *,
    elsewhere: bool = False,
) -> Prepared:
    """Read and tokenize all data of a run, with `template_time` as the time that chat templates read (None: now).

    1. Load the tokenizer and the model's config, but no weights.
    2. For each stage read its pairs and tokenize them, or read the prompts it will generate pairs from.
    3. Do the same with the evaluation pairs.
    4. Check that model and further references can take the tokens.
    5. Try what training will need later: the adapter, saving, Trainer's own parts, disk space (`models/trial.py`).
    6. Collect warnings about pairs and prompts that stages share, or that are evaluated too.

    `reporter` shows what is going on; `elsewhere`: the run is planned for another machine (`try_run`). UserError for
    whatever the user can fix. On several ranks each reads everything.
    """
    prepared = _started(config, template_time, reporter)

    named: dict[str, list[Pair]] = {}  # by stage, and "eval_data"
    for stage in config.stages:
        if stage.data is None:
            prepared.stages.append(_prompts(config, stage, prepared))
            continue
        pairs, skipped = _read(config, pair_sources(config, stage.data, stage), f"stage {stage.name}", prepared)
        named[stage.name] = pairs
        tokens = _tokenize(config, pairs, f"stage {stage.name}", prepared)
        prepared.stages.append(_stage_data(stage, pairs, tokens, skipped))

    if config.eval_data is not None:
        named["eval_data"], _ = _read(config, pair_sources(config, config.eval_data), "eval_data", prepared)
        prepared.eval_tokens = _tokenize(config, named["eval_data"], "eval_data", prepared)

    # generated pairs are checked when they are there
    parts = [stage.tokens for stage in prepared.stages if stage.prompts is None]
    parts += [] if prepared.eval_tokens is None else [prepared.eval_tokens]
    check_fit(config, prepared.model_config, parts)
    check_others(config, prepared.tokenizer, parts)
    check_cache_folder(config)
    prepared.warnings += position_warnings(prepared.model_config, parts)

    # what would stop the run hours later stops it now
    with prepared.reporter.waiting("trying what training needs: model, saving, trainer, disk space"):
        prepared.warnings += try_run(config, prepared.tokenizer, prepared.model_config, elsewhere=elsewhere)
    for data in prepared.stages:
        _check_steps(config, data)

    # no error: a user may want them
    if warning := unused_coefficient(prepared.model_config):
        prepared.warnings.append(f"model: {warning}")
    _note_formats(prepared, named)
    prepared.warnings += shared_pairs(named)
    prepared.warnings += _shared_prompts(prepared.stages, named.get("eval_data", []))
    return prepared


def read_eval(
    config: RunConfig,
    sources: Sequence[str | DataEntry],
    template_time: datetime | None = None,
    columns_go: str = "columns={}",
    reporter: Reporter | None = None,
) -> tuple[TokenizedPairs, list[str], PreTrainedTokenizerBase]:
    """The tokenized pairs of `sources`, warnings about them, and the tokenizer.

    `columns_go` says where the command takes the columns of a file, {}, that an error suggests.
    """
    prepared = _started(config, template_time, reporter)
    name = ", ".join(map(entry_path, sources))
    try:
        pairs, _ = _read(config, given_sources(config, sources), name, prepared)
    except UserError as error:
        line = re.search(r"Name its columns? with columns: (\{.*?\})", str(error))
        raise (UserError(f"{error}; {columns_go.format(line[1])}") if line else error) from None

    tokens = _tokenize(config, pairs, name, prepared)
    check_fit(config, prepared.model_config, [tokens])

    # plain text beside a chat template is no advice for scoring; both in one file may be a mistake
    prepared.warnings += format_messages({name: pairs}, has_template=bool(prepared.tokenizer.chat_template))[1]
    return tokens, prepared.warnings + prepared.notes + prepared.skipped, prepared.tokenizer


def generated_stage(
    config: RunConfig,
    stage: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    reporter: Reporter,
    template_time: datetime,
) -> StageData:
    """A stage whose generated pairs are in `path`; prints warnings about them."""
    prepared = Prepared(config, tokenizer, load_model_config(config), [], None, template_time, reporter=reporter)
    pairs, skipped = _read(config, [PairSource(str(path))], f"stage {stage.name}", prepared)
    tokens = _tokenize(config, pairs, f"stage {stage.name}", prepared)
    check_fit(config, prepared.model_config, [tokens])
    prepared.say_warnings(reporter)
    return _stage_data(stage, pairs, tokens, skipped)


def _started(config: RunConfig, template_time: datetime | None, reporter: Reporter | None) -> Prepared:
    """Tokenizer and model config loaded, and no data read yet."""
    reporter = reporter or Reporter(quiet=True)
    with reporter.waiting(f"loading the tokenizer of {config.model}"):
        tokenizer, model_config = load_tokenizer(config), load_model_config(config)
    return Prepared(config, tokenizer, model_config, [], None, template_time, reporter=reporter)


def schedules_of(config: RunConfig, stage: StageData, processes: int | None = None) -> dict[str, Schedule]:
    """The steps of a stage and the pairs they train on, by its name; of a stage that will be split, of each tier.

    `processes` is how many work on different pairs, by default those of this run.
    """
    processes = processes or ranks.data_world_size()
    folder, name, count = Path(config.output_dir), stage.config.name, len(stage.tokens)
    sizes = {name: count}
    if config.tiers is not None:
        parts = np.array_split(np.arange(count), config.tiers)
        sizes = {tier_name(name, number): len(part) for number, part in enumerate(parts, 1)}

    args = training_arguments(config, stage.config, folder, folder)
    return {name: Schedule.of(size, args, processes) for name, size in sizes.items()}


def _check_steps(config: RunConfig, stage: StageData) -> None:
    """UserError if `epochs` makes more steps than `max_steps` may be: the run would never end."""
    steps = max(schedule.steps for schedule in schedules_of(config, stage).values())
    if steps > LARGEST:
        raise UserError(
            f"stage {stage.config.name}: epochs: was {stage.config.epochs:g}, which is {steps:.3g} steps, must be at "
            f"most {LARGEST:,} steps"
        )


def _prompts(config: RunConfig, stage: StageConfig, prepared: Prepared) -> StageData:
    """A stage that will generate its pairs: its prompts, checked as far as possible without a model."""
    assert stage.prompts is not None
    assert stage.source is not None
    sources = pair_sources(config, stage.prompts, stage)
    with prepared.reporter.waiting(f"reading the prompts of stage {stage.name}"):
        prompts, unread = read_prompts(sources, config.on_bad_row, prepared.template_time)

    # a missing judge or answer is reported now, not when the stage starts hours later
    try:
        warnings = check_source(stage.source, prompts, config.trust_remote_code)
        answers, more = check_generation(config, stage, prompts)
        prepared.warnings += [f"stage {stage.name}: source: {warning}" for warning in warnings + more]
    except UserError as error:
        raise UserError(f"stage {stage.name}: source: {error}") from error
    if answers is not None:
        prepared.notes.append(f"stage {stage.name}: {answers}")

    chat = next((row for row in prompts if row.is_conversational), None)
    if chat is not None and not prepared.tokenizer.chat_template:
        raise UserError(f"{chat.where}: is a conversation, but the tokenizer has no chat template")

    prompts, lengths, refused = _rendered_prompts(config, prompts, prepared)
    skipped = prepared.skip([*unread, *refused])

    # prompt and generated answer together must fit the model's positions
    check_positions(config, prepared.model_config, max(lengths) + stage.source.max_new_tokens, f"stage {stage.name}")
    prepared.warnings += _long_prompts(config, stage, lengths)
    return StageData(stage, TokenizedPairs.concatenate([]), [], prompts=prompts, skipped=skipped)


def _long_prompts(config: RunConfig, stage: StageConfig, lengths: Sequence[int]) -> list[str]:
    """Warnings if `max_length` cuts prompts, or answers that a source may generate; `lengths` are the prompts'."""
    assert stage.source is not None
    of_all, warnings = f"of {counted(len(lengths), 'prompt')}", []
    if alone := sum(length >= config.max_length for length in lengths):
        warnings.append(f"stage {stage.name}: {alone:,} {of_all} alone reach max_length ({config.max_length})")

    # a rewritten answer is about as long as the one in the file
    most = 0 if stage.source.kind == "self_augmented" else stage.source.max_new_tokens
    if cut := sum(length + most > config.max_length for length in lengths) if most else 0:
        warnings.append(
            f"stage {stage.name}: {cut:,} {of_all} exceed max_length ({config.max_length}) with max_new_tokens "
            f"({most}): what is longer is cut before it is trained on; a max_length of {max(lengths) + most} keeps all"
        )
    return warnings


def _rendered_prompts(
    config: RunConfig, prompts: Sequence[PromptRow], prepared: Prepared
) -> tuple[list[PromptRow], list[int], list[str]]:
    """The prompts that the chat template can render, their lengths in tokens, and what is wrong with the others."""
    good: list[PromptRow] = []
    lengths: list[int] = []
    bad: list[str] = []
    for row in prompts:
        try:
            lengths.append(len(row.ids(prepared.tokenizer)))
        except RowError as error:
            bad.append(str(error))
        else:
            good.append(row)

    if config.on_bad_row == "error":
        refuse_bad_rows(bad, len(prompts))
    if not good:
        raise UserError(f"the chat template can render none of {counted(len(prompts), 'prompt')}; the first: {bad[0]}")
    return good, lengths, bad


def _shared_prompts(stages: Sequence[StageData], evaluated: Sequence[Pair]) -> list[str]:
    """A warning for each stage that generates pairs from prompts of the evaluation data."""
    asked = {json.dumps(pair.prompt) for pair in evaluated}
    counts = {stage.config.name: len(asked & {json.dumps(r.prompt) for r in stage.prompts or []}) for stage in stages}
    return [
        f"{count} of eval_data's {len(asked)} different prompts are prompts of stage {name!r} too: evaluation "
        "scores will be too optimistic"
        for name, count in counts.items()
        if count
    ]


def _note_formats(prepared: Prepared, named: Mapping[str, list[Pair]]) -> None:
    """Say which rows are plain text and which are conversations, where that may not be meant."""
    parts: dict[str, list[Pair] | list[PromptRow]] = {
        f"stage {stage.config.name}": stage.prompts for stage in prepared.stages if stage.prompts is not None
    }
    stages = {stage.config.name for stage in prepared.stages}
    parts |= {f"stage {name}" if name in stages else name: pairs for name, pairs in named.items()}
    notes, warnings = format_messages(parts, has_template=bool(prepared.tokenizer.chat_template))
    prepared.notes += notes
    prepared.warnings += warnings


def _read(config: RunConfig, sources: Sequence[PairSource], name: str, prepared: Prepared) -> tuple[list[Pair], int]:
    """The pairs of `sources`, and how many bad rows were skipped."""
    with prepared.reporter.waiting(f"reading {name}"):
        data = read_pairs(sources, on_bad_row=config.on_bad_row, score_column=config.score_column)
    skipped = prepared.skip(data.skipped)

    # a column that sounds like a part of the prompt is worth a warning; an id or a source is not
    warned = {*PROMPT_NAMES, *SYSTEM_NAMES}
    others = {source: [name for name in names if name not in warned] for source, names in data.unused.items()}
    prepared.unused |= {source: names for source, names in others.items() if names}
    prepared.notes += [
        f"{source}: has none of the columns that the run's columns name, and is read by TRL's names"
        for source in data.own_names
    ]
    prepared.notes += [
        f"{source}: nulls in the arguments of tool calls of {counted(count, 'row')} are left out (docs/data.md)"
        for source, count in data.nulls.items()
    ]
    prepared.warnings += [
        f"{source}: the column {name!r} is not used; if it is part of the prompt, name it in columns"
        for source, names in data.unused.items()
        for name in names
        if name in warned
    ]
    if not data.pairs:
        paths = ", ".join(source.path for source in sources)
        raise UserError(f"{paths}: no pair is left; skipped: {counted(skipped, 'bad row')}")
    return data.pairs, skipped


def _tokenize(config: RunConfig, pairs: list[Pair], name: str, prepared: Prepared) -> TokenizedPairs:
    with prepared.reporter.task(f"tokenizing {name}", len(pairs), keep=False) as task:
        tokens = tokenize_pairs(
            pairs,
            prepared.tokenizer,
            max_length=config.max_length,
            truncation=config.truncation,
            on_bad_row=config.on_bad_row,
            template_time=prepared.template_time,
            on_progress=task.update,
        )
    prepared.warnings += [f"{name}: {warning}" for warning in tokens.warnings]
    _note_truncation(config, tokens, name, prepared)
    if tokens.dropped:
        prepared.warnings.append(
            f"{name}: {len(tokens.dropped)} of {len(pairs)} pairs dropped, the first: {tokens.dropped[0]}"
        )
    return tokens


def _note_truncation(config: RunConfig, tokens: TokenizedPairs, name: str, prepared: Prepared) -> None:
    """Say how much truncation cuts: a warning if it is more than `_CUT_NOTED` of the pairs or of the scored tokens."""
    if not tokens.cut_pairs:
        return

    total = len(tokens) + len(tokens.dropped)
    share = tokens.lost_tokens / tokens.whole_tokens
    text = (
        f"{name}: max_length {config.max_length} cuts {tokens.cut_pairs:,} of {total:,} pairs, which lose "
        f"{tokens.lost_tokens:,} of {tokens.whole_tokens:,} scored tokens ({share:.1%})"
    )
    if max(share, tokens.cut_pairs / total) > _CUT_NOTED:
        prepared.warnings.append(f"{text}; raise max_length to keep them")
    else:
        prepared.notes.append(text)


def _stage_data(stage: StageConfig, pairs: list[Pair], tokens: TokenizedPairs, skipped: int) -> StageData:
    # external scores stay with their pairs when others are dropped
    kept = [pairs[i] for i in tokens.kept]
    scores = [pair.score for pair in kept]
    external = np.array(scores, dtype=np.float64) if all(score is not None for score in scores) else None
    return StageData(stage, tokens, [pair.where for pair in kept], external, skipped=skipped)
