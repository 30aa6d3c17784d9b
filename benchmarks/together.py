"""All cases of one problem in one process, taking turns (A B C A B C): what a GPU needs.

There a fresh process costs ten seconds and a step some tens of milliseconds, and CUDA reports a call's peak memory
exactly whatever ran before. Cached memory of other cases is given back before each measurement. Every number goes
to `record` as soon as it is there (see `records.Run.add`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import measure
from benchmarks.problem import CannotRun

Call = Callable[[], Any]
PATIENCE = 10.0  # seconds of timed calls of one case, after which no new call starts


def take_turns(
    cases: Mapping[str, Callable[[], Call]],
    device: torch.device,
    repeats: int,
    record: Callable[..., None],
    before_each: Callable[[], None] = lambda: None,
    check: Callable[[str, Any], dict[str, float]] = lambda case, found: {},
) -> None:
    """Measure every case: memory and what `check` finds at the first call, which warms up, then `repeats` timed calls.

    Args:
        cases: a case's preparation, which is not timed and returns the call that is.
        before_each: run before every call, untimed, such as dropping gradients.
        check: more fields for the record of a first call, from the case's name and its result.
    """
    calls: dict[str, Call] = {}
    for case, prepare in cases.items():
        found = attempt(lambda prepare=prepare, case=case: first_call(case, prepare, device, before_each, check))
        if "call" in found:
            calls[case] = found.pop("call")
        record(case=case, **found)
        give_back_memory(before_each)

    spent = dict.fromkeys(calls, 0.0)
    for _ in range(repeats):
        for case in [case for case in calls if spent[case] < PATIENCE]:
            before_each()
            found = attempt(lambda case=case: {"seconds": measure.seconds(calls[case], device)})
            record(case=case, **found)
            spent[case] += found.get("seconds", PATIENCE)


def first_call(
    case: str,
    prepare: Callable[[], Call],
    device: torch.device,
    before_each: Callable[[], None],
    check: Callable[[str, Any], dict[str, float]],
) -> dict[str, Any]:
    """The call, its peak memory, and what `check` finds in the result of a second one."""
    call = prepare()
    give_back_memory(before_each)
    memory = measure.peak_extra_bytes(call, device)
    before_each()
    return {"call": call, "peak_extra_bytes": memory, **check(case, call())}


def give_back_memory(before_each: Callable[[], None]) -> None:
    """Return what is cached to the device."""
    before_each()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result, or the reason why there is none; an error that leaves the device unusable is raised."""
    try:
        return run()
    except CannotRun as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        # after an illegal access no other case can run: this raises again
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        first = (str(error).splitlines() or ["no message"])[0]
        return {"skipped": f"{type(error).__name__}: {first}", "failed": True}
