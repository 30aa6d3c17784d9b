"""The largest micro-batch that one GPU gets in a stage, from the lengths of its pairs and the order of its batches.

lengths = Lengths.of(tokens)
batch = largest(lengths, schedule, processes=8, packed=True, shared=True)
batch.tokens, batch.rows      # tokens through the model, and scored ones
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_kernels.integrations.pieces import Piece
from sdpo_kernels.integrations.shared_prefix import common_prefix
from sdpo_kernels.stepwise.data.batches import PADDED_GROUP
from sdpo_kernels.stepwise.data.rank_batches import global_batches
from sdpo_kernels.stepwise.data.schedule import Schedule
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs

Counts = NDArray[np.int64]
EPOCHS = 3  # of the order are searched for the largest micro-batch; later ones deal the same pairs out again


@dataclass(frozen=True)
class Lengths:
    """Tokens of the pairs of a stage, without the last of each sequence, which predicts nothing; all [n]."""

    chosen: Counts
    rejected: Counts
    common: Counts  # that both sequences begin with
    scored: Counts  # of both sequences

    @classmethod
    def of(cls, tokens: TokenizedPairs) -> Lengths:
        """The lengths of tokenized pairs."""
        chosen, rejected = tokens.lengths.astype(np.int64).T - 1
        pairs = (tokens[i] for i in range(len(tokens)))
        common = [common_prefix(pair.chosen.ids[:-1], pair.rejected.ids[:-1]) for pair in pairs]
        return cls(chosen, rejected, np.array(common, np.int64), tokens.scored.sum(1).astype(np.int64))

    @classmethod
    def longest(cls, max_length: int, count: int = 1) -> Lengths:
        """`count` pairs of the greatest length, without a common prompt: of pairs that are generated later."""
        whole = np.full(count, max_length - 1)
        return cls(whole, whole, np.zeros_like(whole), 2 * whole)

    def cut(self, max_length: int) -> Lengths:
        """With sequences cut to `max_length` tokens; what is cut was scored."""
        chosen, rejected = (np.minimum(part, max_length - 1) for part in (self.chosen, self.rejected))
        lost = self.chosen + self.rejected - chosen - rejected
        return Lengths(chosen, rejected, np.minimum(self.common, max_length - 1), np.maximum(self.scored - lost, 2))

    def take(self, index: Counts) -> Lengths:
        """The pairs at `index`."""
        return Lengths(*(part[index] for part in self._parts()))

    def joined(self, other: Lengths) -> Lengths:
        """The pairs of both."""
        parts = zip(self._parts(), other._parts(), strict=True)
        return Lengths(*(np.concatenate(both) for both in parts))

    def _parts(self) -> tuple[Counts, ...]:
        return (self.chosen, self.rejected, self.common, self.scored)


class Group(NamedTuple):
    """What goes through the model in one forward: [sequences, length] ids."""

    sequences: int
    length: int
    pieces: tuple[Piece, ...] = ()  # of a packed row


@dataclass(frozen=True)
class MicroBatch:
    """The pairs of one forward and backward on one GPU."""

    pairs: int
    rows: int  # scored tokens
    groups: tuple[Group, ...]
    packed: bool
    shared: bool = False  # two answers of a prompt, which goes through the model once

    @property
    def tokens(self) -> int:
        """Tokens through the model, with padding; those of shared prompts once."""
        return sum(group.sequences * group.length for group in self.groups)


def largest(lengths: Lengths, schedule: Schedule, processes: int, *, packed: bool, shared: bool) -> MicroBatch:
    """The micro-batch with the most tokens, of those that the schedule makes for one of `processes` GPUs.

    If Trainer draws the order while it trains, the longest pairs of the stage are taken together.
    """
    cost = lengths.chosen + lengths.rejected - (lengths.common if shared else 0)
    if schedule.order_is_known:
        chosen = max(_parts(schedule, processes), key=lambda part: int(cost[part].sum()))
    else:
        chosen = np.argsort(cost)[::-1][: max(1, schedule.batch // processes)]
    return _micro_batch(lengths, chosen, packed=packed, shared=shared)


def longest(lengths: Lengths, pairs: int, *, packed: bool, shared: bool) -> MicroBatch:
    """The `pairs` longest pairs in one micro-batch: at least as large as any that an order can make."""
    cost = lengths.chosen + lengths.rejected - (lengths.common if shared else 0)
    return _micro_batch(lengths, np.argsort(cost, kind="stable")[::-1][:pairs], packed=packed, shared=shared)


def largest_scored(lengths: Lengths, pairs: int, *, packed: bool, shared: bool) -> int:
    """The tokens of the largest batch that is scored: `pairs` pairs at a time, in the order of the data."""
    count = len(lengths.chosen)
    cost = lengths.chosen + lengths.rejected - (lengths.common if shared else 0)
    starts = range(0, count, pairs)
    start = max(starts, key=lambda first: int(cost[first : first + pairs].sum()))
    index = np.arange(start, min(start + pairs, count))
    return _micro_batch(lengths, index, packed=packed, shared=shared).tokens


def _parts(schedule: Schedule, processes: int) -> Iterator[Counts]:
    """The pairs of every micro-batch of every process, as `data/rank_batches.py` splits them."""
    sampler = schedule.sampler()
    assert sampler is not None
    for epoch in range(min(EPOCHS, -(-schedule.steps // schedule.epoch_steps))):
        sampler.set_epoch(epoch)
        left = (schedule.steps - epoch * schedule.epoch_steps) * schedule.accumulation
        for batch in islice(global_batches(sampler, schedule.batch, schedule.drop_last), left):
            yield from (part for part in np.array_split(np.array(batch), processes) if len(part))


def _micro_batch(lengths: Lengths, index: Counts, *, packed: bool, shared: bool) -> MicroBatch:
    chosen, rejected, common = (part[index].tolist() for part in (lengths.chosen, lengths.rejected, lengths.common))
    rows = int(lengths.scored[index].sum())

    # one row: the chosen sequences, then the rejected ones, or pair by pair with branches
    if packed:
        found = [Piece(length, 0) for length in chosen + rejected]
        if shared:
            triples = zip(chosen, rejected, common, strict=True)
            found = [piece for c, r, p in triples for piece in (Piece(c, 0), Piece(r - p, p)) if piece.length]
        return MicroBatch(
            len(index), rows, (Group(1, sum(p.length for p in found), tuple(found)),), packed=True, shared=shared
        )

    by_length = sorted(chosen + rejected)
    parts = (by_length[first : first + PADDED_GROUP] for first in range(0, len(by_length), PADDED_GROUP))
    return MicroBatch(len(index), rows, tuple(Group(len(part), part[-1]) for part in parts), packed=False)
