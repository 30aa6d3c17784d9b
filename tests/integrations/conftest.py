"""Loggers as they were: the adapters' own commands make the package's log visible."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def level_of_the_packages_log() -> Iterator[None]:
    """A level that one test sets would put more messages into another's log."""
    logger = logging.getLogger("sdpo_kernels")
    before = logger.level
    yield
    logger.setLevel(before)
