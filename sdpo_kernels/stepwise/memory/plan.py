"""The memory plan: what one GPU holds at each moment of a step, and the moment when that is most.

plan = Plan.of(Measured(model_config), batch, scored, setup)
plan.fullest.parts       # {"weights": bytes, "gradients": bytes, …}
plan.total
"""

from __future__ import annotations

from dataclasses import dataclass

from sdpo_kernels.stepwise.memory.batch import MicroBatch
from sdpo_kernels.stepwise.memory.moments import Moment, Moments
from sdpo_kernels.stepwise.memory.setup import Setup
from sdpo_kernels.stepwise.memory.sizes import Measured, Sizes
from sdpo_kernels.stepwise.models.optimizer_states import OptimizerStates

RESERVE = 2**30  # of a GPU, for CUDA's own state and for gaps between blocks: assumed, not measured


@dataclass(frozen=True)
class Plan:
    """The memory of one stage on one GPU."""

    setup: Setup
    batch: MicroBatch
    sizes: Sizes
    moments: tuple[Moment, ...]

    @classmethod
    def of(cls, model: Measured, batch: MicroBatch, scored: int, setup: Setup) -> Plan:
        """Plan the training of this model on `batch`; the largest batch that is scored has `scored` tokens.

        Raises whatever building or tracing the model raises.
        """
        sizes, found = model.measure(batch, setup)
        return cls(setup, batch, sizes, tuple(Moments(setup, batch, scored, sizes, found).all()))

    @property
    def fullest(self) -> Moment:
        """The moment with most memory."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return self.fullest.total

    @property
    def tensors(self) -> int:
        """Bytes of tensors at the moment with most of them: without what the head's kernels allocate themselves."""
        return max(moment.total - moment.scratch for moment in self.moments)

    @property
    def fits(self) -> bool:
        """Whether the total is within the GPU's memory, with the reserve."""
        return self.setup.memory is None or self.total + RESERVE <= self.setup.memory

    @property
    def knows_optimizer(self) -> bool:
        """Whether the optimizer's states are known; Adam's are assumed if not."""
        return OptimizerStates.of(self.setup.optimizer).known
