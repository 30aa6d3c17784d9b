"""A stub: axolotl's telemetry sends nothing from here, whatever the environment says."""

from typing import Any


def capture(*args: Any, **kwargs: Any) -> None:
    """Send nothing."""


def shutdown() -> None:
    """Nothing to flush."""
