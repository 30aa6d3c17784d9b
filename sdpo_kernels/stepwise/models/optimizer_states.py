"""How much memory an optimizer of `trainer.optim` needs for its states, computed from the weights it trains.

states = OptimizerStates.of("adamw_torch_fused")
states.bytes_of(weights), states.known     # 2 numbers a weight, in the weight's dtype
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

BLOCK = 256  # weights that share one float32 scale in 8-bit states
SMALL = 4096  # bitsandbytes keeps float32 states for tensors with fewer weights

# states a weight; the longest name that an optimizer's name contains counts
_COUNTS = {
    "adam": 2, "sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "lomo": 0, "adalomo": 0, "ademamix": 3, "grokadamw": 3,
}  # fmt: skip
_UNKNOWN = ("galore", "apollo")  # their size depends on a rank in optim_args


@dataclass(frozen=True)
class OptimizerStates:
    """The states of one kind of optimizer."""

    name: str
    count: int  # numbers a weight
    bits: int | None  # of each; None: those of the weight
    factored: bool = False  # adafactor: a row and a column of sums for each matrix
    known: bool = True  # False: Adam is assumed

    @classmethod
    def of(cls, name: str) -> OptimizerStates:
        """The optimizer that `trainer.optim` names; Adam if its states are not known here."""
        if name == "adafactor":
            return cls(name, 1, 32, factored=True)
        found = [part for part in _COUNTS if part in name]
        if not found or any(part in name for part in _UNKNOWN):
            return cls(name, 2, None, known=False)

        # bitsandbytes' names end in their width, except rmsprop_bnb
        bits = {"8bit": 8, "4bit": 4, "32bit": 32, "bnb": 32}
        width = next((width for part, width in bits.items() if part in name), None)
        return cls(name, _COUNTS[max(found, key=len)], width)

    def bytes_of(self, weights: Iterable[Tensor]) -> int:
        """Bytes of the states of `weights`, which may be on the meta device."""
        return sum(self._of_one(weight) for weight in weights)

    def _of_one(self, weight: Tensor) -> int:
        numbers = weight.numel()
        if self.factored:
            *others, last = weight.shape or (1,)
            sums = numbers if len(weight.shape) < 2 else math.prod(others) + math.prod(others[:-1]) * last
            return 4 * sums
        if self.bits is None:
            return self.count * numbers * weight.element_size()
        if self.bits == 32 or numbers < SMALL:
            return self.count * numbers * 4
        return self.count * (numbers * self.bits // 8 + 4 * -(-numbers // BLOCK))
