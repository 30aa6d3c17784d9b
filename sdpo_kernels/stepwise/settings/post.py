"""The section `post:` of a run's settings: what is done after its last stage."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator

from sdpo_kernels.stepwise.settings.mistakes import show

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5)  # what a search tries beside 0; the paper finds 0.3 to 0.5 for most models
Metric = Literal["pair_accuracy", "pair_accuracy_per_token", "reward_accuracy", "reward_margin", "gamma"]
DEFAULT_METRIC: Metric = "pair_accuracy"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# `from` is no name that a class body can hold
_from: Any = {"from": (Literal["initial", "previous"], "initial")}
_From: Any = create_model("_From", __base__=_Section, **_from)


class ExpoSettings(_From):
    """ExPO, arXiv 2404.16792. `alpha` is a number, or a list to choose from by `metric` on the run's eval_data."""

    alpha: Any = ALPHAS  # a float or a tuple of floats: pydantic warns of a union that it writes as JSON
    metric: Metric | None = None  # of a search; DEFAULT_METRIC where it is left out

    @field_validator("alpha", mode="plain")
    @classmethod
    def _alpha(cls, value: Any) -> float | tuple[float, ...]:
        many = isinstance(value, (list, tuple))
        numbers = list(value) if many else [value]
        right = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
        if not (right and numbers and all(n > 0 for n in numbers)):
            raise ValueError(f"was {show(value)}, must be a number above 0 or a list of such numbers")
        return tuple(map(float, numbers)) if many else float(value)

    @property
    def start(self) -> str:
        """θ0: `initial` for M₀, `previous` for the model of the stage before the last."""
        return getattr(self, "from")

    @property
    def alpha_text(self) -> str:
        """What α will be, for people."""
        if isinstance(self.alpha, float):
            return f"α {self.alpha:g}"
        return f"the best α of 0, {', '.join(f'{alpha:g}' for alpha in self.alpha)}"

    @property
    def alphas(self) -> tuple[float, ...] | None:
        """What is searched; None for one given α."""
        return self.alpha if isinstance(self.alpha, tuple) else None


class PostSettings(_Section):
    """What is done after the last stage."""

    expo: ExpoSettings | None = Field(default=None)


def post_mistakes(config: Any) -> list[tuple[str, str]]:
    """Settings of a run (a RunConfig) that contradict its post-steps: (key, what it was and should be)."""
    expo = config.post.expo if config.post is not None else None
    if expo is None:
        return []
    mistakes = []
    if expo.alphas is not None and config.eval_data is None:
        mistakes.append(("eval_data", "is required with a list in post.expo.alpha: the best is chosen by it"))
    if expo.alphas is None and expo.metric is not None:
        mistakes.append(("post.expo.metric", f"was {show(expo.metric)}, but only a list in post.expo.alpha uses it"))
    if expo.start == "previous" and config.policy != "previous":
        mistakes.append(
            ("post.expo.from", f"was 'previous', must be initial: that is where stages start (policy: {config.policy})")
        )
    elif expo.start == "previous" and config.lora is not None and config.dtype != "float32":
        text = "was 'previous', must be initial with lora on a bfloat16 base: no one adapter is left to scale, and "
        mistakes.append(("post.expo.from", text + "rounded to bfloat16 merged weights lose what was learned"))
    return mistakes
