"""Replace methods of another library's classes, and put them back: what the adapters for other trainers share.

    adapter = MethodPatch("llamafactory", tried=("0.9.5",))
    adapter.replace(CustomDPOTrainer, "concatenated_forward", ("self", "model", "batch", "is_ref_model"), ours)
    adapter.activate()
    undo("llamafactory")

A method is replaced only if its parameters are the known ones, so that another version of the library is refused, not
half patched. At most one patch of a library is active.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from importlib import metadata
from types import TracebackType
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

_active: dict[str, MethodPatch] = {}  # by package


class Replaced(NamedTuple):
    """One replaced method."""

    owner: Any
    name: str
    own: Any  # the owner's entry before; None: an inherited method, which has none
    new: Callable[..., Any]


class MethodPatch:
    """The replaced methods of one library; as a context manager it restores, at the end of the block, what it found.

    What it found are the library's own methods, or those of an earlier patch, which a new one puts back first.
    """

    def __init__(self, package: str, tried: Sequence[str], log: logging.Logger = logger) -> None:
        """
        Args:
            package: the distribution's name on PyPI.
            tried: the versions that the adapter has been run with; any other is patched with a warning in the log.
            log: where both are said; the library's own logger where it shows INFO of no other.

        Raises:
            ImportError: the package is not installed.
        """
        self.package, self._log, self._replaced = package, log, list[Replaced]()
        try:
            self.version = metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise ImportError(f"{package}: is not installed, must be {' or '.join(tried)}") from error
        if self.version not in tried:
            log.warning(
                "%s %s is untested with sdpo_kernels (tried: %s); only signatures were compared",
                package, self.version, ", ".join(tried),
            )  # fmt: skip
        self._found = _active.get(package)
        undo(package)

    def replace(self, owner: Any, name: str, parameters: Sequence[str], new: Callable[..., Any]) -> Callable[..., Any]:
        """Put `new` in the place of `owner.name`, a method or a module's function; returns the original.

        Raises:
            RuntimeError: there is no such function, or it takes other parameters. What was replaced before is undone.
        """
        original = getattr(owner, name, None)
        found = list(inspect.signature(original).parameters) if callable(original) else None
        if found != list(parameters):
            was = "missing" if found is None else f"one of ({', '.join(found)})"
            self._restore()
            place = f"{self.version}'s {owner.__name__}.{name}"
            raise RuntimeError(f"{self.package}: {place} was {was}, must take ({', '.join(parameters)})")

        # an inherited method has no entry of its own, which undo() must not leave behind
        self._replaced.append(Replaced(owner, name, vars(owner).get(name), new))
        setattr(owner, name, new)
        return original  # type: ignore[return-value]

    def activate(self) -> None:
        """To be called when every method is replaced; says which ones (level INFO)."""
        _active[self.package] = self
        self._log.info(
            "%s %s: replaced %s, to score tokens without logits", self.package, self.version, ", ".join(self.names)
        )

    @property
    def names(self) -> list[str]:
        """The replaced methods, as `class.method`."""
        return [f"{each.owner.__name__}.{each.name}" for each in self._replaced]

    def _restore(self) -> None:
        for owner, name, own, _ in reversed(self._replaced):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

    def __enter__(self) -> MethodPatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        undo(self.package)
        if self._found is not None:
            for each in self._found._replaced:
                setattr(each.owner, each.name, each.new)
            _active[self.package] = self._found


def undo(package: str) -> None:
    """Restore the package's own methods; does nothing if none is replaced."""
    found = _active.pop(package, None)
    if found is not None:
        found._restore()
