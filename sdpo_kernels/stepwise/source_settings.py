"""The settings of a stage whose pairs are made instead of read: `prompts:` and `source: {kind: …}` of a stage.

One class a kind; every kind samples completions with the same settings. What they do is in `sources/`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sdpo_kernels.stepwise.setting_errors import SettingErrors, show


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"was {show(value)}, must be a number")
    return value


Count = Annotated[int, Field(ge=1), BeforeValidator(_no_bool)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_bool)]
Name = Annotated[str, Field(min_length=1)]


class Sampling(BaseModel):
    """How completions are drawn from the policy; the same settings and weights give the same samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: Annotated[int, Field(ge=2), BeforeValidator(_no_bool)] = 4  # completions a prompt
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), BeforeValidator(_no_bool)] = 1.0
    max_new_tokens: Count = 256
    batch_size: Count = 16  # completions generated at a time
    sample_seed: Annotated[int, Field(ge=0), BeforeValidator(_no_bool)] = 0


class RankedSource(Sampling):
    """iLR-DPO (arXiv 2406.11817): the best against the worst of a prompt's samples by a reward."""

    kind: Literal["ranked"]
    judge: Name | None = None  # 'module:function'
    reward_model: Name | None = None  # a folder or hub name of a sequence classifier with one output

    @model_validator(mode="after")
    def _one_judge(self) -> RankedSource:
        if (self.judge is None) == (self.reward_model is None):
            was = "neither" if self.judge is None else "both"
            raise SettingErrors([("judge", f"{was} judge and reward_model were set, must be exactly one of them")])
        return self


class ExecutionSource(Sampling):
    """CodeLLM DPO (arXiv 2410.18585): programs that pass the user's checker against programs that fail it."""

    kind: Literal["execution"]
    command: Annotated[tuple[Name, ...], Field(min_length=1)]  # holds {completion}, may hold {prompt}: paths of files
    pairs_per_prompt: Count = 1
    workers: Count = 2
    seconds: Positive = 10.0
    memory_mb: Count = 1024
    processes: Count = 32
    file_mb: Count = 64
    readable: tuple[Name, ...] = ()  # files and folders that the command may read, at their own paths
    unsafe: bool = False  # run it without bubblewrap, with resource limits alone

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
    """D2PO (arXiv 2405.01511): a Bradley–Terry scorer labels samples; gold labels go where it is least sure."""

    kind: Literal["discriminator"]
    judge: Name  # 'module:function', the gold labels
    budget: Count  # pairs with a gold label, each stage
    scorer_epochs: Count = 3
    scorer_learning_rate: Positive = 1e-4
    scorer_batch_size: Count = 16


class SelfAugmentedSource(Sampling):
    """SAPO (arXiv 2405.20830): a segment of the reference answer, written again by the EMA of the policy."""

    kind: Literal["self_augmented"]
    samples: Annotated[int, Field(ge=1), BeforeValidator(_no_bool)] = 1  # segments written anew a prompt
    segment_tokens: Count = 256
    buffer: Count = 2000  # pairs kept, first in first out, over all stages
    pairs: Count  # drawn from the buffer for a stage

    @model_validator(mode="after")
    def _long_enough(self) -> SelfAugmentedSource:
        if self.max_new_tokens < self.segment_tokens:
            text = f"was {self.max_new_tokens}, must be at least segment_tokens, {self.segment_tokens}"
            raise SettingErrors([("max_new_tokens", text)])
        return self


class ActiveSource(Sampling):
    """APL (arXiv 2402.08114): the annotator is asked where the policy is unsure of words and sure of rewards."""

    kind: Literal["active"]
    judge: Name  # 'module:function', the annotator
    acquire: Count  # pairs labelled a round
    keep_prompts: Positive = 4.0  # prompts of highest entropy that pairs are chosen from, as a multiple of `acquire`


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
