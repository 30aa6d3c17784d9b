"""The largest micro-batch: what the driver's own batches have, for one process and several."""

import numpy as np
import pytest
import torch

from sdpo_kernels.stepwise.data.batches import PairDataset, collate_packed, collate_shared, make_collate_padded
from sdpo_kernels.stepwise.data.rank_batches import RankBatches
from sdpo_kernels.stepwise.data.schedule import Schedule
from sdpo_kernels.stepwise.memory.batch import Lengths, largest, longest
from sdpo_kernels.stepwise.prepare import prepare, schedules_of
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from tests.stepwise import runs

COLLATORS = {
    (True, False): collate_packed,
    (True, True): collate_shared,
    (False, False): make_collate_padded(0),
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("batch")
    config = runs.configured(folder, model, (23,), trainer={"per_device_train_batch_size": 3}, max_length=10)
    return config, prepare(config).stages[0]


def sizes(batch) -> tuple[int, int]:
    """Tokens and scored rows of a collator's output."""
    return sum(group["input_ids"].numel() for group in batch["groups"]), len(batch["rows_index"])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("packed", "shared"), COLLATORS)
def test_it_is_the_largest_of_the_batches_that_are_trained_on(stage, packed, shared, processes):
    config, data = stage
    args = training_arguments(config, data.config, config.output_dir, config.output_dir)
    schedule = Schedule.of(len(data.tokens), args, processes)
    pairs = PairDataset(data.tokens, torch.zeros(len(data.tokens), 2))
    trained = [
        sizes(COLLATORS[packed, shared]([pairs[i] for i in indices]))
        for rank in range(processes)
        for indices in RankBatches(schedule.sampler(), 3, False, rank, processes)
        if indices[0] >= 0
    ]
    found = largest(Lengths.of(data.tokens), schedule, processes, packed=packed, shared=shared)
    assert found.pairs == 3
    assert found.tokens == max(tokens for tokens, _ in trained if packed) if packed else found.tokens > 0
    assert (found.tokens, found.rows) in trained


def test_only_the_pairs_that_the_steps_use_count(stage):
    config, data = stage
    (schedule,) = schedules_of(config, data).values()
    one_step = Schedule(**{**vars(schedule), "max_steps": 1})
    lengths = Lengths.of(data.tokens)
    sampler = schedule.sampler()
    first = list(sampler)[:3]
    found = largest(lengths, one_step, 1, packed=True, shared=False)
    assert found.tokens == sum(data.tokens.lengths[first].sum(1) - 2)


def test_an_order_that_is_not_known_takes_the_longest_pairs_together(stage):
    config, data = stage
    (schedule,) = schedules_of(config, data).values()
    unknown = Schedule(**{**vars(schedule), "order_is_known": False})
    totals = np.sort(data.tokens.lengths.sum(1) - 2)
    found = largest(Lengths.of(data.tokens), unknown, 1, packed=True, shared=False)
    assert found.tokens == totals[-3:].sum()


def test_shorter_sequences_lose_scored_tokens():
    lengths = Lengths(*(np.array([n]) for n in (99, 49, 20, 110)))
    cut = lengths.cut(60)
    assert [part.item() for part in (cut.chosen, cut.rejected, cut.common, cut.scored)] == [59, 49, 20, 70]
    found = longest(cut, 1, packed=True, shared=True)
    assert [(p.length, p.shared) for p in found.groups[0].pieces] == [(59, 0), (29, 20)]
