"""The section `post:` of run.yaml: what is done after the last stage."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, create_model, field_validator

from sdpo_kernels.stepwise.settings.mistakes import show
from sdpo_kernels.stepwise.settings.types import Section

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5)  # searched by default, next to 0; the paper finds 0.3 to 0.5 for most models
Metric = Literal["pair_accuracy", "pair_accuracy_per_token", "reward_accuracy", "reward_margin", "gamma"]
DEFAULT_METRIC: Metric = "pair_accuracy"

# `from` is a keyword, so a class body cannot declare the field
_from: Any = {"from": (Literal["initial", "previous"], "initial")}
_From: Any = create_model("_From", __base__=Section, **_from)


class ExpoSettings(_From):
    """Settings of ExPO (arXiv 2404.16792), which extrapolates the weights: M + α(M − M₀).

    Args:
        from: The model to extrapolate away from: 'initial' (M₀, the run's `model`) or 'previous' (the model of the
            stage before the last).
        alpha: A number, or a list of numbers. From a list, and 0, the best by `metric` on `eval_data` is kept.
        metric: The metric of that search, 'pair_accuracy' by default.
    """

    alpha: Any = ALPHAS  # float or tuple of floats; a union type would make pydantic warn when it writes JSON
    metric: Metric | None = None  # None stands for DEFAULT_METRIC

    @field_validator("alpha", mode="plain")
    @classmethod
    def _alpha(cls, value: Any) -> float | tuple[float, ...]:
        many = isinstance(value, (list, tuple))
        numbers = list(value) if many else [value]
        valid = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
        if not (valid and numbers and all(n > 0 for n in numbers)):
            raise ValueError(f"was {show(value)}, must be a number above 0 or a list of such numbers")
        return tuple(map(float, numbers)) if many else float(value)

    @property
    def start(self) -> str:
        """θ0, the key `from`: 'initial' for M₀ or 'previous' for the model of the stage before the last."""
        return getattr(self, "from")

    @property
    def alpha_text(self) -> str:
        """α as shown to the user."""
        if isinstance(self.alpha, float):
            return f"α {self.alpha:g}"
        return f"the best α of 0, {', '.join(f'{alpha:g}' for alpha in self.alpha)}"

    @property
    def alphas(self) -> tuple[float, ...] | None:
        """The values to search; None if a single α is given."""
        return self.alpha if isinstance(self.alpha, tuple) else None


class PostSettings(Section):
    """What is done after the last stage.

    Args:
        expo: Write a model extrapolated by ExPO; not done if the key is absent.
    """

    expo: ExpoSettings | None = Field(default=None)


def post_mistakes(config: Any) -> list[tuple[str, str]]:
    """Settings of a run (a RunConfig) that contradict its `post` section: (key, what it was and must be)."""
    expo = config.post.expo if config.post is not None else None
    if expo is None:
        return []

    # of a quantised run the difference of whole weights would be mostly the rounding of the base
    if config.quantization is not None or not config.publishes_merged:
        why = "quantization" if config.quantization is not None else "lora.publish: adapter"
        text = (
            f"cannot be done with {why}: it extrapolates whole weights, and what was trained is the adapter. Scaling "
            "the adapter is the same: sdpo expo MODEL OUTPUT_DIR/stage-N-NAME/adapter NEW_FOLDER --alpha 0.3"
        )
        return [("post.expo", text)]

    # a search over alphas needs pairs to compare them on; a single alpha needs no search
    mistakes = []
    if expo.alphas is not None and config.eval_data is None:
        mistakes.append(("eval_data", "is required with a list in post.expo.alpha: the best alpha is chosen on it"))
    if expo.alphas is None and expo.metric is not None:
        text = f"was {show(expo.metric)}, but is used only with a list in post.expo.alpha"
        mistakes.append(("post.expo.metric", text))

    # extrapolation must start where the last stage's training started
    if expo.start == "previous" and config.policy != "previous":
        text = (
            f"was 'previous', must be initial: with policy: {config.policy} every stage starts from the initial model"
        )
        mistakes.append(("post.expo.from", text))
    elif expo.start == "previous" and config.lora is not None and config.dtype != "float32":
        text = (
            "was 'previous', must be initial with lora on a bfloat16 base: there is no single adapter to scale, and "
            "rounding merged weights to bfloat16 would lose what was learned"
        )
        mistakes.append(("post.expo.from", text))
    return mistakes
