"""A stage's steps, the pairs they train on, and what is said about them."""

import pytest
from accelerate.data_loader import SeedableRandomSampler

from sdpo_kernels.stepwise.data.schedule import PairOrder, Schedule


def schedule(pairs=10, batch=2, accumulation=1, drop_last=False, epochs=1.0, max_steps=-1, seed=None, known=True):
    return Schedule(pairs, batch, accumulation, drop_last, epochs, max_steps, seed, known)


def test_the_order_is_that_of_accelerates_sampler():
    ours, theirs = PairOrder(13, 42), SeedableRandomSampler(range(13), data_seed=42)
    orders = []
    for epoch in (0, 1, 2, 1):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        orders.append(list(ours))
        assert orders[-1] == list(theirs)
        assert sorted(orders[-1]) == list(range(13))
    assert orders[1] == orders[3] != orders[0]
    assert list(PairOrder(4, None)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "steps", "used"),
    [
        ({}, 5, 10),
        ({"max_steps": 3}, 3, 6),
        ({"max_steps": 3, "accumulation": 2}, 3, 10),
        ({"max_steps": 2, "accumulation": 2}, 2, 8),
        ({"max_steps": 50}, 50, 10),
        ({"epochs": 0.5}, 3, 6),
        ({"epochs": 0.1, "batch": 100}, 1, 10),
        ({"batch": 4, "drop_last": True}, 2, 8),
        ({"batch": 4, "drop_last": True, "epochs": 9}, 18, 8),
        ({"batch": 12, "drop_last": True}, 1, 0),
    ],
)
def test_the_first_pairs_are_used_if_the_order_is_that_of_the_data(settings, steps, used):
    assert schedule(**settings).steps == steps
    assert schedule(**settings).used().tolist() == list(range(used))


def test_a_shuffled_stage_uses_the_first_pairs_of_each_epochs_order():
    first, second = ([*PairOrder(10, seed)] for seed in (7, 8))  # epoch 1 has the next seed
    assert schedule(seed=7, max_steps=2).used().tolist() == sorted(first[:4])
    drops = schedule(seed=7, batch=4, drop_last=True, max_steps=3)
    assert drops.used().tolist() == sorted({*first[:8], *second[:4]})
    assert schedule(seed=7, max_steps=2, known=False).used().tolist() == list(range(10))


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({}, None),
        ({"max_steps": 5}, None),
        ({"epochs": 3}, None),
        ({"max_steps": 3}, "trains on 6 of 10 pairs; max_steps 3 ends it before its 1 epoch (5 steps)"),
        ({"max_steps": 6, "epochs": 2.5}, "max_steps 6 ends it before its 2.5 epochs (13 steps)"),
        ({"max_steps": 60, "batch": 10}, "max_steps 60 goes on after its 1 epoch (1 step)"),
        (
            {"pairs": 2000, "batch": 25, "max_steps": 20, "epochs": 3},
            "trains on 500 of 2,000 pairs; max_steps 20 ends it before its 3 epochs (240 steps)",
        ),
        ({"epochs": 0.5}, "trains on 6 of 10 pairs; epochs 0.5"),
        ({"batch": 4, "drop_last": True}, "trains on 8 of 10 pairs; dataloader_drop_last"),
    ],
)
def test_what_a_user_may_not_expect_is_said(settings, note):
    assert schedule(**settings).note("easy") == (note and f"stage easy: {note}")
