"""Backends: one small class each, with the interface `base.Backend`, chosen by name or by `auto`.

    backend = choose_backend("auto", request)    # the first of AUTO_ORDER that supports the request

A backend receives the scored rows only (see `base.HeadCall`). A named backend that cannot serve a request raises and
says why. `auto` falls back to the next one, and logs a warning once if only plain torch is left. To add a backend,
write its class next to `eager.py` and enter it below.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache

import torch

from sdpo_kernels.backends.base import Backend, Request
from sdpo_kernels.backends.eager import EagerBackend
from sdpo_kernels.backends.native import NativeBackend
from sdpo_kernels.backends.triton import TritonBackend

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Backend] = {"native": NativeBackend(), "triton": TritonBackend(), "eager": EagerBackend()}
AUTO_ORDER = ("triton", "native", "eager")  # fastest first
# only on explicit request: not yet measured against the others. "rows" (existing logits) have no other kernels there
NOT_AUTO = {("native", "cuda", "head"), ("native", "cuda", "pairs")}
ENVIRONMENT_VARIABLE = "SDPO_BACKEND"  # overrides "auto", never an explicit choice


def choose_backend(name: str, request: Request) -> Backend:
    """The backend for `request`. Raises ValueError for an unknown name or a named backend that cannot serve it."""
    return _choose(name, request.device, "head", lambda backend: backend.supports(request), request)


def choose_slice_backend(name: str, request: Request) -> Backend:
    """The backend for a slice of the vocabulary. Raises ValueError as `choose_backend` does."""
    chosen = choose_backend(name, request)
    if (reason := chosen.supports_slices(request)) is not None:
        raise ValueError(f"backend: {chosen.name!r} cannot serve a slice of the vocabulary: {reason}")
    return chosen


def auto_choice(request: Request) -> tuple[Backend, list[tuple[str, str]]]:
    """What "auto" gives for `request`, and the backends for its device that were skipped, each with the reason."""
    return _first_serving("auto", request.device, "head", lambda backend: backend.supports(request), request)


def choose_backend_of_rows(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for existing rows: logits of `dtype` on `device`, or log-probs to be summed over pairs."""
    asked = f"rows of {dtype} on {device}"
    return _choose(name, device, "rows", lambda backend: backend.supports_rows(device, dtype), asked)


def takes_grad_tol(name: str, chosen: Backend, device: torch.device) -> bool:
    """Whether a call that asked for `name` and got `chosen` leaves tiles out.

    Eager is not faster for it. It does where it is named, to be compared with, and is exact as "auto"'s last resort.
    """
    is_fallback = _asked_for(name) == "auto" and chosen.name == "eager"
    return chosen.uses_grad_tol(device) and not is_fallback


def pair_backend(name: str, device: torch.device) -> Backend | None:
    """The backend whose pair epilogue serves `device`; None: autograd through losses/."""
    name = _asked_for(name)
    candidates = _auto_order(device, "pairs") if name == "auto" else [name]
    return next((b for b in map(get_backend, candidates) if b.supports_pairs(device) is None), None)


def _asked_for(name: str) -> str:
    """The name that counts: SDPO_BACKEND's instead of "auto"."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto") if name == "auto" else name


def _auto_order(device: torch.device, operation: str) -> list[str]:
    return [name for name in AUTO_ORDER if (name, device.type, operation) not in NOT_AUTO]


def _choose(
    name: str, device: torch.device, operation: str, reason_against: Callable[[Backend], str | None], asked: object
) -> Backend:
    backend, skipped = _first_serving(name, device, operation, reason_against, asked)
    # torch.compile cannot trace a log call
    if backend.name == AUTO_ORDER[-1] and not torch.compiler.is_compiling():
        for skipped_name, reason in skipped:
            _warn_once(skipped_name, reason)
    return backend


def _first_serving(
    name: str, device: torch.device, operation: str, reason_against: Callable[[Backend], str | None], asked: object
) -> tuple[Backend, list[tuple[str, str]]]:
    """The backend that serves, and those that "auto" skipped before it."""
    name = _asked_for(name)
    # a backend asked for by name serves the call or raises: a silent fallback would hide a mistake
    if name != "auto":
        backend = get_backend(name)
        reason = reason_against(backend)
        if reason is not None:
            raise ValueError(f"backend: {name!r} cannot serve this call: {reason}")
        return backend, []

    skipped: list[tuple[str, str]] = []
    for candidate in _auto_order(device, operation):
        backend = BACKENDS[candidate]
        if backend.device_types is not None and device.type not in backend.device_types:
            continue  # not a fallback: it was never meant for this device
        reason = reason_against(backend)
        if reason is None:
            return backend, skipped
        skipped.append((candidate, reason))
    raise ValueError(f"backend: none supports this call: {asked}")


def get_backend(name: str) -> Backend:
    """The backend called `name`; ValueError lists the known ones."""
    if name not in BACKENDS:
        raise ValueError(f"backend: was {name!r}, must be one of: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


@cache
def _warn_once(name: str, reason: str) -> None:
    logger.warning("backend %s skipped: %s", name, reason)
