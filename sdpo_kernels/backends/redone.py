"""How many rows were computed one by one because their log-prob was below about −86, and a warning if they are many.

Such a row reads the whole head again. A few cost little; thousands mean a head or targets that do not belong to the
hidden states, and a step that is several times slower. The device counts; nothing here waits for it.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BORDER = -86.0  # nats, about: where the sums of exp-direct leave float32's range
MANY, SHARE = 1000, 0.01  # warned of if there are more than this, and more than this share of all rows
CALLS = 64  # between two looks at the device's counter


class Counter:
    """Of one device: add to `total`, then call `look`."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows = 0  # of all calls so far
        self._calls = 0
        self._warned = False
        self._copy = self.total  # the last copy on the host: on the CPU the counter itself
        self._rows_then = 0
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copy = torch.zeros(1, dtype=torch.int64, pin_memory=True)

    def look(self, n_rows: int) -> None:
        """Note a call with `n_rows` rows; now and then fetch the counter, and warn once if it is high."""
        self.rows += n_rows
        self._calls += 1
        if self._warned or (self.total.is_cuda and torch.cuda.is_current_stream_capturing()):
            return

        # a copy that has arrived is read; the next one is only asked for
        arrived = self._arrived
        if not self.total.is_cuda:
            self._warn_if_many(self.rows)
        elif arrived is None:
            if self._calls % CALLS == 0:
                self._copy.copy_(self.total, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                # last: another thread may ask it from here on
                self._rows_then, self._arrived = self.rows, event
        elif arrived.query():
            self._warn_if_many(self._rows_then)
            self._arrived = None

    def _warn_if_many(self, rows: int) -> None:
        found = int(self._copy)
        if found > max(MANY, SHARE * rows):
            self._warned = True
            logger.warning(
                "%d of %d rows so far had log-probs below %d and were computed one by one, which is slow. Do the "
                "hidden states, the head and the targets belong together, and is logit_scale or temperature right?",
                found, rows, BORDER,
            )  # fmt: skip


_counters: dict[torch.device, Counter] = {}


def counter(tensor: Tensor) -> Counter:
    """The counter of the tensor's device.

    It outlives the call that asks first, so it is made in a thread of its own, where that call's modes do not hold: in
    inference mode nothing could be added to it later, and in the warm-up of torch.compile's CUDA graphs it would lie in
    their memory.
    """
    if tensor.device not in _counters:
        stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        with ThreadPoolExecutor(1) as other:
            _counters[tensor.device] = other.submit(_new_counter, tensor.device, stream).result()
    return _counters[tensor.device]


def _new_counter(device: torch.device, stream: torch.cuda.Stream | None) -> Counter:
    with torch.cuda.stream(stream):  # it is 0 before the asking call adds to it
        return Counter(device)


def count(logps: Tensor) -> None:
    """Count the rows of `logps` [N] that a kernel which does not count itself has computed one by one."""
    of_device = counter(logps)
    with torch.cuda.device_of(logps):  # events are recorded on the current device
        of_device.total += (logps < BORDER).sum()
        of_device.look(logps.shape[0])
