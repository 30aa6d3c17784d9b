"""A run and its stages while they are worked on; `open_run` creates or reopens a run's folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TrainingArguments

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.common.memory import peak_memory_bytes
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.common.run_progress import StagePlan
from sdpo_kernels.stepwise.data.order import StageData
from sdpo_kernels.stepwise.data.prompts import prompts_hash
from sdpo_kernels.stepwise.data.schedule import Schedule
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.record.changes import FILES
from sdpo_kernels.stepwise.record.environment import environment_warning, run_environment
from sdpo_kernels.stepwise.record.manifest import Manifest, MetricsFile, Record
from sdpo_kernels.stepwise.record.template_time import recorded_time
from sdpo_kernels.stepwise.references.evaluation import EvalData
from sdpo_kernels.stepwise.references.scorer import Scorer, pad_token_id
from sdpo_kernels.stepwise.references.stage_references import StageReferences
from sdpo_kernels.stepwise.settings.run_file import CONFIG, dump_config
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from sdpo_kernels.stepwise.settings.trainer_files import trainer_files
from sdpo_kernels.version import __version__

_CONFIG_COMMENT = f"""\
# The settings of the run in this folder, with all defaults. `sdpo train {CONFIG}` trains in this folder, whatever
# output_dir says, also in a copy of it.
"""


@dataclass
class Run:
    """What all stages of a run share."""

    config: RunConfig
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest
    metrics: MetricsFile
    reporter: Reporter
    eval_data: EvalData | None

    @property
    def template_time(self) -> datetime:
        """The time that chat templates read as now."""
        return recorded_time(self.manifest.data)

    def check_weights(self, path: str, digest: str) -> None:
        """UserError if the weights in `path` are not those that this run loaded there first."""
        known = self.manifest.data.setdefault("weights", {})

        # by what they are in the run, so that its folder and the models can be moved
        own = Path(path).parent == self.folder
        name = "initial" if path == self.config.model else Path(path).name if own else path
        others = {path: name for name, path in self.config.other_references.items()}
        if path in others and path not in known:  # runs of earlier versions have the path
            name = others[path]
        if name not in known:
            known[name] = digest
            self.manifest.save()

        if known[name] != digest:
            raise UserError(
                f"{path}: its weights have changed since this run was started; put them back, or choose another "
                "output_dir"
            )

    def stage_folder(self, index: int) -> Path:
        """The folder of the finished stage `index` (from 1)."""
        return self.folder / f"stage-{index}-{self.manifest.stages[index - 1]['name']}"


class Stage:
    """One stage of a run, `index` from 1."""

    def __init__(self, run: Run, index: int, data: StageData) -> None:
        self.run, self.index, self.data = run, index, data
        self.name = data.config.name
        self.folder = run.stage_folder(index)
        self.work = run.folder / f".{self.folder.name}"  # the stage's files while it is in progress
        self.use_cache = True  # in the model's config, before Trainer changed it
        self._started, self._seconds_before = time.monotonic(), self.record.get("seconds") or 0.0
        self.args: TrainingArguments = training_arguments(
            run.config, data.config, self.work, run.folder / "tensorboard" / self.folder.name
        )
        self.scorer = Scorer.of(run.config, self.args, pad_token_id(run.tokenizer), run.reporter)

    @property
    def label(self) -> str:
        """Its name in rows of progress and in messages."""
        return f"stage {self.index} of {len(self.run.manifest.stages)} {self.name}"

    @property
    def schedule(self) -> Schedule:
        """Its steps and the pairs they train on; a new one at each call, for the same reason as `references`."""
        return Schedule.of(len(self.data.tokens), self.args, ranks.data_world_size())

    @property
    def plan(self) -> StagePlan:
        """What is known of it beforehand, for the progress of the run."""
        if self.record["state"] == "done":
            return StagePlan(self.record["steps"], done=self.record["steps"])
        if not len(self.data.tokens):
            return StagePlan(None)  # its pairs are not generated yet
        schedule, tokens = self.schedule, self.data.tokens
        return StagePlan(schedule.steps, len(tokens.ids) / len(tokens) * schedule.batch * schedule.accumulation)

    @property
    def references(self) -> StageReferences:
        """What scores its references; a new one at each call, as generated pairs arrive after the stage has started."""
        config = self.run.config
        return StageReferences(
            scorer=self.scorer,
            tokens=self.data.tokens,
            used=self.schedule.used(),
            policy=self.model_before(config.policy),
            reference=self.model_before(config.reference),
            folder=self.work,
            label=self.label,
            check_weights=self.run.check_weights,
            evaluation=self.run.eval_data if self.args.eval_strategy != "no" else None,
        )

    @property
    def record(self) -> Record:
        """Its record in the manifest."""
        return self.run.manifest.stages[self.index - 1]

    def update(self, values: Record) -> None:
        """Change its record in the manifest."""
        self.run.manifest.update_stage(self.index, values)

    def spent(self) -> Record:
        """Wall time and peak memory of the stage so far, over all processes that have worked on it."""
        return {
            "seconds": round(self._seconds_before + time.monotonic() - self._started, 3),
            "peak_memory_bytes": max(self.record.get("peak_memory_bytes") or 0, peak_memory_bytes()),
        }

    def keep_spent(self) -> None:
        """Record what is spent so far, for the process that resumes the stage."""
        self.update(self.spent())

    def model_before(self, which: str) -> str:
        """The model that `previous`, `initial` or `guiding` stands for; for `ema` and `multi` the policy's start."""
        if which == "guiding":
            return str(self.run.config.guiding)
        # both start from the policy's model: ema's reference moves later, multi's base is it
        if which in ("ema", "multi"):
            which = self.run.config.policy
        if which == "initial" or self.index == 1:
            return self.run.config.model
        return str(self.run.stage_folder(self.index - 1))

    @property
    def starts_as_reference(self) -> bool:
        """Whether the policy is its own reference at the stage's start."""
        config = self.run.config
        if config.reference in ("multi", "guiding", "none"):
            return False
        return self.model_before(config.policy) == self.model_before(config.reference)


def open_run(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    stages: Sequence[StageData],
    eval_tokens: TokenizedPairs | None,
    folder: Path,
    reporter: Reporter,
    template_time: datetime,
) -> Run:
    """Create the run in `folder`, or reopen it if its manifest matches the config and data.

    1. Plan the manifest from what was read: a header, and a record for each stage.
    2. Create manifest.json on rank 0, or compare it with the plan.
    3. Warn if the run was started in another environment, and write config.yaml.

    UserError, with every difference, if `folder` contains a run with another config or other data.
    """
    environment = run_environment(config)
    header = {
        "version": __version__,
        "model": config.model,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "template_time": template_time.isoformat(),
        "environment": environment,
        "config": config.model_dump(mode="json"),
        "eval_data_hash": None if eval_tokens is None else eval_tokens.content_hash(),
    }
    if files := trainer_files(config):
        header[FILES] = files
    records = [_planned_record(config, index, stage) for index, stage in enumerate(stages, 1)]

    # every rank gets rank 0's manifest, which may be on a disk that others see a moment later
    manifest = ranks.on_first(lambda: Manifest.open(folder, header, records))
    if warning := environment_warning(manifest, environment):
        reporter.warn(warning)
    replace_file(folder / CONFIG, (_CONFIG_COMMENT + dump_config(config)).encode())

    eval_data = (
        None
        if eval_tokens is None
        else EvalData(eval_tokens, folder, config.beta, config.model, config.samples, tokenizer)
    )
    return Run(config, folder, tokenizer, manifest, MetricsFile(folder), reporter, eval_data)


def _planned_record(config: RunConfig, index: int, stage: StageData) -> Record:
    """A stage's record in the manifest before it starts."""
    return {
        "name": stage.config.name,
        "index": index,
        "state": "pending",
        "prompts": None if stage.prompts is None else len(stage.prompts),  # of a stage that generates its pairs
        "pairs": len(stage.tokens),
        "dropped": len(stage.tokens.dropped),
        "skipped": stage.skipped,
        "cut_pairs": stage.tokens.cut_pairs,
        "lost_tokens": stage.tokens.lost_tokens,
        "data_hash": stage.tokens.content_hash() if stage.prompts is None else prompts_hash(stage.prompts),
        "accuracy_before": stage.accuracy,
        "reference": config.reference,
        "policy": config.policy,
        "loss": config.loss_sum.label,
        "beta": config.stage_beta(stage.config),
        "epochs": stage.config.epochs,
        "eval": None,
    }
