"""The settings of a stage that generates its pairs: `source: {kind: …}` next to the stage's `prompts:`.

One class per kind; all kinds sample completions with the same settings. The implementations are in `sources/`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sdpo_kernels.stepwise.settings.generation import GenerationSettings
from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, show
from sdpo_kernels.stepwise.settings.types import Count, Integer, Number, Positive, Section
from sdpo_kernels.stepwise.settings.types import Text as Name


class Sampling(Section):
    """How completions are sampled. From the policy, equal settings and weights give equal samples.

    Args:
        samples: Completions per prompt.
        temperature: Sampling temperature.
        top_p: Nucleus sampling: only the most likely tokens whose probabilities sum to `top_p` can be drawn.
        max_new_tokens: Longest completion. One that has not ended by then is left out.
        batch_size: Completions that transformers generates at a time.
        sample_seed: Seed of the sampling, separate from `trainer.seed`.
        generation: What samples them.
    """

    samples: Annotated[Integer, Field(ge=2)] = 4
    temperature: Positive = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 256
    batch_size: Count = 16
    sample_seed: Annotated[Integer, Field(ge=0)] = 0
    generation: GenerationSettings = GenerationSettings()

    @field_validator("generation", mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _read_by_the_engine(self) -> Sampling:
        engine = self.generation.engine
        if engine != "transformers" and self.batch_size != Sampling.model_fields["batch_size"].default:
            text = f"was {self.batch_size}, but only engine: transformers uses it (engine is {engine})"
            raise SettingErrors([("batch_size", text)])
        return self

    def _require_policy(self, why: str) -> None:
        """A mistake if a server's model answers instead of the policy."""
        if self.generation.engine == "url":
            text = f"was {show(self.generation.url)}, must be left out with this kind: {why}"
            raise SettingErrors([("generation.url", text)])


class RankedSource(Sampling):
    """Pairs the best and the worst sample of each prompt by a reward (iLR-DPO, arXiv 2406.11817).

    Exactly one of `judge` and `reward_model` is required.

    Takes the settings of Sampling, too.

    Args:
        judge: A Python function that scores completions, as 'module:function'.
        reward_model: Folder or Hub name of a sequence classifier with one output.
    """

    kind: Literal["ranked"]
    judge: Name | None = None
    reward_model: Name | None = None

    @model_validator(mode="after")
    def _one_judge(self) -> RankedSource:
        if (self.judge is None) == (self.reward_model is None):
            was = "neither judge nor reward_model was" if self.judge is None else "both judge and reward_model were"
            raise SettingErrors([("judge", f"{was} set, must be exactly one of them")])
        return self


class ExecutionSource(Sampling):
    """Pairs programs that pass the user's checker with programs that fail it (CodeLLM DPO, arXiv 2410.18585).

    Takes the settings of Sampling, too.

    Args:
        command: The checker, as a list of words. It holds {completion}, and may hold {prompt}: paths of files.
        pairs_per_prompt: Most pairs of one prompt.
        workers: Programs that run at a time.
        seconds: Time that a program has.
        memory_mb: Memory that a program has.
        processes: Processes and threads that a program may have at a time.
        file_mb: Size of each file that a program writes, and of all of them.
        readable: Files and folders that the command may read, at their own paths.
        unsafe: Run programs without bubblewrap, with resource limits alone.
    """

    kind: Literal["execution"]
    command: Annotated[tuple[Name, ...], Field(min_length=1)]
    pairs_per_prompt: Count = 1
    workers: Count = 2
    seconds: Positive = 10.0
    memory_mb: Count = 1024
    processes: Count = 32
    file_mb: Count = 64
    readable: tuple[Name, ...] = ()
    unsafe: bool = False

    @model_validator(mode="after")
    def _readable_in_a_sandbox(self) -> ExecutionSource:
        if self.unsafe and self.readable:
            text = f"was {show(list(self.readable))}, must be left out with unsafe: true, where every file can be read"
            raise SettingErrors([("readable", text)])
        return self

    @model_validator(mode="after")
    def _has_completion(self) -> ExecutionSource:
        if not any("{completion}" in part for part in self.command):
            text = f"was {show(list(self.command))}, must contain {{completion}}, where the path of the program goes"
            raise SettingErrors([("command", text)])
        return self


class DiscriminatorSource(Sampling):
    """Pairs samples by a Bradley–Terry scorer, trained on gold labels where it is least sure (D2PO, arXiv 2405.01511).

    Takes the settings of Sampling, too.

    Args:
        judge: A Python function that gives the gold labels, as 'module:function'.
        budget: Pairs that get a gold label, per stage.
        scorer_epochs: Passes over all gold labels so far when the scorer is trained.
        scorer_learning_rate: Learning rate of the scorer.
        scorer_batch_size: Pairs per training step of the scorer.
    """

    kind: Literal["discriminator"]
    judge: Name
    budget: Count
    scorer_epochs: Count = 3
    scorer_learning_rate: Positive = 1e-4
    scorer_batch_size: Count = 16


class SelfAugmentedSource(Sampling):
    """Rejected answers are the reference answer with one segment rewritten by the policy (SAPO, arXiv 2405.20830).

    The prompt rows need an `answer` column. With `reference: ema` the running average rewrites, not the policy itself.

    Takes the settings of Sampling, too.

    Args:
        samples: Rewritten segments per prompt.
        segment_tokens: Length of a segment. `max_new_tokens` must be at least as large.
        buffer: Pairs kept over all stages; the oldest are removed first.
        pairs: Pairs drawn from the buffer for each stage.
    """

    kind: Literal["self_augmented"]
    samples: Count = 1
    segment_tokens: Count = 256
    buffer: Count = 2000
    pairs: Count

    @model_validator(mode="after")
    def _long_enough(self) -> SelfAugmentedSource:
        self._require_policy("the policy itself rewrites the segment")
        if self.max_new_tokens < self.segment_tokens:
            text = f"was {self.max_new_tokens}, must be at least segment_tokens, {self.segment_tokens}"
            raise SettingErrors([("max_new_tokens", text)])
        return self


class ActiveSource(Sampling):
    """Active learning: an annotator labels the pairs that teach most (APL, arXiv 2402.08114).

    These are pairs of prompts on which the policy's answers vary most (entropy), and of those the pairs whose implicit
    rewards differ most. The pairs of a stage are all labels so far.

    Takes the settings of Sampling, too.

    Args:
        judge: A Python function that acts as the annotator, as 'module:function'.
        acquire: Pairs labelled per stage.
        keep_prompts: How many prompts of highest entropy the pairs are chosen from, as a multiple of `acquire`.
    """

    kind: Literal["active"]
    judge: Name
    acquire: Count
    keep_prompts: Positive = 4.0

    @model_validator(mode="after")
    def _asks_the_policy(self) -> ActiveSource:
        self._require_policy("entropy and rewards are those of the policy's own answers")
        return self


Source = Annotated[
    RankedSource | ExecutionSource | DiscriminatorSource | SelfAugmentedSource | ActiveSource,
    Field(discriminator="kind"),
]
SOURCES: dict[str, type[Sampling]] = {
    "ranked": RankedSource,
    "execution": ExecutionSource,
    "discriminator": DiscriminatorSource,
    "self_augmented": SelfAugmentedSource,
    "active": ActiveSource,
}
