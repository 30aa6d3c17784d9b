"""TRL's trainers on these kernels: one call patches TRL, another undoes it.

    from sdpo_kernels.integrations import trl as fused_trl

    with fused_trl.patch():            # or patch() … unpatch()
        DPOTrainer(...).train()

From version 1.15 on, TRL computes the head of DPO, KTO, SFT, GRPO, RLOO and AsyncGRPO with one class,
`trl.kernels.chunked_logprob.ChunkedLogProbFunction`. `patch` replaces it by an object with the same `apply`, in every
loaded module that has the class under any name; modules imported later get it, too. (Replacing `apply` on the class
would be enough in eager mode, but `torch.compile` reads an autograd.Function's `forward` whatever its `apply` is.)

Written from TRL's source, 1.15 and 1.16: trl/kernels/chunked_logprob.py; `add_fused_lm_head` in trl/trainer/utils.py.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.backends import get_backend
from sdpo_kernels.backends.base import EXTRAS
from sdpo_kernels.logps import check_stash_bytes, linear_logps

logger = logging.getLogger(__name__)

__all__ = ["FusedHead", "Patch", "patch", "unpatch"]

SEAM = "trl.kernels.chunked_logprob"
NAME = "ChunkedLogProbFunction"
FIRST = (1, 15)
TRIED = ((1, 15), (1, 16))
NONE = inspect.Parameter.empty
# names and defaults of ChunkedLogProbFunction.forward, in order
SIGNATURE = (
    ("ctx", NONE), ("hidden", NONE), ("weight", NONE), ("bias", NONE), ("targets", NONE), ("temperature", NONE),
    ("chunk_size", NONE), ("final_logit_softcapping", None), ("logit_scale", 1.0), ("outputs", EXTRAS),
)  # fmt: skip

# TRL requests extras for the policy but not for the reference. Log-probs with extras may come from another kernel than
# those without, and then margins would not be exactly 0 if policy and reference are the same model.
SAME_KERNEL = ["mean_logits"]

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class FusedHead:
    """The replacement of TRL's class: the same `apply`, computed by `linear_logps`."""

    replaces: type  # TRL's class
    backend: str = "auto"
    stash_bytes: int | str = "auto"

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = EXTRAS,
    ) -> Results:
        """TRL's nine arguments and five results: log-probs, entropy, log Σp², mean logit, top-1.

        Args:
            hidden: [N, H]; weight: [V, H]; bias: [V] or None. As in TRL, the head is rounded to the autocast dtype, or
                to hidden's without autocast; each gradient has its tensor's own dtype.
            targets: [N] integers in [0, V).
            temperature, logit_scale, final_logit_softcapping: z = softcap·tanh(scale·(x·Wᵀ + b)/softcap)/temperature.
            chunk_size: TRL's vocabulary columns per tile, at least 1. No effect here: backends choose their own.
            outputs: which of the four results after the first to compute, and "log_probs"; the others are None.

        Returns:
            Vectors [N], float32 (top-1: bool). Log-probs and entropy carry gradients, the others do not.

        Raises:
            ValueError: an unknown output, chunk_size below 1, or what `linear_logps` rejects (a target outside [0, V),
                a softcap or logit_scale of 0).
            RuntimeError: DeepSpeed ZeRO-3, which has released the gathered head by the time of the backward.

        Differences from TRL: logits are never rounded to bfloat16, so bf16 log-probs are exact to float32; a target
        whose logit ties with an earlier token's counts as top-1; a target of −100, for which TRL returns a meaningless
        number, gives 0.
        """
        for name in outputs:
            if name != "log_probs" and name not in EXTRAS:
                raise ValueError(f"outputs: was {outputs!r}, must be names from log_probs, {', '.join(EXTRAS)}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size: was {chunk_size!r}, must be at least 1 (TRL's tile; not used here)")
        _refuse_zero3()

        # the other results are None; SAME_KERNEL keeps policy and reference on one kernel
        requested = [name for name in EXTRAS if name in outputs]
        weight, bias = _cast_head(hidden, weight, bias)
        out = linear_logps(
            hidden, weight, targets.long(), bias=bias, temperature=temperature, logit_scale=logit_scale,
            softcap=final_logit_softcapping, outputs=requested or SAME_KERNEL,
            backend=self.backend, stash_bytes=self.stash_bytes,
        )  # fmt: skip

        def result(name: str) -> Tensor | None:
            value: Tensor | None = getattr(out, name) if name in requested else None
            return value if value is None or value.dtype == torch.bool else value.float()

        entropy, log_sum_sq_probs, mean_logits, is_top1 = (result(name) for name in EXTRAS)
        return out.logps.float(), entropy, log_sum_sq_probs, mean_logits, is_top1


@dataclass(frozen=True, eq=False)
class Patch:
    """Returned by `patch`. As a context manager it restores what `patch` found."""

    ours: FusedHead
    found: type | FusedHead

    def __enter__(self) -> FusedHead:
        return self.ours

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _swap(self.ours, self.found)


def patch(*, backend: str = "auto", stash_bytes: int | str = "auto") -> Patch:
    """Let TRL's trainers score tokens with `linear_logps`, until `unpatch()` or the end of a `with patch():` block.

    Call it before or after creating trainers. A second call replaces the first one's settings; nested blocks each
    restore what they found. It changes modules of the whole process, for all threads, and logs once which ones
    (level INFO).

    Args:
        backend, stash_bytes: as in `linear_logps`. stash_bytes=0 uses the least memory; "auto" keeps up to 2·N·V bytes
            that TRL would recompute.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL before 1.15, or a version with another signature of that class. Versions after 1.16 with the
            same signature are patched, with a warning in the log.
        ValueError: an unknown backend, or stash_bytes that is neither "auto" nor at least 0.
    """
    if backend != "auto":
        get_backend(backend)
    check_stash_bytes(stash_bytes)
    found = _seam()
    original = found.replaces if isinstance(found, FusedHead) else found
    _check_signature(original)
    ours = FusedHead(original, backend, stash_bytes)
    replaced = _swap(found, ours)
    if found is original:
        _log_once(f"trl {_text(_version())}: replaced {NAME} by linear_logps in {', '.join(replaced)}")
    return Patch(ours, found)


def unpatch() -> None:
    """Put TRL's own class back wherever it was; does nothing if TRL is not patched."""
    found = getattr(sys.modules.get(SEAM), NAME, None)
    if isinstance(found, FusedHead):
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
def _log_once(message: str) -> None:
    logger.info(message)


def _seam() -> Any:
    """What TRL's name refers to now: its own class, or a FusedHead."""
    version = _version()
    if version < FIRST:
        raise RuntimeError(f"trl: was {_text(version)}, must be at least {_text(FIRST)}, which has {SEAM}.{NAME}")
    if version not in TRIED:
        logger.warning("trl %s is untested with sdpo_kernels; only its signature was compared", _text(version))
    try:
        return getattr(importlib.import_module(SEAM), NAME)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"trl: {_text(version)} has no {SEAM}.{NAME}, which patch() replaces: {error}") from error


def _version() -> tuple[int, int]:
    """TRL's (major, minor)."""
    try:
        trl = importlib.import_module("trl")
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ImportError(f"trl: is not installed, must be at least {_text(FIRST)}") from error
    # "1.16.0.dev0" is 1.16, too
    match = re.match(r"(\d+)\.(\d+)", str(trl.__version__))
    if match is None:
        raise RuntimeError(f"trl: its version was {trl.__version__!r}, must begin with two numbers")
    return int(match[1]), int(match[2])


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _check_signature(function: Any) -> None:
    """Raise RuntimeError if TRL's forward takes other arguments than `FusedHead.apply`."""
    parameters = inspect.signature(function.forward).parameters.values()
    found = tuple((p.name, p.default) for p in parameters)
    if found != SIGNATURE:
        raise RuntimeError(
            f"trl: {_text(_version())}'s {NAME}.forward takes {_arguments(found)}; this patch knows "
            f"{_arguments(SIGNATURE)} (trl {' and '.join(map(_text, TRIED))})"
        )


def _arguments(signature: Sequence[tuple[str, Any]]) -> str:
    return "(" + ", ".join(name if default is NONE else f"{name}={default!r}" for name, default in signature) + ")"


def _cast_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As in TRL, cast the head to hidden's dtype unless autocast decides; differentiable."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (hidden.dtype, weight.dtype):
        weight = weight.to(hidden.dtype)
    if bias is not None and bias.dtype not in (weight.dtype, torch.float32):
        bias = bias.to(weight.dtype)
    return weight, bias


def _refuse_zero3() -> None:
    # TRL gathers the sharded head again in its own backward; our op would find it empty there
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if torch.is_grad_enabled() and is_deepspeed_zero3_enabled():
        raise RuntimeError("trl: DeepSpeed ZeRO-3 releases the head before the backward; use ZeRO-2 or unpatch()")
