"""The loop over stages: `run(config)` trains every stage of a run that is not done yet.

    from sdpo_kernels.stepwise.settings.run_file import load_config
    from sdpo_kernels.stepwise.run import run
    manifest = run(load_config("run.yaml"))

Calling it again resumes a run that was stopped, and does nothing for a finished one.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from torch import Tensor

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import read_json, remove_folder
from sdpo_kernels.stepwise.common.progress import Mute, Reporter
from sdpo_kernels.stepwise.common.run_lock import locked
from sdpo_kernels.stepwise.common.units import write_seconds
from sdpo_kernels.stepwise.data.order import StageData, order_stages
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.post.after_run import check_start, post_done, run_post
from sdpo_kernels.stepwise.prepare import Prepared, prepare
from sdpo_kernels.stepwise.record.environment import run_backend
from sdpo_kernels.stepwise.record.expo_record import expo_line
from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.record.template_time import template_time
from sdpo_kernels.stepwise.references.scorer import Scorer, pad_token_id
from sdpo_kernels.stepwise.report.run_report import stage_table, write_report
from sdpo_kernels.stepwise.settings.mistakes import show
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from sdpo_kernels.stepwise.settings.trainer_files import trainer_files, with_content
from sdpo_kernels.stepwise.stage import train_stage
from sdpo_kernels.stepwise.state import Run, Stage, open_run
from sdpo_kernels.stepwise.training.finished_stages import (
    check_moved_model,
    evaluate_models,
    missing_weights,
    needs_evaluation,
)
from sdpo_kernels.stepwise.training.launcher import require_launcher, way_in_words


def run(config: RunConfig, reporter: Reporter | None = None) -> Record:
    """Train the stages of `config` that are not done, and return the manifest.

    1. Read and check all input.
    2. Lock the run's folder; order the stages, which may need scores of the initial model.
    3. Create the run or reopen it, and remove what a kill left behind.
    4. Evaluate the initial model, then train the stages one after another.
    5. Run the post-step (ExPO), if there is one, and write the report, as after every stage.

    On several ranks all of them call this; only rank 0 writes and logs.

    Raises:
        UserError: what the user can fix; before any training wherever that can be known then.
        Interrupted: after Ctrl-C or SIGTERM, with everything saved.
    """
    folder = Path(config.output_dir)
    if config.tp_size not in (1, ranks.launched()):
        raise UserError(
            f"tp_size: was {config.tp_size}, must be the number of processes, which is {ranks.launched()}: start "
            f"them with torchrun --nproc_per_node {config.tp_size} -m sdpo_kernels … "
            "(docs/distributed.md)"
        )
    # TrainingArguments initializes torch.distributed, with the backend and timeout in the settings
    with ranks.joined(lambda: training_arguments(config, config.stages[0], folder, folder).device, config.tp_size):
        _require_same_settings(config)
        return _run(config, folder, (reporter or Reporter()) if ranks.is_first() else Mute())


def _require_same_settings(config: RunConfig) -> None:
    """UserError, on all ranks, if one was started with other settings than rank 0: they would train apart."""
    first, *others = ranks.exchange(with_content(config.model_dump(mode="json"), trainer_files(config)))
    for rank, other in enumerate(others, 1):
        for key in first:
            if other[key] != first[key]:
                raise UserError(
                    f"{key}: was {show(other[key])} on rank {rank} and {show(first[key])} on rank 0; start all ranks "
                    "with the same command"
                )


def _run(config: RunConfig, folder: Path, reporter: Reporter) -> Record:
    # an input that only one node lacks is an error on all ranks
    now = ranks.on_first(lambda: template_time(config))
    prepared = ranks.agree(lambda: _checked(config, now, reporter))
    prepared.say_warnings(reporter)
    prepared.say_notes(reporter)

    with locked(folder):
        ranks.agree(lambda: require_launcher(config, folder))
        ordered = order_stages(config, prepared.stages, _ranking(prepared, folder, reporter))
        # in place of the unordered ones, so that the tokens are in memory once
        prepared.stages = stages = _in_first_order(config, ordered, folder, reporter)
        state = open_run(config, prepared.tokenizer, stages, prepared.eval_tokens, folder, reporter, now)
        if ranks.is_first():
            _remove_leftovers(state)

        missing = ranks.on_first(lambda: missing_weights(state))
        all_done = all(stage["state"] == "done" for stage in state.manifest.stages)
        if all_done and post_done(state) and not needs_evaluation(state, missing):
            # a kill after the last stage may have prevented the last report
            if ranks.is_first() and _report_is_old(folder):
                write_report(folder)
            reporter.say(f"nothing to do: all {len(state.manifest.stages)} stages in {folder} are done")
            return state.manifest.data

        reporter.say(f"backend: {run_backend(config)}")
        if ranks.world_size() > 1:
            reporter.say(f"processes: {way_in_words(config, folder)}")
        _train(state, stages, missing)
        ranks.on_first(lambda: run_post(state))
        if ranks.is_first():
            with reporter.waiting("writing the report"):
                write_report(folder)

    reporter.say(stage_table(state.manifest.data))
    if line := expo_line(state.manifest.data):
        reporter.say(line)
    reporter.say(f"report: {folder / 'report.html'}")
    return state.manifest.data


def _checked(config: RunConfig, now: datetime, reporter: Reporter) -> Prepared:
    """All input of the run; UserError for whatever would stop it later, its post-step included."""
    check_start(config)
    return prepare(config, now, reporter)


def _in_first_order(config: RunConfig, stages: list[StageData], folder: Path, reporter: Reporter) -> list[StageData]:
    """The stages in the order in which the run in `folder` was started, even if the ranking comes out differently now.

    Stages that were added since come last. UserError if `folder` has stage folders but no manifest: they are not this
    run's, and would be overwritten.
    """
    path = folder / "manifest.json"
    if not ranks.on_first(path.exists):
        left = sorted(entry.name for entry in folder.glob("*stage-*") if entry.is_dir())
        if left:
            raise UserError(
                f"{folder} contains {left[0]} but no manifest.json; move its contents away, or choose another "
                "output_dir"
            )
        return stages

    if config.order == "given":
        return stages  # what is in the file holds; a stage that has started and moved is an error of the manifest
    named = {stage.config.name: stage for stage in stages}
    first = [stage["name"] for stage in read_json(path).get("stages", []) if stage["name"] in named]
    if first != [name for name in named if name in first]:
        reporter.warn(f"the run keeps the order it was started in ({', '.join(first)}); the ranking is different now")
    return [named[name] for name in first] + [stage for name, stage in named.items() if name not in first]


def _ranking(prepared: Prepared, folder: Path, reporter: Reporter) -> Callable[[TokenizedPairs], Tensor]:
    """Log-probs under the initial model, for orders that need them; cached, so that resuming does not rescore."""
    config = prepared.config

    def score(tokens: TokenizedPairs) -> Tensor:
        args = training_arguments(config, prepared.stages[0].config, folder, folder)
        scorer = Scorer.of(config, args, pad_token_id(prepared.tokenizer), reporter)
        cache = folder / f".order_logps_{tokens.content_hash()[:12]}.safetensors"
        return scorer.score_path(config.model, tokens, "ranking by the initial model", cache)

    return score


def _say_done(stage: Stage, *, earlier: bool = False) -> None:
    """Say how long a finished stage took and, unless an earlier process trained it, how far the run is."""
    overall, took = stage.run.reporter.overall, write_seconds(stage.record["seconds"])
    rest = "" if overall is None or earlier else f"; {overall.line()}"
    stage.run.reporter.say(f"{stage.label}: done{' earlier' if earlier else ''} in {took}{rest}")


def _report_is_old(folder: Path) -> bool:
    """Whether the run has gone on since its report was written, or has none."""
    report, manifest = folder / "report.html", folder / "manifest.json"
    return not report.exists() or report.stat().st_mtime_ns < manifest.stat().st_mtime_ns


def _report_so_far(state: Run) -> None:
    """Write the report of a run that goes on; what prevents it is a warning, because training need not stop for it."""
    if not ranks.is_first():
        return
    try:
        with state.reporter.waiting("writing the report"):
            write_report(state.folder)
    except Exception as error:
        state.reporter.warn(f"the report could not be written, training goes on: {' '.join(str(error).split())}")


def _remove_leftovers(state: Run) -> None:
    """Remove what a kill left behind: temporary files, and working folders of stages that are done."""
    for path in state.folder.glob(".*.tmp"):
        path.unlink()
    unfinished = {f".{state.stage_folder(s['index']).name}" for s in state.manifest.stages if s["state"] != "done"}
    for path in state.folder.glob(".stage-*"):
        if path.name not in unfinished:
            remove_folder(path)


def _train(state: Run, data: list[StageData], missing: dict[int, str]) -> None:
    """Evaluate the models there are, unless that is done, then train the stages that are not finished."""
    # All are made before the first one trains, so that settings which transformers refuses are reported at once.
    stages = [Stage(state, index, stage_data) for index, stage_data in enumerate(data, 1)]

    state.reporter.plan([stage.plan for stage in stages])
    check_moved_model(state, stages[0])
    if state.eval_data is not None:
        evaluate_models(state, state.eval_data, stages, missing)

    # generated pairs are counted once they are there
    for stage in stages:
        if stage.record["state"] != "done" and stage.data.prompts is None and (note := stage.schedule.note(stage.name)):
            state.reporter.say(note)

    for index, stage_data in enumerate(data, 1):
        if state.manifest.stages[index - 1]["state"] == "done":
            _say_done(stages[index - 1], earlier=True)
        else:
            state.reporter.begin(index)
            # A new Stage: accelerate and TensorBoard keep global state, set by the arguments that were made last.
            train_stage(Stage(state, index, stage_data))
            _say_done(stages[index - 1])
            # after the last stage it is written once, with the post-step's result
            if index < len(data):
                _report_so_far(state)
