"""Replace methods of another library's classes, and put them back: what the adapters for other trainers share.

    adapter = MethodPatch("llamafactory", tried=("0.9.5",))
    adapter.replace(CustomDPOTrainer, "concatenated_forward", ("self", "model", "batch", "is_ref_model"), ours)
    adapter.undo()

A method is replaced only if its parameters are the known ones, so that another version of the library is refused, not
half patched.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from importlib import metadata
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class MethodPatch:
    """The replaced methods of one library; as a context manager it restores them at the end of the block."""

    def __init__(self, package: str, tried: Sequence[str]) -> None:
        """
        Args:
            package: the distribution's name on PyPI.
            tried: the versions that the adapter has been run with; any other is patched with a warning in the log.

        Raises:
            ImportError: the package is not installed.
        """
        self.package, self._replaced = package, list[tuple[Any, str, Any]]()
        try:
            self.version = metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise ImportError(f"{package}: is not installed, must be {' or '.join(tried)}") from error
        if self.version not in tried:
            logger.warning(
                "%s %s is untested with sdpo_kernels (tried: %s); only signatures were compared",
                package, self.version, ", ".join(tried),
            )  # fmt: skip

    def replace(self, owner: Any, name: str, parameters: Sequence[str], new: Callable[..., Any]) -> Callable[..., Any]:
        """Put `new` in the place of `owner.name`, a method or a module's function; returns the original.

        Raises:
            RuntimeError: there is no such function, or it takes other parameters. What was replaced before is undone.
        """
        original = getattr(owner, name, None)
        found = list(inspect.signature(original).parameters) if callable(original) else None
        if found != list(parameters):
            was = "missing" if found is None else f"one of ({', '.join(found)})"
            self.undo()
            place = f"{self.version}'s {owner.__name__}.{name}"
            raise RuntimeError(f"{self.package}: {place} was {was}, must take ({', '.join(parameters)})")

        # an inherited method has no entry of its own, which undo() must not leave behind
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, new)
        return original  # type: ignore[return-value]

    def log(self) -> None:
        """Say what was replaced (level INFO)."""
        names = ", ".join(f"{owner.__name__}.{name}" for owner, name, _ in self._replaced)
        logger.info("%s %s: scores tokens without logits in %s", self.package, self.version, names)

    def undo(self) -> None:
        """Restore every replaced method; does nothing the second time."""
        while self._replaced:
            owner, name, original = self._replaced.pop()
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def __enter__(self) -> MethodPatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()
