"""Scored rows: the same rows from padded and packed labels, compared with plain loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, segment_sum, sequence_of_rows

SEQUENCES = st.lists(st.lists(st.sampled_from([IGNORE_INDEX, 0, 7]), min_size=0, max_size=9), min_size=1, max_size=6)


def by_hand(sequences: list[list[int]], starts: list[int]) -> tuple[list[int], list[int], list[int]]:
    """index, segment and counts, with loops."""
    index, segment, counts = [], [], []
    for number, (labels, start) in enumerate(zip(sequences, starts, strict=True)):
        scored = [start + i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        index += scored
        segment += [number] * len(scored)
        counts.append(len(scored))
    return index, segment, counts


@given(SEQUENCES)
def test_rows_of_packed_and_padded_labels(sequences):
    width = max(max(map(len, sequences)), 1)
    padded = torch.tensor([labels + [IGNORE_INDEX] * (width - len(labels)) for labels in sequences])
    rows = ScoredRows.from_labels(padded)
    assert tuple(t.tolist() for t in rows) == by_hand(sequences, [i * width for i in range(len(sequences))])
    assert all(t.dtype == torch.int64 for t in rows)

    starts = [sum(map(len, sequences[:i])) for i in range(len(sequences) + 1)]
    packed = torch.tensor([label for labels in sequences for label in labels], dtype=torch.int64)
    for dtype in (torch.int32, torch.int64):
        found = ScoredRows.from_labels(packed, torch.tensor(starts, dtype=dtype))
        assert tuple(t.tolist() for t in found) == by_hand(sequences, starts[:-1])


def test_sequences_of_length_0_have_no_rows():
    labels = torch.tensor([1, 2, 3])
    assert sequence_of_rows(labels, torch.tensor([0, 0, 2, 2, 3])).tolist() == [1, 1, 3]


def test_nothing_scored():
    rows = ScoredRows.from_labels(torch.full((2, 3), IGNORE_INDEX))
    assert rows.index.shape == (0,)
    assert rows.segment.shape == (0,)
    assert rows.counts.tolist() == [0, 0]


def test_to_moves_all_three():
    rows = ScoredRows.from_labels(torch.zeros(2, 3, dtype=torch.int64)).to("meta")
    assert isinstance(rows, ScoredRows)
    assert {t.device.type for t in rows} == {"meta"}


def test_segment_sum_and_its_gradient():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = segment_sum(values, torch.tensor([2, 0, 2, 2]), 4)
    assert sums.tolist() == [2.0, 0.0, 13.0, 0.0]
    sums.backward(torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert values.grad.tolist() == [30.0, 10.0, 30.0, 30.0]
