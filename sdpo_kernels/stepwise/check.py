"""`sdpo check`: read everything a run reads, and print what it would do, without training."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from sdpo_kernels.integrations.attention_by_sequence import PACKED
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import read_json
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.common.units import counted, write_part
from sdpo_kernels.stepwise.data.batches import shared_tokens
from sdpo_kernels.stepwise.data.order import scored_counts
from sdpo_kernels.stepwise.data.schedule import Schedule
from sdpo_kernels.stepwise.data.template_clock import reads_clock
from sdpo_kernels.stepwise.memory.of_run import NotPlanned, PlannedRun, plan_run
from sdpo_kernels.stepwise.memory.table import plan_lines
from sdpo_kernels.stepwise.memory.target import Target
from sdpo_kernels.stepwise.post.after_run import check_start
from sdpo_kernels.stepwise.prepare import Prepared, prepare, schedules_of
from sdpo_kernels.stepwise.record.changes import FILES, processes_of, refused_settings
from sdpo_kernels.stepwise.record.environment import run_backend
from sdpo_kernels.stepwise.record.expo_record import FOLDER
from sdpo_kernels.stepwise.record.manifest import different_settings
from sdpo_kernels.stepwise.record.template_time import template_time
from sdpo_kernels.stepwise.references.shared_cache import cache_line
from sdpo_kernels.stepwise.settings.reference import EmaSettings
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_files import trainer_files

_ORDERS = {
    "given": "the order of the file",
    "pair_accuracy": "share of pairs ranked right by {ranks}, highest first; decided when training starts",
    "margin": "one source split into {tiers} tiers, largest margin under the initial model first",
    "random": "all pairs shuffled into stages of these sizes",
}


def check_run(config: RunConfig, reporter: Reporter, target: Target | None = None) -> None:
    """Print what `sdpo train` would do. Writes nothing. With a `target` steps and memory plan are those of its GPUs.

    1. Read all input and try what training will need, as a run does.
    2. Print warnings, the table of stages, the main settings and the memory plan.
    3. Compare the config with that of the run in output_dir, if there is one.

    UserError for whatever would stop the run before training.
    """
    # the post-step first, as in a run: it needs no data
    check_start(config)
    now = template_time(config)
    prepared = prepare(config, now, reporter, elsewhere=target is not None)

    prepared.say_warnings(reporter)
    for line in prepared.skipped:
        reporter.say(f"skipped  {line}")
    processes = (ranks.launched() if target is None else target.gpus) // config.tp_size or 1
    reporter.say(_table(prepared, processes))
    for line in _unused(prepared.unused):
        reporter.say(f"unused     {line}")

    model = prepared.model_config
    scores = "an external score" if config.score_column else "the initial model"
    order = _ORDERS[config.order].format(ranks=scores, tiers=config.tiers)
    vocabulary = getattr(model.get_text_config(), "vocab_size", None)

    reporter.say(f"model      {config.model} ({model.model_type}, vocabulary {vocabulary})")
    reporter.say(f"backend    {run_backend(config)}")
    reporter.say(f"order      {config.order}: {order}")
    reporter.say(f"reference  {config.reference}; policy starts from {config.policy}; loss {config.loss_sum.label}")
    if config.quantization is not None:
        reporter.say(f"base       {config.quantization.text}; its head and embeddings in {config.dtype}")
    if config.lora is not None:
        lora = config.lora
        targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
        reporter.say(f"lora       rank {lora.r}, alpha {lora.alpha:g}, on {targets}")
        what = "the adapter and merged weights" if config.publishes_merged else "the adapter alone"
        reporter.say(f"publishes  {what} (lora.publish: {config.lora.publish})")
    if expo := config.expo:
        reporter.say(f"post       expo from {expo.start}, {expo.alpha_text}, into {config.output_dir}/{FOLDER}")
    if config.samples:
        reporter.say(f"samples    every model answers {counted(config.samples, 'prompt')} of eval_data")
    for stage in prepared.stages:
        if stage.prompts is not None:
            reporter.say(f"source     {stage.config.name}: {_source(stage.config.source)}")
    if config.reference_cache is not None:
        reporter.say(f"cache      {cache_line(config.reference_cache)}; what fits is known once weights are loaded")
    _say_reference(prepared, processes, reporter)
    reporter.say(f"prompts    {_sharing(prepared)}")
    if reads_clock(prepared.tokenizer):
        reporter.say(f"clock      the chat template reads the date: {now.isoformat()} throughout the run")
    prepared.say_notes(reporter)
    for note in (schedule.note(name) for name, schedule in _schedules(prepared, processes).items()):
        if note is not None:
            reporter.say(f"note       {note}")
    _say_memory(prepared, target, reporter)
    reporter.say(_state(config, now))


def _source(source: Any) -> str:
    """What generates a stage's pairs, in one line: its kind, its sampling and what judges."""
    generation = source.generation
    by = generation.url if generation.engine == "url" else generation.engine
    judge = getattr(source, "judge", None) or getattr(source, "reward_model", None)
    number = f"{counted(source.samples, 'sample')} a prompt, " if hasattr(source, "samples") else ""
    sampling = f"temperature {source.temperature:g}, top_p {source.top_p:g}, at most {source.max_new_tokens} tokens"
    return f"{source.kind}, {number}{sampling}, by {by}{'' if judge is None else f'; judged by {judge}'}"


def _say_memory(prepared: Prepared, target: Target | None, reporter: Reporter) -> None:
    """Print the memory plan: a line, and with a `target` the table and what to change."""
    with reporter.waiting("planning memory"):
        try:
            quantises = "quantization" in RunConfig.model_fields
            first, *others = plan_lines(planned(prepared, target), target, quantises=quantises)
        except NotPlanned as reason:
            first, others = f"not planned: {reason}", []
    reporter.say(f"memory     {first}")
    for text in others:
        reporter.say(f"  {text}".rstrip())


def planned(prepared: Prepared, target: Target | None) -> PlannedRun:
    """The memory plan of a run that is prepared; NotPlanned says why there is none."""
    shared = _against_sharing(prepared) is None
    return plan_run(
        prepared.config, prepared.model_config, prepared.stages, prepared.eval_tokens, target, shared=shared
    )


def _say_reference(prepared: Prepared, processes: int, reporter: Reporter) -> None:
    """Print the further settings of the reference with `multi`, `guiding` and `ema`."""
    config = prepared.config
    if config.guiding is not None:
        reporter.say(f"guiding    {config.guiding} is the reference of every stage")
    if config.multi is not None:
        options = config.multi
        weights = options.alpha if isinstance(options.alpha, str) else ", ".join(f"{a:g}" for a in options.alpha)
        reporter.say(f"multi      the base (the policy's start) with {', '.join(options.models)}")
        reporter.say(f"           epsilon {options.epsilon:g}, alpha {weights} ({options.alpha_convention})")

    if config.reference == "ema":
        following = config.ema or EmaSettings()
        reporter.say(f"ema        decay {following.decay:g}, mode {following.mode}; restarts at each stage")
        period = following.period
        if period is None:
            return
        moves = {name: (schedule.steps - 1) // period for name, schedule in _schedules(prepared, processes).items()}
        reporter.say(f"           moves every {period} steps: {', '.join(f'{n} {k} times' for n, k in moves.items())}")
        if moves and not any(moves.values()):
            reporter.warn(f"ema.sync_steps: {period} is more than the steps of any stage: the reference never moves")


def _sharing(prepared: Prepared) -> str:
    """Whether prompts go through the model once for both answers, and what that saves."""
    reason = _against_sharing(prepared)
    if reason is not None:
        return f"go through the model twice, once for each answer ({reason})"
    known = [stage.tokens for stage in prepared.stages if stage.prompts is None]
    saved = sum(map(shared_tokens, known))
    total = sum(len(tokens.ids) - 2 * len(tokens) for tokens in known)  # a sequence's last token predicts nothing
    if not saved:
        return "go through the model once, where both answers begin with the same tokens (prefix_sharing: auto)"
    return (
        f"go through the model once for both answers, if its attention allows: {write_part(total - saved, total)} "
        "tokens (prefix_sharing: auto)"
    )


def _against_sharing(prepared: Prepared) -> str | None:
    """The setting that rules shared prompts out, or None; whether the attention allows them is seen in training."""
    config = prepared.config
    if config.batching == "padded":
        return "batching: padded"
    if config.prefix_sharing == "off":
        return "prefix_sharing: off"
    if config.attn_implementation not in (None, PACKED):
        return f"attn_implementation: {config.attn_implementation}"
    if getattr(prepared.model_config.get_text_config(), "output_router_logits", False):
        return "the loss of the model's router counts every token once"
    return None


def _schedules(prepared: Prepared, processes: int) -> dict[str, Schedule]:
    """The schedules by stage on so many processes, without stages whose pairs are generated: not known yet."""
    known = [schedules_of(prepared.config, stage, processes) for stage in prepared.stages if stage.prompts is None]
    return {name: schedule for of_stage in known for name, schedule in of_stage.items()}


def _unused(columns: dict[str, list[str]]) -> list[str]:
    """A line for all sources that have the same columns which nothing reads."""
    sources: dict[str, list[str]] = {}
    for source, names in columns.items():
        sources.setdefault(", ".join(names), []).append(source)

    lines = []
    for unread, (first, *others) in sources.items():
        more = f" and {counted(len(others), 'other')}" if others else ""
        lines.append(f"{first}{more}: {unread}")
    return lines


def _table(prepared: Prepared, processes: int) -> Table:
    # the number of processes decides how many steps there are
    table = Table(title="stages" if processes == 1 else f"stages, with the steps of {processes} processes")
    for name in ("stage", "pairs", "dropped", "tokens", "scored", "longest", "steps", "beta"):
        # 80 columns hold nine letters; a longer name is folded, as a cut one says less
        is_name = name == "stage"
        table.add_column(
            name, justify="left" if is_name else "right", min_width=9 if is_name else None, overflow="fold"
        )

    for stage in prepared.stages:
        tokens = stage.tokens

        # counts of generated pairs are not known before training
        if stage.prompts is not None:
            assert stage.config.source is not None
            generated = f"generated from {counted(len(stage.prompts), 'prompt')} ({stage.config.source.kind})"
            table.add_row(stage.config.name, generated, *[""] * 5, f"{prepared.config.stage_beta(stage.config):g}")
            continue

        schedules = schedules_of(prepared.config, stage, processes).values()
        cells = (
            len(tokens.dropped),
            int(tokens.lengths.sum()),
            int(scored_counts(tokens).sum()),
            int(tokens.lengths.max()),
            sum(schedule.steps for schedule in schedules),
        )
        used = sum(len(schedule.used()) for schedule in schedules)
        counts = [write_part(used, len(tokens)), *(f"{n:,}" for n in cells)]
        table.add_row(stage.config.name, *counts, f"{prepared.config.stage_beta(stage.config):g}")

    # evaluation pairs have neither steps nor a beta
    if prepared.eval_tokens is not None:
        tokens = prepared.eval_tokens
        sizes = (len(tokens), len(tokens.dropped), int(tokens.lengths.sum()), int(scored_counts(tokens).sum()))
        table.add_row("eval_data", *(f"{n:,}" for n in sizes), f"{int(tokens.lengths.max()):,}", "", "")
    return table


def _state(config: RunConfig, now: datetime) -> str:
    """The line about output_dir; UserError if it contains a run with another config."""
    path = Path(config.output_dir) / "manifest.json"
    if not path.exists():
        return f"output     {config.output_dir} (new)"

    # only the config is compared: some orders need scores before the stages' data is known
    manifest = read_json(path)
    header: dict[str, Any] = {"config": config.model_dump(mode="json"), "processes": processes_of(manifest)}
    header |= {"template_time": now.isoformat(), FILES: trainer_files(config)}
    if differences := refused_settings(manifest, header):
        raise UserError(different_settings(path.parent, differences))
    stages = manifest.get("stages", [])
    done = sum(stage.get("state") == "done" for stage in stages)
    # a tier of `order: margin` is no stage of the file
    known = {stage["name"] for stage in stages}
    more = 0 if config.tiers is not None else sum(stage.name not in known for stage in config.stages)
    return f"output     {config.output_dir}: {done} of {len(stages) + more} stages done"
