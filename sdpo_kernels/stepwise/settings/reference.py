"""The settings `multi`, `ema` and `guiding` of run.yaml, one for each of three reference modes.

reference: multi (MRPO, arXiv 2405.16388) scores several models before a stage and mixes their log-probs.
reference: guiding (Pre-DPO, arXiv 2504.15843) scores one other model, trained on the same pairs before.
reference: ema (SAPO, arXiv 2405.20830) lets the reference follow the policy while a stage trains.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, show
from sdpo_kernels.stepwise.settings.types import Count, Number, Section, Text

PUBLISHED_SYNC_STEPS = 108  # in SAPO's code


def _weights(value: Any) -> Any:
    if value != "adaptive" and not isinstance(value, (list, tuple)):
        raise ValueError(f"was {show(value)}, must be adaptive or a list of numbers")
    return value


class MultiSettings(Section):
    """Settings of `reference: multi` (MRPO): more references next to the base, the model a stage's policy starts from.

    Args:
        models: Folders or Hub names of the additional references. Together with the base they are the K references.
        epsilon: How far a reference's log-prob may deviate from the base's, as a fraction of it. With 0 only the base
            counts.
        alpha: Weights of the references: 'adaptive', or a list of K positive numbers that sum to 1, the base's first.
        alpha_convention: 'formula' follows the paper. 'published' follows the authors' code, which swaps the two
            weights; it supports K = 2 only.
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
                text = (
                    f"was of length {len(self.alpha)}, must be of length {count}: one weight per reference, base first"
                )
                mistakes.append(("alpha", text))
            elif min(self.alpha) <= 0 or abs(sum(self.alpha) - 1) > 1e-6:
                mistakes.append(("alpha", f"was {show(list(self.alpha))}, must be positive numbers that sum to 1"))

        # swapping the weights has no meaning for more than two references
        if self.alpha_convention == "published" and count != 2:
            text = f"was 'published', must be formula with {count} references: the published code supports only two"
            mistakes.append(("alpha_convention", text))

        if mistakes:
            raise SettingErrors(mistakes)
        return self


class EmaSettings(Section):
    """Settings of `reference: ema` (SAPO): a running average of the policy that updates the reference now and then.

    Args:
        decay: Fraction of itself that the average keeps at each optimizer step.
        mode: What the reference becomes at a sync: 'ema' the average, 'policy' the policy itself; 'fixed' never syncs
            the reference and only keeps the average.
        sync_steps: Optimizer steps between two syncs, 108 by default as published. Not allowed with `mode: fixed`.
    """

    decay: Annotated[Number, Field(ge=0, lt=1)] = 0.5
    mode: Literal["ema", "policy", "fixed"] = "ema"
    sync_steps: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> EmaSettings:
        if self.mode == "fixed" and self.sync_steps is not None:
            text = f"was {self.sync_steps}, but mode: fixed never updates the reference"
            raise SettingErrors([("sync_steps", text)])
        return self

    @property
    def period(self) -> int | None:
        """Optimizer steps between two syncs; None if there are none."""
        return None if self.mode == "fixed" else self.sync_steps or PUBLISHED_SYNC_STEPS


def reference_mistakes(
    reference: str, multi: MultiSettings | None, ema: EmaSettings | None, guiding: str | None
) -> list[tuple[str, str]]:
    """(key, what is wrong) where `multi`, `ema` and `guiding` do not fit the reference mode."""
    mistakes = []
    if reference == "multi" and multi is None:
        mistakes.append(("multi", "is required with reference: multi (it lists the additional references)"))
    if reference == "guiding" and guiding is None:
        mistakes.append(("guiding", "is required with reference: guiding (it names the reference model)"))
    for name, section in (("multi", multi), ("ema", ema), ("guiding", guiding)):
        if section is not None and reference != name:
            mistakes.append((name, f"was given, but only reference: {name} uses it (reference is {reference})"))
    return mistakes
