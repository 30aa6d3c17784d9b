"""How many steps a stage takes, which pairs they train on, and in which order.

    schedule = Schedule.of(len(tokens), args, processes=1)
    schedule.steps, schedule.used()      # 20, and the sorted indices of the pairs that these 20 steps train on
    schedule.sampler()                   # what Trainer draws its batches from

Trainer's batches and `used` come from the same sampler and the same batches (`global_batches`), so that the pairs whose
references are scored are those that are trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler
from transformers import TrainingArguments

from sdpo_kernels.stepwise.common.units import write_part
from sdpo_kernels.stepwise.data.rank_batches import global_batches


class PairOrder(Sampler[int]):
    """The indices of `count` pairs: with a seed permuted, differently in each epoch; with None as they are.

    The permutation depends on seed and epoch alone. It is that of accelerate's SeedableRandomSampler.
    """

    def __init__(self, count: int, seed: int | None) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer calls this at the start of each epoch, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            return iter(range(self.count))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).tolist())

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Schedule:
    """The steps of a stage, counted as Trainer counts them."""

    pairs: int  # of the stage
    batch: int  # pairs in a micro-batch, over all processes
    accumulation: int  # micro-batches in a step
    drop_last: bool  # whether an epoch's last batch is left out if it is smaller
    epochs: float
    max_steps: int  # -1: `epochs` decides
    seed: int | None  # of the order; None: the order of the data
    order_is_known: bool  # False: Trainer draws the order while it trains

    @classmethod
    def of(cls, pairs: int, args: TrainingArguments, processes: int) -> Schedule:
        """The schedule of a stage of `pairs` pairs with these arguments on `processes` processes."""
        seed = args.seed if args.data_seed is None else args.data_seed
        is_random = args.train_sampling_strategy != "sequential"

        # accelerate's settings can replace the accumulation, and its own order by one of torch's global generator
        accelerate: Any = args.accelerator_config  # TrainingArguments has made an object of it
        accumulation = (accelerate.gradient_accumulation_kwargs or {}).get("num_steps", 1)
        return cls(
            pairs,
            args.train_batch_size * processes,
            max(args.gradient_accumulation_steps, accumulation),
            args.dataloader_drop_last,
            args.num_train_epochs,
            args.max_steps,
            seed if is_random else None,
            accelerate.use_seedable_sampler or not is_random,
        )

    @property
    def batches(self) -> int:
        """Micro-batches in an epoch; 0 if `drop_last` leaves out the only one."""
        return self.pairs // self.batch if self.drop_last else -(-self.pairs // self.batch)

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps in an epoch: a last partial accumulation counts."""
        return max(1, -(-self.batches // self.accumulation))

    @property
    def steps_of_epochs(self) -> int:
        """The optimizer steps that `epochs` alone would give."""
        return math.ceil(self.epoch_steps * self.epochs)

    @property
    def steps(self) -> int:
        """The optimizer steps of the stage."""
        return self.max_steps if self.max_steps > 0 else self.steps_of_epochs

    def sampler(self) -> PairOrder | None:
        """What Trainer draws its batches from; None if that is Trainer's own sampler, whose order is not known."""
        return PairOrder(self.pairs, self.seed) if self.order_is_known else None

    def used(self) -> NDArray[np.int64]:
        """The sorted indices of the pairs that the steps train on; all of them if the order is not known."""
        sampler = self.sampler()
        is_whole_epoch = self.steps >= self.epoch_steps and self.batches * self.batch >= self.pairs
        if sampler is None or is_whole_epoch:
            return np.arange(self.pairs)

        found = np.zeros(self.pairs, np.bool_)
        batches = global_batches(sampler, self.batch, self.drop_last)
        for epoch in range(-(-self.steps // self.epoch_steps)):
            sampler.set_epoch(epoch)
            left = (self.steps - epoch * self.epoch_steps) * self.accumulation
            for batch in islice(batches, left):
                found[batch] = True
            if found.all():
                break
        return np.flatnonzero(found)

    def note(self, name: str) -> str | None:
        """What a user may not expect of the stage `name`: that pairs are left out, or that `epochs` does not count."""
        used = len(self.used())
        parts = [f"trains on {write_part(used, self.pairs)} pairs"] if used < self.pairs else []
        if self.max_steps > 0 and self.max_steps != self.steps_of_epochs:
            verb = "ends it before" if self.max_steps < self.steps_of_epochs else "goes on after"
            epochs = f"{self.epochs:g} epoch{'' if self.epochs == 1 else 's'}"
            steps = f"{self.steps_of_epochs:,} step{'' if self.steps_of_epochs == 1 else 's'}"
            parts.append(f"max_steps {self.max_steps:,} {verb} its {epochs} ({steps})")
        elif parts:
            parts.append(f"epochs {self.epochs:g}" if self.steps < self.epoch_steps else "dataloader_drop_last")
        return f"stage {name}: {'; '.join(parts)}" if parts else None
