"""Batches of several processes: each global batch is that of one process, cut into one share a process.

accelerate fills an epoch's last batch up with pairs from its start, which then count twice; here its pairs are dealt
out as evenly as they go. A process that is left without one gets a filler, a pair that counts for nothing, so that all
take the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, Sampler

from sdpo_kernels.stepwise.common import ranks


class RankBatches(BatchSampler):
    """This process's shares of batches of `batch_size` pairs a process; a filler is ~index (below 0) of a pair."""

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, rank: int, world_size: int) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        whole = BatchSampler(self.sampler, self.batch_size * self.world_size, self.drop_last)
        for batch in whole:
            share = [int(index) for index in np.array_split(batch, self.world_size)[self.rank]]
            yield share or [~int(batch[0])]

    def __len__(self) -> int:
        return len(BatchSampler(self.sampler, self.batch_size * self.world_size, self.drop_last))


def share_batches(dataloader: DataLoader) -> DataLoader:
    """`dataloader`, as accelerate has prepared it, with batches of `RankBatches`; in one process as it is."""
    if ranks.world_size() == 1:
        return dataloader
    # accelerate's stays around it, as shuffling and skipping at a resume go through it; it no longer cuts
    shard: Any = dataloader.batch_sampler
    inner = shard.batch_sampler
    shard.batch_sampler = RankBatches(
        inner.sampler, inner.batch_size, inner.drop_last, ranks.rank(), ranks.world_size()
    )
    shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
    return dataloader
