"""Stubs of TRL, of both generations: the names that `trl.patch()` replaces, in modules of TRL's names."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

from sdpo_kernels.backends.base import EXTRAS
from sdpo_kernels.integrations.trl_head import FusedHead, FusedHeadWithEntropy
from sdpo_kernels.integrations.trl_versions import CURRENT, OF_1_14


class TheirFunction:
    """A stub of ChunkedLogProbFunction of TRL 1.15 and later."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
        outputs=EXTRAS,
    ):  # fmt: skip
        raise NotImplementedError


class TheirFunctionOf114:
    """A stub of _ChunkedLogProbFunction of TRL 1.14."""

    @staticmethod
    def forward(
        ctx, last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ):
        raise NotImplementedError


def from_logits(logits, labels, **options):
    """A stub of selective_log_softmax_and_entropy of TRL 1.14, which computes the same from logits."""
    logps = logits.log_softmax(-1)
    return logps.gather(-1, labels[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def make_modules(monkeypatch, version, *names):
    """Empty modules of these names in sys.modules, the first one TRL's package."""
    for name in ("TheirFunction", "TheirFunctionOf114", "from_logits"):  # patch() finds these names, too
        monkeypatch.setattr(sys.modules[__name__], name, globals()[name])
    modules = [ModuleType(name) for name in names]
    modules[0].__version__ = version
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def make_current(monkeypatch):
    """TRL 1.16: the class, and two modules that imported it, one under another name."""
    names = ["trl", "trl.kernels", CURRENT.module, "trl.trainer.utils"]
    _, kernels, seam, utils = modules = make_modules(monkeypatch, "1.16.0", *names)
    for module in (kernels, seam):
        module.ChunkedLogProbFunction = TheirFunction
    utils._ChunkedLogProbFunction = TheirFunction
    return SimpleNamespace(
        package=modules[0], names=names[1:], where=CURRENT, theirs=TheirFunction, head=FusedHead, seam=seam,
        bound=lambda: (*(m.ChunkedLogProbFunction for m in (kernels, seam)), utils._ChunkedLogProbFunction),
    )  # fmt: skip


def make_1_14(monkeypatch):
    """TRL 1.14: the class, and two trainers that imported it."""
    names = ["trl", "trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", OF_1_14.module]
    modules = make_modules(monkeypatch, "1.14.1", *names)
    monkeypatch.setitem(sys.modules, "trl.kernels", ModuleType("trl.kernels"))  # there, but without the class
    for module in modules[1:]:
        module._ChunkedLogProbFunction = TheirFunctionOf114
        module.selective_log_softmax_and_entropy = from_logits
    return SimpleNamespace(
        package=modules[0], names=names[1:], where=OF_1_14, theirs=TheirFunctionOf114, head=FusedHeadWithEntropy,
        dpo=modules[1], seam=modules[-1], bound=lambda: [module._ChunkedLogProbFunction for module in modules[1:]],
    )  # fmt: skip
