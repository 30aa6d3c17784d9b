"""Pair losses: a few lines of arithmetic each on [B]-sized tensors, found by name in one registry.

    losses.pair_loss("sigmoid", pair, beta=0.1, label_smoothing=0.1)    # -> [B]

autograd on these small tensors makes the coefficients that the kernels' backward needs, so a new loss cannot drift
from the kernels. An entry's keyword-only arguments are its options; any other option is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PairLogps(NamedTuple):
    """Summed log-probs [B] of chosen and rejected under policy and reference, and the counts of scored tokens [B]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_counts: Tensor
    rejected_counts: Tensor

    @property
    def chosen_logratio(self) -> Tensor:
        """a = log π(y_w) − log π_ref(y_w), [B]."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """b = log π(y_l) − log π_ref(y_l), [B]."""
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        """Δ = a − b, [B]."""
        return self.chosen_logratio - self.rejected_logratio


PairLoss = Callable[..., Tensor]
_REGISTRY: dict[str, PairLoss] = {}


def register(name: str) -> Callable[[PairLoss], PairLoss]:
    """Enter `loss(pair, beta, *, options…) -> [B]` under `name`."""

    def enter(loss: PairLoss) -> PairLoss:
        if name in _REGISTRY:
            raise ValueError(f"loss_type: {name!r} is registered already")
        _REGISTRY[name] = loss
        return loss

    return enter


def loss_names() -> list[str]:
    """The names `pair_loss` knows."""
    return sorted(_REGISTRY)


def loss_options(name: str) -> dict[str, float]:
    """The options that the loss `name` takes, with their defaults."""
    parameters = inspect.signature(_lookup(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_loss(name: str, beta: float, **options: float) -> None:
    """Raise ValueError where the name is unknown, the loss does not use an option, or a value is out of range."""
    known = loss_options(name)
    if not (isinstance(beta, (int, float)) and 0 < beta < float("inf")):
        raise ValueError(f"beta: was {beta!r}, must be a finite number above 0")
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "none"
            raise ValueError(f"{option}: the loss {name!r} does not use it; its options are: {takes}")
    if "label_smoothing" in options:
        _require_smoothing(options["label_smoothing"])


def pair_loss(name: str, pair: PairLogps, beta: float = 0.1, **options: float) -> Tensor:
    """The loss `name` of each pair, [B]."""
    check_loss(name, beta, **options)
    return _lookup(name)(pair, beta, **options)


def _lookup(name: str) -> PairLoss:
    if name not in _REGISTRY:
        raise ValueError(f"loss_type: was {name!r}, must be one of: {', '.join(loss_names())}")
    return _REGISTRY[name]


def _require_smoothing(label_smoothing: float) -> None:
    if not (isinstance(label_smoothing, (int, float)) and 0.0 <= label_smoothing < 0.5):
        raise ValueError(f"label_smoothing: was {label_smoothing!r}, must be at least 0 and below 0.5")


@register("sigmoid")
def sigmoid(pair: PairLogps, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """−log σ(βΔ) (DPO, arXiv 2305.18290, eq. 7); label_smoothing ε gives cDPO: −(1−ε) log σ(z) − ε log σ(−z)."""
    z = beta * pair.delta
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


@register("robust")
def robust(pair: PairLogps, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """[−(1−ε) log σ(z) + ε log σ(−z)] / (1−2ε), z = βΔ: unbiased under labels flipped at rate ε (arXiv 2403.00409)."""
    z = beta * pair.delta
    kept = -(1 - label_smoothing) * F.logsigmoid(z) + label_smoothing * F.logsigmoid(-z)
    return kept / (1 - 2 * label_smoothing)


@register("hinge")
def hinge(pair: PairLogps, beta: float) -> Tensor:
    """max(0, 1 − βΔ), with slope 0 at the kink (SLiC, arXiv 2305.10425, as DPO trainers use it)."""
    return F.relu(1 - beta * pair.delta)


@register("ipo")
def ipo(pair: PairLogps, beta: float) -> Tensor:
    """(a/|w| − b/|l| − 1/(2β))² on log-probs averaged over tokens (IPO, arXiv 2310.12036, eq. 17)."""
    mean_delta = pair.chosen_logratio / pair.chosen_counts - pair.rejected_logratio / pair.rejected_counts
    return (mean_delta - 1 / (2 * beta)).square()
