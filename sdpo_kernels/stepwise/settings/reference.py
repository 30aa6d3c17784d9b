"""The sections `multi` and `ema` of run.yaml: what two of the reference modes need beside their name.

reference: multi (MRPO, arXiv 2405.16388) scores several models and mixes their log-probs once, before a stage.
reference: ema (SAPO, arXiv 2405.20830) lets the reference follow the policy while a stage trains.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, show
from sdpo_kernels.stepwise.settings.types import Integer, Number, Section, Text

PUBLISHED_SYNC_STEPS = 108  # of SAPO's code


def _weights(value: Any) -> Any:
    if value != "adaptive" and not isinstance(value, (list, tuple)):
        raise ValueError(f"was {show(value)}, must be adaptive or a list of numbers")
    return value


class MultiSettings(Section):
    """MRPO: the references beside the base, which is the model that the stage's policy starts from.

    models: folders or hub names; with the base they are the K references.
    epsilon: how far a reference's log-prob may lie from the base's, as a share of it; 0 leaves the base alone.
    alpha: adaptive, or K weights above 0 that sum to 1, the base's first.
    alpha_convention: `formula` is the paper's; `published` its code's, for K = 2 only: the weights change places.
    """

    models: Annotated[tuple[Text, ...], Field(min_length=1)]
    epsilon: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    alpha: Annotated[Literal["adaptive"] | tuple[Number, ...], BeforeValidator(_weights)] = "adaptive"
    alpha_convention: Literal["formula", "published"] = "formula"

    @model_validator(mode="after")
    def _consistent(self) -> MultiSettings:
        count, mistakes = len(self.models) + 1, []
        if self.alpha != "adaptive":
            if len(self.alpha) != count:
                text = f"were {len(self.alpha)} numbers, must be {count}: one for each reference, the base's first"
                mistakes.append(("alpha", text))
            elif min(self.alpha) <= 0 or abs(sum(self.alpha) - 1) > 1e-6:
                mistakes.append(("alpha", f"was {show(list(self.alpha))}, must be above 0 each and sum to 1"))
        if self.alpha_convention == "published" and count != 2:
            text = f"was 'published', must be formula with {count} references: the published code knows two"
            mistakes.append(("alpha_convention", text))
        if mistakes:
            raise SettingErrors(mistakes)
        return self


class EmaSettings(Section):
    """SAPO: a running average of the policy, and what the reference becomes every `sync_steps` optimiser steps.

    decay: share of itself that the average keeps at each optimiser step.
    mode: `ema` the reference becomes the average, `policy` the policy itself, `fixed` it stays what it was.
    sync_steps: 108 where nothing is said, as published; not with mode: fixed.
    """

    decay: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    mode: Literal["ema", "policy", "fixed"] = "ema"
    sync_steps: Annotated[Integer, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> EmaSettings:
        if self.mode == "fixed" and self.sync_steps is not None:
            raise SettingErrors([("sync_steps", f"was {self.sync_steps}, but mode: fixed never moves the reference")])
        return self

    @property
    def period(self) -> int | None:
        """Optimiser steps from one sync to the next; None: never."""
        return None if self.mode == "fixed" else self.sync_steps or PUBLISHED_SYNC_STEPS


def reference_mistakes(reference: str, multi: MultiSettings | None, ema: EmaSettings | None) -> list[tuple[str, str]]:
    """(key, what is wrong) where a section and the mode that reads it do not stand together."""
    mistakes = []
    if reference == "multi" and multi is None:
        mistakes.append(("multi", "is required with reference: multi (its models are the references beside the base)"))
    for name, section in (("multi", multi), ("ema", ema)):
        if section is not None and reference != name:
            mistakes.append((name, f"was given, but only reference: {name} uses it (reference is {reference})"))
    return mistakes
