"""The models that a reopened run already has: their weights must be there, and be evaluated on the present data."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.load import ADAPTER, release_memory
from sdpo_kernels.stepwise.models.weights import Weights
from sdpo_kernels.stepwise.references.evaluation import EVAL_FILE, EvalData
from sdpo_kernels.stepwise.state import Run, Stage


def missing_weights(state: Run) -> dict[int, str]:
    """What is wrong with the weights of finished stages, by the stage's index.

    A warning for a stage that nothing needs any more; UserError for the last one, which is the run's result, or if the
    next stage starts from it or is compared with it.
    """
    config, done = state.config, [stage for stage in state.manifest.stages if stage["state"] == "done"]
    last_is_needed = len(done) == len(state.manifest.stages) or "previous" in (config.policy, config.reference)

    missing = {}
    for stage in done:
        folder = state.stage_folder(stage["index"])
        problem = weights_problem(folder / ADAPTER if stage.get("weights") == "adapter" else folder)
        if problem and stage is done[-1] and last_is_needed:
            raise UserError(
                f"{folder}: {problem}, although the stage is finished; put it back, or choose another output_dir"
            )
        if problem:
            state.reporter.warn(f"{folder}: {problem}, although the stage is finished; nothing needs it any more")
            missing[stage["index"]] = problem
    return missing


def weights_problem(folder: Path) -> str | None:
    """What is wrong with the weights in `folder`, a missing or incomplete file; None if all are there."""
    if not folder.is_dir():
        return "the folder is missing"
    try:
        Weights(folder)  # reads the headers, and compares them with the files' sizes
    except UserError as error:
        return str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
    return None


def needs_evaluation(state: Run, missing: dict[int, str]) -> bool:
    """Whether a model is yet to be evaluated, because the evaluation data or the number of samples is new."""
    data = state.eval_data
    if data is None:
        return False
    there = [stage for stage in state.manifest.stages if stage["index"] not in missing]
    if None in [state.manifest.data["initial_eval"], *(stage["eval"] for stage in there)]:
        return True
    folders = [state.folder, *(state.stage_folder(stage["index"]) for stage in there)]
    return ranks.on_first(lambda: any(map(data.lacks_samples, folders)))


def check_moved_model(state: Run, stage: Stage) -> None:
    """UserError if the initial model has another name than before, and other weights."""
    data, name = state.manifest.data, state.config.model
    if data["model"] == name:
        return
    if "initial" in data.get("weights", {}):
        loaded, digest = stage.scorer.load_with_hash(name)
        state.check_weights(name, digest)
        del loaded
        release_memory()
    data["model"] = name
    state.manifest.save()


def evaluate_models(state: Run, eval_data: EvalData, stages: list[Stage], missing: dict[int, str]) -> None:
    """Evaluate the initial model and finished stages, if that was not done on the present data or samples lack."""
    evaluated = state.manifest.data["initial_eval"] is not None and (state.folder / EVAL_FILE).exists()
    if not ranks.on_first(lambda: evaluated and not eval_data.lacks_samples(state.folder)):
        scores = eval_data.evaluate(state.config.model, state.folder, stages[0].scorer, "initial model")
        state.manifest.data["initial_eval"] = scores
        state.manifest.save()

    for stage in stages:
        if stage.record["state"] != "done" or stage.index in missing:
            continue
        lacks_samples = ranks.on_first(partial(eval_data.lacks_samples, stage.folder))
        if stage.record["eval"] is None or lacks_samples:
            scores = eval_data.evaluate(str(stage.folder), stage.folder, stage.scorer, stage.label)
            stage.update({"eval": scores})
