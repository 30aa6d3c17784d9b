"""The loop over stages: `run(config)` trains whatever of a run is not done yet, and says so when nothing is left.

from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.run import run
manifest = run(load_config("run.yaml"))
"""

from __future__ import annotations

import fcntl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import read_json, remove_folder, replace_file
from sdpo_kernels.stepwise.common.progress import Mute, Reporter
from sdpo_kernels.stepwise.data.order import StageData, order_stages
from sdpo_kernels.stepwise.data.prompts import prompts_hash
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.post.after_run import check_start, post_done, run_post
from sdpo_kernels.stepwise.prepare import Prepared, prepare
from sdpo_kernels.stepwise.record.expo_record import expo_line
from sdpo_kernels.stepwise.record.manifest import Manifest, MetricsFile, Record, host_environment
from sdpo_kernels.stepwise.references.evaluation import EVAL_FILE, EvalData
from sdpo_kernels.stepwise.references.scorer import Scorer, pad_token_id
from sdpo_kernels.stepwise.report.run_report import stage_table, write_report
from sdpo_kernels.stepwise.settings.run_file import dump_config
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from sdpo_kernels.stepwise.stage import train_stage
from sdpo_kernels.stepwise.state import Run, Stage
from sdpo_kernels.version import __version__

LOCK = ".lock"


def run(config: RunConfig, reporter: Reporter | None = None) -> Record:
    """Train all stages of `config` that are not done, and return the manifest.

    Raises:
        UserError: whatever a person can mend, before any training where it can be known there.
        Interrupted: after Ctrl-C or SIGTERM, once everything is saved.
    """
    folder = Path(config.output_dir)
    # TrainingArguments has torch.distributed ready, with the backend and the timeout that it is given
    with ranks.joined(lambda: training_arguments(config, config.stages[0], folder, folder).device):
        return _run(config, folder, (reporter or Reporter()) if ranks.is_first() else Mute())


def _run(config: RunConfig, folder: Path, reporter: Reporter) -> Record:
    prepared = ranks.agree(lambda: _checked(config))
    prepared.say_warnings(reporter)
    with _locked(folder):
        ordered = order_stages(config, prepared.stages, _ranking(prepared, folder, reporter))
        prepared.stages = _as_begun(ordered, folder, reporter)
        state = open_run(prepared, folder, reporter)
        if ranks.is_first():
            _clear_leftovers(state)
        if all(stage["state"] == "done" for stage in state.manifest.stages) and post_done(state):
            if ranks.is_first() and not (folder / "report.html").exists():  # killed before its last file
                write_report(folder)
            reporter.say(f"nothing to do: all {len(state.manifest.stages)} stages in {folder} are done")
            return state.manifest.data
        if ranks.is_first():
            (folder / "report.html").unlink(missing_ok=True)  # asked for in the middle of the run
        _train(state, prepared.stages)
        ranks.on_first(lambda: run_post(state))
        if ranks.is_first():
            write_report(folder)
    reporter.say(stage_table(state.manifest.data))
    if line := expo_line(state.manifest.data):
        reporter.say(line)
    reporter.say(f"report: {folder / 'report.html'}")
    return state.manifest.data


def _checked(config: RunConfig) -> Prepared:
    """All input of the run, read; UserError for whatever would stop it later, its post-step included."""
    check_start(config)
    return prepare(config)


def _as_begun(stages: list[StageData], folder: Path, reporter: Reporter) -> list[StageData]:
    """The stages in the order in which the run in `folder` was begun, should a score have come out differently now."""
    path = folder / "manifest.json"
    if not ranks.on_first(path.exists):
        left = sorted(entry.name for entry in folder.glob("*stage-*") if entry.is_dir())
        if left:
            raise UserError(
                f"{folder} holds {left[0]} but no manifest.json; move what is there away, or choose another output_dir"
            )
        return stages
    begun = [stage.get("name") for stage in read_json(path).get("stages", [])]
    named = {stage.config.name: stage for stage in stages}
    if begun == list(named) or sorted(map(str, begun)) != sorted(named):
        return stages  # as it was, or a difference that the manifest will name
    reporter.warn(f"the order {', '.join(begun)} is kept, in which the run was begun; the ranking now says otherwise")
    return [named[name] for name in begun]


def _ranking(prepared: Prepared, folder: Path, reporter: Reporter) -> Callable[[TokenizedPairs], Tensor]:
    """Log-probs under the initial model, for orders that need them; cached, so that a second start costs nothing."""
    config = prepared.config

    def score(tokens: TokenizedPairs) -> Tensor:
        args = training_arguments(config, prepared.stages[0].config, folder, folder)
        scorer = Scorer.of(config, args, pad_token_id(prepared.tokenizer), reporter)
        cache = folder / f".order_logps_{tokens.content_hash()[:12]}.safetensors"
        return scorer.score_path(config.model, tokens, "ranking by the initial model", cache)

    return score


def open_run(prepared: Prepared, folder: Path, reporter: Reporter) -> Run:
    """The run's state: its manifest, compared with what was read."""
    config = prepared.config
    environment = _environment(config)
    header = {
        "version": __version__,
        "model": config.model,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment,
        "config": config.model_dump(mode="json"),
        "eval_data_hash": None if prepared.eval_tokens is None else prepared.eval_tokens.content_hash(),
    }
    records = [_planned(config, index, stage) for index, stage in enumerate(prepared.stages, 1)]
    manifest = ranks.on_first(lambda: Manifest.open(folder, header, records))
    _warn_of_environment(manifest, environment, reporter)
    replace_file(folder / "config.yaml", dump_config(config).encode())
    eval_data = None
    if prepared.eval_tokens is not None:
        eval_data = EvalData(prepared.eval_tokens, folder, config.beta, config.model)
    return Run(config, folder, prepared.tokenizer, manifest, MetricsFile(folder), reporter, eval_data)


def _clear_leftovers(state: Run) -> None:
    """Remove what a kill left: temporary files, and working folders of stages that are done."""
    for path in state.folder.glob(".*.tmp"):
        path.unlink()
    doing = {f".{state.stage_folder(s['index']).name}" for s in state.manifest.stages if s["state"] != "done"}
    for path in state.folder.glob(".stage-*"):
        if path.name not in doing:
            remove_folder(path)


def _train(state: Run, data: list[StageData]) -> None:
    # All are made before the first is trained, so that settings which transformers refuses are heard of at once.
    stages = [Stage(state, index, stage_data) for index, stage_data in enumerate(data, 1)]
    scored = state.manifest.data["initial_eval"] is not None and (state.folder / EVAL_FILE).exists()
    if state.eval_data is not None and not scored:
        scores = state.eval_data.evaluate(state.config.model, state.folder, stages[0].scorer)
        state.manifest.data["initial_eval"] = scores
        state.manifest.save()
    for index, stage_data in enumerate(data, 1):
        if state.manifest.stages[index - 1]["state"] != "done":
            # Made anew: accelerate and TensorBoard keep in one global place what the arguments made last have set.
            train_stage(Stage(state, index, stage_data))


def _planned(config: RunConfig, index: int, stage: StageData) -> Record:
    """A stage's record before anything is done."""
    return {
        "name": stage.config.name,
        "index": index,
        "state": "pending",
        "prompts": None if stage.prompts is None else len(stage.prompts),  # of a stage that makes its pairs
        "pairs": len(stage.tokens),
        "dropped": len(stage.tokens.dropped),
        "data_hash": stage.tokens.content_hash() if stage.prompts is None else prompts_hash(stage.prompts),
        "accuracy_before": stage.accuracy,
        "reference": config.reference,
        "policy": config.policy,
        "loss": config.loss_sum.label,
        "beta": config.stage_beta(stage.config),
        "epochs": stage.config.epochs,
        "eval": None,
    }


def _environment(config: RunConfig) -> Record:
    device = "cuda" if torch.cuda.is_available() and not config.trainer.get("use_cpu") else "cpu"
    return host_environment(torch.get_num_threads(), device, int(config.trainer["seed"]))


def _warn_of_environment(manifest: Manifest, now: Record, reporter: Reporter) -> None:
    before = {"world_size": 1} | manifest.data["environment"]
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        reporter.warn(
            f"this machine differs from the one the run was started on ({', '.join(changed)}): "
            "the run goes on, but its last bits may differ from those of a run never stopped"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one run at a time works in `folder`; the lock goes with the first process, however it ends."""
    with ExitStack() as held:
        token = ranks.on_first(lambda: _lock(folder, held))
        ranks.agree(lambda: _require_shared(folder, token))
        yield


def _lock(folder: Path, held: ExitStack) -> str:
    """Make and lock the folder for as long as `held`; what the lock's file says now."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be made: {error.strerror or error}") from error
    stream = held.enter_context((folder / LOCK).open("a"))
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is working on this run") from None
    except OSError as error:  # a file system without locks
        raise UserError(f"output_dir: {folder} cannot be locked: {error.strerror or error}") from error
    stream.truncate(0)
    stream.write(token := uuid.uuid4().hex)
    stream.flush()
    return token


def _require_shared(folder: Path, token: str, seconds: float = 10.0) -> None:
    """UserError where this process does not see what the first one writes; a network's file system gets some time."""
    end = time.monotonic() + seconds
    while not ((folder / LOCK).exists() and (folder / LOCK).read_text() == token):
        if time.monotonic() > end:
            raise UserError(f"output_dir: {folder} is not one folder for all nodes; put it on a shared file system")
        time.sleep(0.05)
