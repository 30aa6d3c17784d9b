"""Batches of a distributed run: each global batch is the same as with a single process, split over the ranks.

accelerate fills the last batch of an epoch with pairs from its start, which then count twice. Here its pairs are split
as evenly as possible instead. A rank that gets no pair receives a filler, a pair that is not counted, so that all ranks
take the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, Sampler

from sdpo_kernels.stepwise.common import ranks


def global_batches(sampler: Iterable[int], size: int, drop_last: bool) -> BatchSampler:
    """The indices of each micro-batch of `size` pairs, over all ranks; with a single process, DataLoader's own."""
    return BatchSampler(sampler, size, drop_last)


class RankBatches(BatchSampler):
    """This rank's part of every global batch of `batch_size * world_size` pairs.

    A filler is given as ~index of a pair, which is negative.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, rank: int, world_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._global_batches():
            share = [int(index) for index in np.array_split(batch, self.world_size)[self.rank]]
            yield share or [~int(batch[0])]

    def __len__(self) -> int:
        return len(self._global_batches())

    def _global_batches(self) -> BatchSampler:
        return global_batches(self.sampler, self.batch_size * self.world_size, self.drop_last)


def share_batches(dataloader: DataLoader) -> DataLoader:
    """Put RankBatches into a dataloader that accelerate has prepared; with a single process it stays unchanged."""
    if ranks.world_size() == 1:
        return dataloader

    # accelerate's sampler stays around ours, because it shuffles, and skips batches after a resume; it must not split
    shard: Any = dataloader.batch_sampler
    inner = shard.batch_sampler
    shard.batch_sampler = RankBatches(
        inner.sampler, inner.batch_size, inner.drop_last, ranks.data_rank(), ranks.data_world_size()
    )
    shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
    shard.sampler = inner.sampler  # where accelerate looks for `set_epoch` if it skips batches
    return dataloader
