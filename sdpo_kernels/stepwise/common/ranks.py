"""The processes of a run: who writes, what all of them agree on, and how an error of one ends all. One process: no-ops.

    with ranks.joined(start):                 # `start()` has torch.distributed ready; nothing to do in one process
        found = ranks.on_first(read)          # what `read` gives in the first process, in all; an error there too
        parts = ranks.exchange(mine)          # every process's value, by rank
        ranks.agree(lambda: check(mine))      # an error in any process is raised in all
        ranks.wait()                          # nobody goes on before all are here

Only the first process writes files: `files.py` and `manifest.py` do nothing in the others. What is said here goes over
a group of its own (gloo, on the CPU), beside the one of gradients, and may wait as long as the first process works.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sdpo_kernels.stepwise.common.errors import Interrupted, UserError

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=30)  # a process that dies is noticed by its closed connections, whatever this is
GRACE = 10.0  # seconds that the others leave the first process to say what was wrong; a launcher ends them sooner


class LostProcess(UserError):
    """Another process of the run has ended; its own message says why."""


class SolitaryError(UserError):
    """An error of one process while the others wait for its gradients: it ends, and they lose it."""


@dataclass
class _State:
    group: Any = None  # torch.distributed's; None before `joined` and in one process
    alone: bool = False  # in `on_first`: the others wait, so there is nobody to share with
    joined: bool = False  # ever: errors before that are one process's own
    training: bool = False  # Trainer's own collectives are under way: nothing of ours can be waited for
    agreed: BaseException | None = None  # the error that all processes have heard of


_state = _State()


def launched() -> int:
    """How many processes a launcher such as torchrun has started."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() and int(count) > 0 else 1  # `joined` says what is wrong with others


def world_size() -> int:
    """How many processes share the work at hand."""
    return 1 if _state.group is None or _state.alone else dist.get_world_size()


def rank() -> int:
    """This process's number, from 0."""
    return 0 if world_size() == 1 else dist.get_rank()


def is_first() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def launched_first() -> bool:
    """As `is_first`, before anything is joined and after it ended."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(start: Callable[[], object]) -> Iterator[None]:
    """Work as one of the launched processes; `start()` initialises torch.distributed. One's errors are everybody's."""
    _check_launcher()
    if launched() == 1:
        yield
        return
    start()
    _state.group, _state.training, _state.agreed = dist.new_group(backend="gloo", timeout=LONGEST_WAIT), False, None
    _state.joined = True
    try:
        with _losses_said():
            yield
            wait()
    except (UserError, Interrupted) as error:
        if error is not _state.agreed and not isinstance(error, LostProcess):
            if _state.training:
                raise SolitaryError(f"process {dist.get_rank()}: {error}") from error
            with _losses_said():
                _settle(_gather((error, None)))  # meets whatever the others are about to exchange
        raise
    finally:
        _state.group = None


@contextmanager
def _losses_said() -> Iterator[None]:
    """LostProcess in place of the many errors by which torch says that a connection broke."""
    try:
        yield
    except RuntimeError as error:
        known = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
        if not isinstance(error, dist.DistError) and not any(part in str(error) for part in known):
            raise
        raise LostProcess(
            "another process of this run has ended, and its own message says why; "
            "the same command goes on from the last complete checkpoint"
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
    """Whether this process is the one to print `error`, at the end of a command; others give it the time to.

    Before the processes have joined, an error may be one node's own (a file that it has not): its first process speaks.
    """
    if not _state.joined and os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    if launched_first() or isinstance(error, SolitaryError):
        return True
    time.sleep(GRACE)
    return False


def exchange(value: T) -> list[T]:
    """`value` of every process, by rank. Raises the error that one of them came with instead."""
    return [value] if world_size() == 1 else _settle(_gather((None, value)))


def wait() -> None:
    """Until all processes are here."""
    exchange(None)


def agree(check: Callable[[], T]) -> T:
    """`check()`; where it raises in any process, that error (the lowest rank's) is raised in all."""
    if world_size() == 1:
        return check()
    error, value = _attempt(check)
    _settle(_gather((error, None)))
    return value  # type: ignore[return-value]


def on_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in all of them; they wait for it, and an error there is everybody's."""
    if world_size() == 1:
        return make()
    answer: tuple[BaseException | None, Any] = (None, None)
    if is_first():
        _state.alone = True
        try:
            answer = _attempt(make)
        finally:
            _state.alone = False
    return _settle(_gather(answer))[0]


def total(number: int) -> int:
    """The sum of every process's `number`; cheaper than `exchange`, for each step."""
    if world_size() == 1:
        return number
    tensor = torch.tensor([number])
    dist.all_reduce(tensor, group=_state.group)
    return int(tensor)


@contextmanager
def training() -> Iterator[None]:
    """While Trainer trains: an error in one process ends it at once, as the others wait for its gradients."""
    _state.training = True
    yield
    _state.training = False  # stays set where the block raises: `joined` looks at it


def _attempt(make: Callable[[], T]) -> tuple[BaseException | None, T | None]:
    try:
        return None, make()
    except (UserError, Interrupted) as error:
        return error, None


def _gather(answer: tuple[BaseException | None, Any]) -> list[tuple[str | None, str, Any]]:
    """(kind of error or None, its message, value) of every process; errors travel as text."""
    error, value = answer
    kind = None if error is None else "Interrupted" if isinstance(error, Interrupted) else "UserError"
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (kind, str(error), value), group=_state.group)
    return answers


def _settle(answers: list[tuple[str | None, str, Any]]) -> list[Any]:
    for kind, message, _ in answers:
        if kind is not None:
            _state.agreed = Interrupted(message) if kind == "Interrupted" else UserError(message)
            raise _state.agreed
    return [value for _, _, value in answers]
