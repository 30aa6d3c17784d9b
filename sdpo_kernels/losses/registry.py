"""The registry: every loss by its name, with its options and what it needs in addition to summed log-probs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdpo_kernels.losses.options import ALLOWED, NUMBER, Allowed, Option, nearest, require

PairLoss = Callable[..., Tensor]


@dataclass(frozen=True)
class Loss:
    """One entry: `function(pair, beta, *, options…) -> [B]` and what its callers must know."""

    name: str
    function: PairLoss
    options: Mapping[str, Option]  # with their defaults
    allowed: Mapping[str, Allowed]  # what each option may be
    beta: float = 0.1  # the default
    reference_free: bool = False  # reads no reference
    ln2_at_start: bool = False  # its value at policy = reference is ln 2
    weighs_tokens: bool = False  # its sums weigh the tokens beyond the pair's shorter length with ld_alpha
    weighs_pairs: bool = False  # it reads PairLogps.weights
    of_errors: bool = False  # it takes denoising errors in place of log-probs

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError for an option that the loss does not use, or a value that is not allowed."""
        for option, value in options.items():
            if option not in self.options:
                takes = ", ".join(self.options) or "none"
                hint = nearest(option, self.options)
                raise ValueError(f"{option}: the loss {self.name!r} does not use it; its options are: {takes}{hint}")
            require(option, value, self.allowed[option])
        if "f_alpha" in options and options.get("f_divergence") != "alpha":
            raise ValueError(f"f_alpha: was {options['f_alpha']!r}, but only f_divergence='alpha' uses it")


_REGISTRY: dict[str, Loss] = {}  # aliases are names of the same entry

# what papers and other trainers call losses that are registered under another name
_OTHER_NAMES = {
    "dpo": "sigmoid", "cdpo": "sigmoid", "slic": "hinge", "smaug": "dpop", "aot_pair": "aot",
}  # fmt: skip


def register(
    name: str, *aliases: str, allowed: Mapping[str, Allowed] | None = None, **traits: Any
) -> Callable[[PairLoss], PairLoss]:
    """Register `loss(pair, beta, *, options…) -> [B]` under `name`.

    Its keyword-only arguments are its options. `allowed` overrides or extends `options.ALLOWED`; an option in neither
    may be any finite number. `traits` are the other fields of `Loss`.
    """

    def enter(loss: PairLoss) -> PairLoss:
        # the signature is the one place where options and their defaults are written
        parameters = inspect.signature(loss).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        ranges = {option: {**ALLOWED, **(allowed or {})}.get(option, NUMBER) for option in options}
        entry = Loss(name, loss, options, ranges, **traits)
        for each in (name, *aliases):
            if each in _REGISTRY:
                raise ValueError(f"loss_type: {each!r} is already registered")
            _REGISTRY[each] = entry
        return loss

    return enter


def loss_names() -> list[str]:
    """The names of the losses, without aliases."""
    return sorted({loss.name for loss in _REGISTRY.values()})


def loss_options(name: str) -> dict[str, Option]:
    """The options that the loss `name` takes, with their defaults."""
    return dict(lookup(name).options)


def starts_at_ln2(name: str) -> bool:
    """Whether `name` is a loss whose value at policy = reference is ln 2."""
    return name in _REGISTRY and _REGISTRY[name].ln2_at_start


def lookup(name: str) -> Loss:
    """The entry under `name` or an alias; ValueError if there is none."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ValueError(f"loss_type: {_unknown(name)}")
    return _REGISTRY[name]


def _unknown(name: Any) -> str:
    """What is wrong with a name that is no loss: the losses of log-probs there are, and the one that may be meant."""
    known = [loss for loss in loss_names() if not _REGISTRY[loss].of_errors]
    other = _OTHER_NAMES.get(str(name).lower())
    hint = f"; did you mean {other!r}?" if other else nearest(name, _REGISTRY)

    # no trainer takes it, but losses.pair_loss does
    if of_errors := next((loss for loss in _REGISTRY if _REGISTRY[loss].of_errors and repr(loss) in hint), None):
        hint = f"; {of_errors!r} takes denoising errors, with losses.pair_loss only"
    return f"was {name!r}, must be one of: {', '.join(known)}{hint}"
