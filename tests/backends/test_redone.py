"""Counting rows out of exp-direct's range, and the warning."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from sdpo_kernels import linear_logps
from sdpo_kernels.backends import redone
from sdpo_kernels.backends.redone import Counter

CPU = torch.device("cpu")


def rows_with_log_probs_below(n_rows: int, backend: str) -> None:
    """A call in which the first `n_rows` of 3000 rows have a log-prob of −100 and the others of −log 2."""
    hidden = torch.zeros(3000, 2)
    hidden[:n_rows, 0] = 100.0
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    linear_logps(hidden, weight, torch.zeros(3000, dtype=torch.int64), backend=backend)


@pytest.fixture
def counter(monkeypatch) -> Counter:
    fresh = Counter(CPU)
    monkeypatch.setattr(redone, "_counters", {CPU: fresh})
    return fresh


def test_rows_out_of_range_are_counted(counter):
    rows_with_log_probs_below(7, "native")
    rows_with_log_probs_below(2, "native")
    assert (int(counter.total), counter.rows) == (9, 6000)


def test_thousands_are_warned_of_once(counter, caplog):
    with caplog.at_level(logging.WARNING):
        rows_with_log_probs_below(999, "native")
        assert caplog.text == ""
        rows_with_log_probs_below(2, "native")
        rows_with_log_probs_below(500, "native")
    (record,) = caplog.records
    assert "1001 of 6000 rows so far had log-probs below -86" in record.getMessage()


def test_a_small_share_is_not_warned_of(counter, caplog):
    counter.rows = 10**6
    rows_with_log_probs_below(2000, "native")
    assert caplog.text == ""


@pytest.mark.parametrize("mode", [torch.inference_mode(), torch.device("meta")], ids=["inference", "default device"])
def test_the_first_call_may_be_in_any_mode(mode, monkeypatch):
    """In inference mode it would be a tensor that nothing can be added to outside."""
    monkeypatch.setattr(redone, "_counters", {})
    zeros = torch.zeros(3, device="cpu")
    with mode:
        redone.count(zeros - 100)
    redone.count(zeros - 100)
    assert int(redone.counter(zeros).total) == 6


def test_a_counter_is_made_in_a_thread_of_its_own(monkeypatch):
    """What the calling thread allocates while a CUDA graph of torch.compile warms up is the graph's."""
    threads = []

    class Recorded(Counter):
        def __init__(self, device: torch.device) -> None:
            threads.append(threading.get_ident())
            super().__init__(device)

    monkeypatch.setattr(redone, "_counters", {})
    monkeypatch.setattr(redone, "Counter", Recorded)
    for _ in range(2):
        redone.count(torch.zeros(3))
    (thread,) = threads
    assert thread != threading.get_ident()


class Event:
    """Stands in for torch.cuda.Event: arrives at the second question."""

    def __init__(self) -> None:
        self.asked = 0

    def record(self) -> None:
        pass

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1


class OnDevice(torch.Tensor):
    """A counter that says it is on CUDA, and can't be read but by a copy."""

    is_cuda = True

    def __int__(self) -> int:
        raise AssertionError("waited for the device")


def test_on_a_device_the_counter_is_copied_now_and_then_and_read_when_it_has_arrived(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    counter = Counter(CPU)
    counter._copy = torch.zeros(1, dtype=torch.int64)
    counter.total = torch.tensor([5000]).as_subclass(OnDevice)
    with caplog.at_level(logging.WARNING):
        for _ in range(redone.CALLS + 1):
            counter.look(100)
        assert caplog.text == ""
        counter.look(100)
    assert f"5000 of {100 * redone.CALLS} rows" in caplog.text


def test_a_copy_is_not_asked_for_by_another_thread_before_it_is_under_way(monkeypatch):
    """An event that is not recorded yet says that it has arrived."""
    counter = Counter(CPU)

    class Asked(Event):
        def record(self) -> None:
            assert counter._arrived is None

    monkeypatch.setattr(torch.cuda, "Event", Asked)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    counter._copy = torch.zeros(1, dtype=torch.int64)
    counter.total = torch.tensor([5]).as_subclass(OnDevice)
    for _ in range(redone.CALLS):
        counter.look(100)
    assert isinstance(counter._arrived, Asked)
