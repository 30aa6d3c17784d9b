"""The settings `loss` and `loss_options` of a run: the name of a loss, or a weighted list of losses.

loss: dpop                                   loss: [{name: sigmoid, weight: 0.8}, {name: bco_pair, weight: 0.2},
loss_options: {dpop_lambda: 50}                     {name: dpop, options: {dpop_lambda: 5}}]
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator

from sdpo_kernels import losses
from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, show


def _read(value: Any) -> str | tuple[dict[str, Any], ...]:
    """A name, or the list with each entry's name, weight and options filled in."""
    if isinstance(value, str):
        try:
            losses.loss_sum(value)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("loss_type: ")) from None
        return value

    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"was {show(value)}, must be a name or a list of {{name, weight, options}}")

    try:
        terms = losses.loss_sum(value).terms
    except ValueError as error:
        # the losses name the entry at fault ('0.weight: …'), which belongs into the key of the error line
        key, _, text = str(error).partition(": ")
        raise (ValueError(text) if key == "loss_type" else SettingErrors([(key, text)])) from None
    return tuple({"name": term.loss.name, "weight": term.weight, "options": term.options} for term in terms)


Loss = Annotated[Any, PlainValidator(_read)]  # str or tuple of dicts


def loss_mistakes(config: Any) -> list[tuple[str, str]]:
    """Contradictions between `loss`, `loss_options` and `reference` of a RunConfig, as (key, what is wrong)."""
    try:
        wanted = losses.loss_sum(config.loss, config.loss_options)
    except ValueError as error:
        return [("loss_options", str(error))]

    mistakes = []
    if wanted.of_errors:
        text = f"was {wanted.label!r}, which takes denoising errors, not log-probs; call losses.pair_loss for it"
        mistakes.append(("loss", text))

    # 'previous' is the default, so it says nothing about what the user wants
    if wanted.reference_free and config.reference not in ("previous", "none"):
        text = f"was {config.reference!r}, but {wanted.label} uses no reference; remove the key or set it to none"
        mistakes.append(("reference", text))
    return mistakes
