"""Which class computes TRL's head in which version, and with which signature: what `trl.patch()` replaces.

Written from TRL's source:

| TRL | class | reached by |
|---|---|---|
| 1.15, 1.16 | `trl.kernels.chunked_logprob.ChunkedLogProbFunction` | DPO, KTO, SFT, GRPO, RLOO, AsyncGRPO |
| 1.14 | `trl.trainer.utils._ChunkedLogProbFunction` | with `use_liger_kernel=True`: DPO, KTO, GRPO; AsyncGRPO |
| 1.13 | the same class | AsyncGRPO only |
| 1.1 to 1.12 | a class of that name, without bias | AsyncGRPO only |
| before 1.1 | none | |
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdpo_kernels.backends.base import EXTRAS

Version = tuple[int, int]
Signature = tuple[tuple[str, Any], ...]  # names and defaults of forward, in order
NONE = inspect.Parameter.empty

# `liger_kernel_config` with which `use_liger_kernel=True` leaves the model's layers as they are, for TRL 1.14: there
# the option selects the trainers' way through the fused head, and transformers also puts Liger's layers into the model
LIGER_LAYERS_OFF = dict.fromkeys(
    (
        "rope", "rms_norm", "layer_norm", "swiglu", "geglu", "relu_squared", "cross_entropy",
        "fused_linear_cross_entropy",
    ),
    False,
)  # fmt: skip


@dataclass(frozen=True)
class Seam:
    """A class of TRL that is replaced."""

    module: str
    name: str
    signature: Signature
    logits_path: str | None = None  # the module's function that trainers call where they do not reach the class

    def current(self) -> Any:
        """What TRL's name refers to now: its own class, or ours. RuntimeError if there is no such name."""
        try:
            return getattr(importlib.import_module(self.module), self.name)
        except (ImportError, AttributeError) as error:
            has_not = f"{text(installed())} has no {self.module}.{self.name}"
            raise RuntimeError(f"trl: {has_not}, which patch() replaces: {error}") from error

    def if_loaded(self, name: str | None = None) -> Any:
        """As `current`, or another name of the module; None if it is not there or not imported yet."""
        return getattr(sys.modules.get(self.module), name or self.name, None)

    def check_signature(self, function: Any) -> None:
        """Raise RuntimeError if TRL's forward takes other arguments than are known."""
        parameters = inspect.signature(function.forward).parameters.values()
        found = tuple((p.name, p.default) for p in parameters)
        if found != self.signature:
            known = " and ".join(text(version) for version, seam in SEAMS.items() if seam is self)
            raise RuntimeError(
                f"trl: {text(installed())}'s {self.name}.forward takes {_arguments(found)}; this patch knows "
                f"{_arguments(self.signature)} (trl {known})"
            )


def _signature(hidden: str) -> Signature:
    return (
        ("ctx", NONE), (hidden, NONE), ("weight", NONE), ("bias", NONE), ("targets", NONE), ("temperature", NONE),
        ("chunk_size", NONE), ("final_logit_softcapping", None), ("logit_scale", 1.0),
    )  # fmt: skip


CURRENT = Seam(
    "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", (*_signature("hidden"), ("outputs", EXTRAS))
)  # fmt: skip
OF_1_14 = Seam(
    "trl.trainer.utils", "_ChunkedLogProbFunction", _signature("last_hidden"), "selective_log_softmax_and_entropy"
)  # fmt: skip
SEAMS: dict[Version, Seam] = {(1, 14): OF_1_14, (1, 15): CURRENT, (1, 16): CURRENT}  # the versions tried
FIRST = min(SEAMS)


def seam_of(version: Version) -> Seam:
    """The class that `version` has; a version after those tried is taken to have the newest one."""
    if version < FIRST:
        raise RuntimeError(
            f"trl: was {text(version)}, must be at least {text(FIRST)}, whose DPO, KTO and GRPO trainers share a head"
        )
    return SEAMS.get(version, CURRENT)


def installed() -> Version:
    """TRL's (major, minor)."""
    try:
        trl = importlib.import_module("trl")
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ImportError(f"trl: is not installed, must be at least {text(FIRST)}") from error
    # "1.16.0.dev0" is 1.16, too
    match = re.match(r"(\d+)\.(\d+)", str(trl.__version__))
    if match is None:
        raise RuntimeError(f"trl: its version was {trl.__version__!r}, must begin with two numbers")
    return int(match[1]), int(match[2])


def text(version: Version) -> str:
    """As people write it."""
    return f"{version[0]}.{version[1]}"


def _arguments(signature: Sequence[tuple[str, Any]]) -> str:
    return "(" + ", ".join(name if default is NONE else f"{name}={default!r}" for name, default in signature) + ")"
