"""A run's post step: ExPO from its last model into <output_dir>/expo, done once and recorded in the manifest.

The folder appears in one rename with its record in it, so a kill leaves it either complete or absent. Unfinished work
is in .expo; running the same command again redoes it.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import empty_folder, publish_folder, read_json, remove_folder, write_json
from sdpo_kernels.stepwise.models.weights import Weights
from sdpo_kernels.stepwise.post.expo import extrapolate
from sdpo_kernels.stepwise.post.search import Found, search, search_notes, search_table
from sdpo_kernels.stepwise.record.expo_record import FOLDER, RECORD
from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.references.evaluation import EvalData
from sdpo_kernels.stepwise.references.scorer import Scorer, pad_token_id
from sdpo_kernels.stepwise.settings.post import DEFAULT_METRIC, ExpoSettings
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from sdpo_kernels.stepwise.state import Run


def check_start(config: RunConfig) -> None:
    """Raise UserError, before training starts, if ExPO cannot read M_0: a hub name, no safetensors, an adapter."""
    settings = config.expo
    if settings is None or (settings.start == "previous" and (config.tiers or len(config.stages)) > 1):
        return
    try:
        weights = Weights(Path(config.model))
    except UserError as error:
        raise UserError(f"post.expo: needs the model's own files: {error}") from error
    if weights.is_adapter:
        raise UserError(f"post.expo: {config.model} is a LoRA adapter; merge it into its base first")


def post_done(run: Run) -> bool:
    """Whether there is nothing left to do after the last stage."""
    made = run.manifest.data.get("post", {}).get("expo")
    return run.config.expo is None or (made is not None and _is_of(made, _plan(run, run.config.expo)))


def run_post(run: Run) -> None:
    """Do the run's post step, unless it is done.

    1. If the folder is there, a kill came between its rename and the manifest's last write: read its record. If it was
       made from another stage, or with other settings, keep it under another name; one that is not this run's is a
       UserError.
    2. Otherwise extrapolate in .expo, write the record next to the weights, and publish both in one rename.
    3. Enter the record in the manifest.
    """
    settings = run.config.expo
    if settings is None or post_done(run):
        return

    folder, work = run.folder / FOLDER, run.folder / f".{FOLDER}"
    plan = _plan(run, settings)
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}

    # of a run that has grown by a stage since, or has other settings for this step
    if folder.exists() and not _is_of(record, plan):
        _put_aside(run, folder, record)
    if not folder.exists():
        record = plan | _make(run, settings, empty_folder(work))
        write_json(work / "finished" / RECORD, record)
        publish_folder(work / "finished", folder)

    remove_folder(work)
    run.manifest.data["post"] = {"expo": record}
    run.manifest.save()


def _plan(run: Run, settings: ExpoSettings) -> Record:
    """What the record of the folder must say: settings and θ1."""
    asked = settings.model_dump(mode="json")
    return {"from": settings.start, "asked": asked, "theta1": run.manifest.stages[-1]["name"]}


def _is_of(record: Record, plan: Record) -> bool:
    return {key: record.get(key) for key in plan} == plan


def _put_aside(run: Run, folder: Path, record: Record) -> None:
    """Rename an earlier result of this run to expo-<stage>, or expo-<stage>-2 and so on."""
    stage = record.get("theta1")
    if stage not in [stage["name"] for stage in run.manifest.stages]:
        raise UserError(f"{folder} does not belong to this run; move it away or choose another output_dir")

    names = (f"{FOLDER}-{stage}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    other = next(path for name in names if not (path := folder.with_name(name)).exists())
    folder.rename(other)
    run.reporter.say(f"{FOLDER}: the earlier result, of stage {stage}, is now in {other}")


def _make(run: Run, settings: ExpoSettings, work: Path) -> Record:
    """Write the extrapolated model to work/finished, and return its record.

    1. θ1 is the last stage's model, θ0 the initial one or the previous stage's.
    2. Find α: given, or the best of a search on the evaluation pairs.
    3. Extrapolate, and evaluate the result.
    """
    started = time.monotonic()

    # a run with a single stage has no previous stage but the initial model
    last = len(run.manifest.stages)
    aligned = run.stage_folder(last)
    start = run.stage_folder(last - 1) if settings.start == "previous" and last > 1 else Path(run.config.model)

    metric = settings.metric or DEFAULT_METRIC
    scorer = _scorer(run)
    found = None
    if settings.alphas is not None:
        run.reporter.say(f"expo: trying {len(settings.alphas)} values of α")
        found = search(start, aligned, settings.alphas, lambda made: _evaluate(run, made, scorer)[metric], work / "try")
        run.reporter.say(search_table(found, metric))

    # the search keeps only one model on the disk, so its best one is written again
    alpha = found.best.alpha if found is not None else float(settings.alpha)
    notes = search_notes(found, metric) if found is not None else ()
    with run.reporter.waiting(f"expo: writing the model with α {alpha:g}"):
        extrapolate(start, aligned, work / "finished", alpha, notes)

    return {
        "alpha": alpha,
        "metric": metric if found is not None else None,
        "scores": _scores(found),
        "theta0": str(start),
        "eval": None if run.eval_data is None else _evaluate(run, work / "finished", scorer),
        "seconds": round(time.monotonic() - started, 3),
    }


def _scores(found: Found | None) -> Record | None:
    return None if found is None else {f"{trial.alpha:g}": trial.score for trial in found.trials}


def _scorer(run: Run) -> Scorer:
    args = training_arguments(run.config, run.config.stages[0], run.folder, run.folder)
    return Scorer.of(run.config, args, pad_token_id(run.tokenizer), run.reporter)


def _evaluate(run: Run, folder: Path, scorer: Scorer) -> Record:
    data: EvalData | None = run.eval_data
    assert data is not None  # settings with a search require eval_data
    return data.evaluate(str(folder), folder, scorer, "expo")
