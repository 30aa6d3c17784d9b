"""One loss, or a weighted sum of several, as every entry point takes it; checked before anything is computed."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sdpo_kernels.losses.options import POSITIVE, Option, nearest, require
from sdpo_kernels.losses.pair_logps import PairLogps
from sdpo_kernels.losses.registry import Loss, lookup

KEYS = ("name", "weight", "options")


class Term(NamedTuple):
    """One loss of a sum, with its weight and the options given."""

    loss: Loss
    weight: float
    options: dict[str, Option]


class LossSum(NamedTuple):
    """Losses with their weights; usually one, of weight 1."""

    terms: tuple[Term, ...]

    def of(self, pair: PairLogps, beta: float) -> Tensor:
        """The sum for each pair, [B]."""
        return functools.reduce(operator.add, self.parts(pair, beta).values())

    def parts(self, pair: PairLogps, beta: float) -> dict[str, Tensor]:
        """Each term times its weight, [B], by the loss's name; a second term of one name is 'sigmoid_2'."""
        if self.weighs_pairs and pair.weights is None:
            raise ValueError("weights: was None, must be the weights [B] of the pairs, which 'wpo' needs")
        parts: dict[str, Tensor] = {}
        for place, (loss, weight, options) in enumerate(self.terms):
            before = [term.loss.name for term in self.terms[:place]].count(loss.name)
            name = f"{loss.name}_{before + 1}" if before else loss.name
            parts[name] = weight * loss.function(pair, beta, **options)
        return parts

    @property
    def label(self) -> str:
        """'sigmoid', or '0.8 sigmoid + 0.2 bco_pair'."""
        if len(self.terms) == 1 and self.terms[0].weight == 1:
            return self.terms[0].loss.name
        return " + ".join(f"{term.weight:g} {term.loss.name}" for term in self.terms)

    @property
    def reference_free(self) -> bool:
        """Whether no term reads a reference."""
        return all(term.loss.reference_free for term in self.terms)

    @property
    def weighs_pairs(self) -> bool:
        """Whether a term reads the pairs' weights."""
        return any(term.loss.weighs_pairs for term in self.terms)

    @property
    def of_errors(self) -> bool:
        """Whether a term takes denoising errors in place of log-probs."""
        return any(term.loss.of_errors for term in self.terms)

    @property
    def ld_alpha(self) -> float | None:
        """The weight of tokens beyond a pair's shorter length; None where all weigh the same."""
        for term in self.terms:
            if term.loss.weighs_tokens:
                return float({**term.loss.options, **term.options}["ld_alpha"])
        return None

    @property
    def start_value(self) -> float | None:
        """The value at policy = reference if every term is ln 2 there, else None."""
        if all(term.loss.ln2_at_start for term in self.terms):
            return math.log(2) * sum(term.weight for term in self.terms)
        return None


LossType = str | Sequence[str | Mapping[str, Any]] | LossSum


def loss_sum(loss_type: LossType, options: Mapping[str, Any] | None = None) -> LossSum:
    """Read a name with its options, or a list of names and of {name, weight (1), options ({})}.

    Raises:
        ValueError: naming the key (of an entry as '0.weight'), what it was and what it should be.
    """
    options = options or {}
    if isinstance(loss_type, LossSum) and not options:
        return loss_type
    if isinstance(loss_type, str):
        return LossSum((_term(loss_type, 1.0, options),))

    if options:
        raise ValueError(f"{next(iter(options))}: was given with a list of losses, must be in an entry's options")
    if not isinstance(loss_type, (list, tuple)) or not loss_type:
        raise ValueError(f"loss_type: was {loss_type!r}, must be a name or a list of {{name, weight, options}}")
    terms = tuple(_entry(index, entry) for index, entry in enumerate(loss_type))

    # weighted tokens are in the sums of log-probs, which all terms share
    if len(terms) > 1:
        for term in terms:
            if term.loss.weighs_tokens:
                raise ValueError(f"loss_type: {term.loss.name!r} weighs tokens in the sums, must be the only loss")
    return LossSum(terms)


def _entry(index: int, entry: Any) -> Term:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{index}: was {entry!r}, must be a name, or have the keys {', '.join(KEYS)}")
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"{index}.{key}: unknown key, must be one of {', '.join(KEYS)}{nearest(key, KEYS)}")
    if "name" not in entry:
        raise ValueError(f"{index}.name: is required")

    # `options:` without a value is None in YAML
    weight, options = entry.get("weight", 1.0), entry.get("options")
    require(f"{index}.weight", weight, POSITIVE)
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"{index}.options: was {options!r}, must be a mapping")
    return _term(entry["name"], float(weight), options or {}, f"{index}.")


def _term(name: str, weight: float, options: Mapping[str, Any], where: str = "") -> Term:
    try:
        loss = lookup(name)
    except ValueError as error:
        raise ValueError(where + str(error).replace("loss_type", "name", 1) if where else str(error)) from None
    try:
        loss.check(options)
    except ValueError as error:
        raise ValueError(f"{where}options.{error}" if where else str(error)) from None
    return Term(loss, weight, dict(options))


def check_loss(loss_type: LossType, beta: float, **options: Any) -> None:
    """Raise ValueError if a name is unknown, a loss does not use an option, or a value is not allowed."""
    loss_sum(loss_type, options)
    require("beta", beta, POSITIVE)


def pair_loss(loss_type: LossType, pair: PairLogps, beta: float | None = None, **options: Any) -> Tensor:
    """The loss `loss_type` of each pair, [B]: a name with its options, or a list of {name, weight, options}.

    beta: above 0; None means 0.1, and 5000 for diffusion_dpo.

    Raises:
        ValueError: naming the argument, what it was and what it should be.
    """
    wanted = loss_sum(loss_type, options)
    beta = wanted.terms[0].loss.beta if beta is None else beta
    require("beta", beta, POSITIVE)
    return wanted.of(pair, beta)
