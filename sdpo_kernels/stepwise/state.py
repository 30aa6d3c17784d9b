"""What a run and one of its stages are made of while they are worked on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TrainingArguments

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.order import StageData
from sdpo_kernels.stepwise.record.manifest import Manifest, MetricsFile, Record
from sdpo_kernels.stepwise.references.evaluation import EvalData
from sdpo_kernels.stepwise.references.scorer import Scorer, pad_token_id
from sdpo_kernels.stepwise.references.stage_references import StageReferences
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments


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

    def check_weights(self, path: str, digest: str) -> None:
        """UserError where the model in `path` is not what it was when this run loaded it first."""
        known = self.manifest.data.setdefault("weights", {})
        own = Path(path).parent == self.folder
        name = "initial" if path == self.config.model else Path(path).name if own else path
        if name not in known:
            known[name] = digest
            self.manifest.save()
        if known[name] != digest:
            raise UserError(
                f"{path}: its weights have changed since this run was started; put them back, or choose another "
                "output_dir"
            )

    def stage_folder(self, index: int) -> Path:
        """Where the finished stage `index` (from 1) lies."""
        return self.folder / f"stage-{index}-{self.manifest.stages[index - 1]['name']}"


class Stage:
    """One stage of a run, `index` from 1."""

    def __init__(self, run: Run, index: int, data: StageData) -> None:
        self.run, self.index, self.data = run, index, data
        self.name = data.config.name
        self.folder = run.stage_folder(index)
        self.work = run.folder / f".{self.folder.name}"  # where it lies while it is made
        self.use_cache = True  # what the model's config said before Trainer saw it
        self.args: TrainingArguments = training_arguments(
            run.config, data.config, self.work, run.folder / "tensorboard" / self.folder.name
        )
        self.scorer = Scorer.of(run.config, self.args, pad_token_id(run.tokenizer), run.reporter)

    @property
    def label(self) -> str:
        """Its name on progress bars."""
        return f"stage {self.index} {self.name}"

    @property
    def references(self) -> StageReferences:
        """What scores its references; made anew at each call, as generated pairs arrive after the stage has started."""
        config = self.run.config
        return StageReferences(
            scorer=self.scorer,
            tokens=self.data.tokens,
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

    def model_before(self, which: str) -> str:
        """The model that `previous` or `initial` names at this stage's start; `ema` and `multi`: the policy's."""
        if which in ("ema", "multi"):
            which = self.run.config.policy
        if which == "initial" or self.index == 1:
            return self.run.config.model
        return str(self.run.stage_folder(self.index - 1))

    @property
    def starts_as_reference(self) -> bool:
        """Whether the policy is its own reference at the stage's start."""
        config = self.run.config
        if config.reference in ("multi", "none"):
            return False
        return self.model_before(config.policy) == self.model_before(config.reference)
