"""TRL's trainers on these kernels: one call patches TRL, another undoes it.

    from sdpo_kernels.integrations import trl as fused_trl

    with fused_trl.patch():            # or patch() … unpatch()
        DPOTrainer(...).train()

From version 1.15 on, TRL computes the head of DPO, KTO, SFT, GRPO, RLOO and AsyncGRPO with one class. `patch` replaces
it by an object with the same `apply`, in every loaded module that has the class under any name; modules imported later
get it, too. (Replacing `apply` on the class would be enough in eager mode, but `torch.compile` reads an
autograd.Function's `forward` whatever its `apply` is.)

TRL 1.14 has an earlier form of that class, which DPO, KTO and GRPO reach only with `use_liger_kernel=True`; otherwise
they compute logits, and the patch says so once (level WARNING). That option also puts Liger's layers into the model:

    DPOConfig(use_liger_kernel=True, liger_kernel_config=fused_trl.LIGER_LAYERS_OFF)     # the head alone

Earlier versions and the classes themselves: trl_versions.py.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

from sdpo_kernels.integrations import trl_versions as versions
from sdpo_kernels.integrations.head_settings import checked_settings
from sdpo_kernels.integrations.trl_head import FusedHead, FusedHeadWithEntropy, Head
from sdpo_kernels.integrations.trl_versions import LIGER_LAYERS_OFF, OF_1_14, Seam

logger = logging.getLogger(__name__)

__all__ = ["LIGER_LAYERS_OFF", "FusedHead", "FusedHeadWithEntropy", "Patch", "patch", "unpatch"]

HEADS: dict[versions.Seam, type[Head]] = {versions.CURRENT: FusedHead, OF_1_14: FusedHeadWithEntropy}
ONLY_WITH = "DPO, KTO and GRPO reach it only with use_liger_kernel=True"


@dataclass(frozen=True, eq=False)
class LogitsPath:
    """TRL 1.14's function for trainers that have logits: says once that the fused head was not used, then calls it."""

    replaces: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _log_once(f"trl 1.14: log-probs are computed from logits, not by the fused head: {ONLY_WITH}", logging.WARNING)
        return self.replaces(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Patch:
    """Returned by `patch`. As a context manager it restores what `patch` found."""

    seam: Seam
    ours: Head
    found: type | Head

    def __enter__(self) -> Head:
        return self.ours

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _swap(self.seam.current(), self.found)  # not `ours`, if another patch() in the block has replaced it
        _watch_logits()


def patch(
    *,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
    grad_tol: float = 0.0,
    grad_tol_relative: bool = False,
) -> Patch:
    """Let TRL's trainers score tokens with `linear_logps`, until `unpatch()` or the end of a `with patch():` block.

    Call it before or after creating trainers. A second call replaces the first one's settings; nested blocks each
    restore what they found. It changes modules of the whole process, for all threads, and logs once which ones
    (level INFO). In TRL 1.14, a trainer without `use_liger_kernel=True` computes logits as before, with one warning in
    the log.

    Args:
        backend, stash_bytes, grad_tol, grad_tol_relative: as in `linear_logps`. stash_bytes=0 uses the least memory;
            "auto" keeps up to 2·N·V bytes that TRL would recompute.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL before 1.14, or a version with another signature of that class. Versions after 1.16 with the
            same signature are patched, with a warning in the log.
        ValueError: an unknown backend, stash_bytes that is neither "auto" nor at least 0, or a grad_tol outside [0, 1).
    """
    settings = checked_settings(backend, stash_bytes, grad_tol, grad_tol_relative)

    version = versions.installed()
    seam, name = versions.seam_of(version), versions.text(version)
    if version not in versions.SEAMS:
        logger.warning("trl %s is untested with sdpo_kernels; only its signature was compared", name)
    found = seam.current()
    original = found.replaces if isinstance(found, Head) else found
    seam.check_signature(original)

    ours = HEADS[seam](original, **settings)
    replaced = _swap(found, ours)
    _watch_logits()
    if found is original:
        condition = f"; {ONLY_WITH}" if seam.logits_path else ""
        _log_once(f"trl {name}: replaced {seam.name} by linear_logps in {', '.join(replaced)}{condition}")
    return Patch(seam, ours, found)


def unpatch() -> None:
    """Put TRL's own class back wherever it was; does nothing if TRL is not patched."""
    for seam in HEADS:
        found = seam.if_loaded()
        if isinstance(found, Head):
            _swap(found, found.replaces)
    _watch_logits()


def _watch_logits() -> None:
    """Let TRL 1.14's way through logits say so while TRL is patched, and only then."""
    found = OF_1_14.if_loaded(OF_1_14.logits_path)
    patched = isinstance(OF_1_14.if_loaded(), FusedHeadWithEntropy)
    if patched and found is not None and not isinstance(found, LogitsPath):
        _swap(found, LogitsPath(found))
    elif not patched and isinstance(found, LogitsPath):
        _swap(found, found.replaces)


def _swap(old: object, new: object) -> list[str]:
    """Rebind every global that is `old`, in every loaded module, to `new`; returns the names of those modules."""
    changed = []
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})  # not dir(): it would make a lazy module load
        for name in [name for name, value in list(names.items()) if value is old]:
            setattr(module, name, new)
            changed.append(module.__name__)
    return sorted(set(changed))


@lru_cache
def _log_once(message: str, level: int = logging.INFO) -> None:
    logger.log(level, message)
