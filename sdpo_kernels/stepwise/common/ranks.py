"""Coordination of the ranks of a distributed run: who writes, what all agree on, how one rank's error ends all.

    with ranks.joined(start):                 # `start()` initialises torch.distributed
        found = ranks.on_first(read)          # run `read` on rank 0, return its result on all ranks
        parts = ranks.exchange(mine)          # every rank's value, as a list in rank order
        ranks.agree(lambda: check(mine))      # an error on any rank is raised on all
        ranks.wait()                          # barrier

With a single process all of these are no-ops. Only rank 0 writes files: `files.py` and `manifest.py` do nothing on the
other ranks. These calls use a process group of their own (gloo, on the CPU) next to the one for gradients, so they may
wait for as long as rank 0 works.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sdpo_kernels.stepwise.common.errors import Interrupted, UserError

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=30)  # only an upper limit: a rank that dies is noticed by its closed connections
GRACE = 10.0  # seconds the other ranks give rank 0 to print an error before they exit; a launcher kills them sooner
PATIENCE = 30.0  # seconds in which the other ranks have to learn of an error on one; after them it exits by itself


class LostProcess(UserError):
    """Another rank of the run has ended; its own message says why."""


class SingleRankError(UserError):
    """An error on one rank while the others wait for something else of it: this rank exits, which ends the others."""


@dataclass
class _State:
    group: Any = None  # the process group; None outside `joined` and with a single process
    tp_size: int = 1  # how many ranks share one model, and so work on the same pairs
    alone: bool = False  # inside `on_first`: the other ranks wait, so there is nobody to talk to
    joined: bool = False  # set for good by `joined`: an earlier error concerns only one process
    training: bool = False  # Trainer's own collectives are running, so ours would deadlock
    agreed: BaseException | None = None  # the error that has been raised on all ranks


_state = _State()


def launched() -> int:
    """How many processes a launcher such as torchrun has started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() and int(count) > 0 else 1  # `joined` reports any other value


def world_size() -> int:
    """How many ranks share the current work: 1 inside `on_first`."""
    return 1 if _state.group is None or _state.alone else dist.get_world_size()


def rank() -> int:
    """The rank of this process, from 0."""
    return 0 if world_size() == 1 else dist.get_rank()


def tp_size() -> int:
    """How many ranks share one tensor-parallel model: they work on the same pairs. 1 inside `on_first`."""
    return min(_state.tp_size, world_size())


def data_world_size() -> int:
    """How many ranks, or groups of ranks that share a model, work on different pairs."""
    return world_size() // tp_size()


def data_rank() -> int:
    """Which of the `data_world_size` parts of the pairs this rank works on."""
    return rank() // tp_size()


def is_first() -> bool:
    """Whether this is rank 0, which alone writes files and prints."""
    return rank() == 0


def launched_first() -> bool:
    """Like `is_first`, but also valid before and after `joined`."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(start: Callable[[], object], tp_size: int = 1) -> Iterator[None]:
    """Run a block as one of the launched processes; with a single process nothing is set up.

    Each `tp_size` ranks, one after the other, share one model.

    1. Check the launcher's environment variables.
    2. `start()` initialises torch.distributed; the driver's own gloo group is created.
    3. Run the block, then wait until all ranks have finished it.

    A UserError or Interrupted on one rank is raised on all of them. It becomes a SingleRankError there during training,
    or if the others do not come to an exchange within PATIENCE: they may be in the forward of a model that is cut,
    waiting for this rank. A rank whose connection to another one breaks raises LostProcess.
    """
    _check_launcher()
    if launched() == 1:
        yield
        return

    start()
    _state.group, _state.training, _state.agreed = dist.new_group(backend="gloo", timeout=LONGEST_WAIT), False, None
    _state.joined, _state.tp_size = True, tp_size

    try:
        with lost_connections():
            yield
            wait()
    except (UserError, Interrupted) as error:
        # an error that is already known everywhere needs no further exchange
        if error is not _state.agreed and not isinstance(error, LostProcess):
            # inside Trainer's collectives the others would never answer
            answers = None if _state.training else _gather_within(PATIENCE, (error, None))
            if answers is None:
                raise SingleRankError(f"rank {dist.get_rank()}: {error}") from error
            _raise_or_values(answers)
        raise
    finally:
        _state.group, _state.tp_size = None, 1


@contextmanager
def lost_connections() -> Iterator[None]:
    """Turn the many errors with which torch reports a broken connection into LostProcess."""
    try:
        yield
    except RuntimeError as error:
        known = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
        if not isinstance(error, dist.DistError) and not any(part in str(error) for part in known):
            raise
        raise LostProcess(
            "another process of this run has ended, see its own message; "
            "run the same command again to resume from the last complete checkpoint"
        ) from error


def _check_launcher() -> None:
    count = os.environ.get("WORLD_SIZE", "1")
    if str(launched()) != count:
        raise UserError(f"WORLD_SIZE: was {count!r}, must be a number of processes, at least 1")
    if launched() == 1:
        return

    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE: was {launched()} without {', '.join(missing)}; start several processes with torchrun"
        )


def says(error: BaseException) -> bool:
    """Whether this process prints `error` at the end of a command; if not, wait first until rank 0 has printed it.

    Before the ranks have joined, an error may concern one node only (a file that is missing there), so the first
    process of every node prints it.
    """
    if not _state.joined and os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    if launched_first() or isinstance(error, SingleRankError):
        return True
    time.sleep(GRACE)
    return False


def exchange_parts(value: T) -> list[T]:
    """`value` of every part of the pairs, in order: of one rank of those that work on the same pairs."""
    return exchange(value)[:: tp_size()]


def exchange(value: T) -> list[T]:
    """`value` of every rank, in rank order. Raises the error of a rank that failed before it got here."""
    return [value] if world_size() == 1 else _raise_or_values(_gather((None, value)))


def everywhere(error: UserError) -> UserError:
    """`error`, which every rank raises at this place, also in training: rank 0 alone prints it."""
    _state.agreed = error
    return error


def wait() -> None:
    """Wait until all ranks are here."""
    exchange(None)


def agree(check: Callable[[], T]) -> T:
    """`check()`; if it raises on any rank, the error of the lowest such rank is raised on all."""
    if world_size() == 1:
        return check()
    error, value = _attempt(check)
    _raise_or_values(_gather((error, None)))
    return value  # type: ignore[return-value]


def on_first(make: Callable[[], T]) -> T:
    """Run `make` on rank 0 while the others wait; its result, or its error, is that of all ranks."""
    if world_size() == 1:
        return make()

    answer: tuple[BaseException | None, Any] = (None, None)
    if is_first():
        # `make` may call functions of this module: with the others waiting here, they must not communicate
        _state.alone = True
        try:
            answer = _attempt(make)
        finally:
            _state.alone = False

    return _raise_or_values(_gather(answer))[0]


def once(work: Callable[[], T]) -> T:
    """Run a whole command on rank 0 of a launcher's processes; the others wait, and all end alike."""
    if launched() == 1:
        return work()
    with joined(lambda: dist.init_process_group("gloo")):
        return on_first(work)


def total(number: int) -> int:
    """The sum of `number` over all ranks; cheap enough to call at every step, unlike `exchange`."""
    if world_size() == 1:
        return number
    tensor = torch.tensor([number])
    dist.all_reduce(tensor, group=_state.group)
    return int(tensor)


def largest(number: int) -> int:
    """The largest `number` of all ranks; as cheap as `total`."""
    if world_size() == 1:
        return number
    tensor = torch.tensor([number])
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_state.group)
    return int(tensor)


@contextmanager
def training() -> Iterator[None]:
    """Marks that Trainer trains: an error on one rank then ends it at once, as the others wait for its gradients."""
    _state.training = True
    yield
    _state.training = False  # not reset if the block raises: `joined` needs to know


def _attempt(make: Callable[[], T]) -> tuple[BaseException | None, T | None]:
    try:
        return None, make()
    except (UserError, Interrupted) as error:
        return error, None


def _gather(answer: tuple[BaseException | None, Any]) -> list[tuple[str | None, str, Any]]:
    """(kind of error or None, its message, value) of every rank; errors are sent as text."""
    error, value = answer
    kind = None if error is None else "Interrupted" if isinstance(error, Interrupted) else "UserError"
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (kind, str(error), value), group=_state.group)
    return answers


def _gather_within(
    seconds: float, answer: tuple[BaseException | None, Any]
) -> list[tuple[str | None, str, Any]] | None:
    """`_gather` with whichever exchange the other ranks reach next; None if one of them does not come in time."""
    found: Future[list[tuple[str | None, str, Any]]] = Future()

    def gather() -> None:
        try:
            found.set_result(_gather(answer))
        except RuntimeError as error:  # of a rank that has ended or is in another collective
            found.set_exception(error)

    # gloo cannot give up by itself: the thread is left behind, as this process is about to end
    threading.Thread(target=gather, daemon=True).start()
    try:
        return found.result(seconds)
    except (FutureTimeout, RuntimeError):
        return None


def _raise_or_values(answers: list[tuple[str | None, str, Any]]) -> list[Any]:
    """The values of all ranks. Raises the first error among `answers` and remembers that every rank knows it."""
    for kind, message, _ in answers:
        if kind is not None:
            _state.agreed = Interrupted(message) if kind == "Interrupted" else UserError(message)
            raise _state.agreed
    return [value for _, _, value in answers]
