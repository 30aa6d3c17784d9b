"""Backends: one small class each, with the same three methods, chosen by name or by `auto`.

    backend = choose_backend("auto", request)    # the first of AUTO_ORDER that supports the request

A backend receives the scored rows only (see `base.HeadCall`). An explicit request that cannot be met raises and says
why; `auto` falls back and says so once in the log. To add one: write its class beside `eager.py`, enter it below.
"""

from __future__ import annotations

import logging
import os
from functools import cache

from sdpo_kernels.backends.base import Backend, Request
from sdpo_kernels.backends.eager import EagerBackend

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Backend] = {"eager": EagerBackend()}
AUTO_ORDER = ("eager",)  # fastest first
ENVIRONMENT_VARIABLE = "SDPO_BACKEND"  # overrides "auto", never an explicit choice


def choose_backend(name: str, request: Request) -> Backend:
    """The backend for `request`. Raises ValueError for an unknown name or a named backend that cannot serve it."""
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name != "auto":
        backend = get_backend(name)
        reason = backend.supports(request)
        if reason is not None:
            raise ValueError(f"backend: {name!r} cannot serve this call: {reason}")
        return backend
    for candidate in AUTO_ORDER:
        reason = BACKENDS[candidate].supports(request)
        if reason is None:
            return BACKENDS[candidate]
        _say_once(candidate, reason)
    raise ValueError(f"backend: none supports this call: {request}")


def get_backend(name: str) -> Backend:
    """The backend called `name`; ValueError lists the known ones."""
    if name not in BACKENDS:
        raise ValueError(f"backend: was {name!r}, must be one of: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


@cache
def _say_once(name: str, reason: str) -> None:
    logger.warning("backend %s passed over: %s", name, reason)
