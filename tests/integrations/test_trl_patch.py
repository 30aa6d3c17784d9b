"""patch() and unpatch() on a stub of TRL: what they replace, restore and reject."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sdpo_kernels import linear_logps
from sdpo_kernels.integrations import trl as fused_trl
from sdpo_kernels.integrations.trl import EXTRAS, FusedHead, patch, unpatch


class TheirFunction:
    """A stub of TRL's ChunkedLogProbFunction."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
        outputs=EXTRAS,
    ):  # fmt: skip
        raise NotImplementedError


@pytest.fixture
def trl(monkeypatch):
    """A package `trl` with the class and two modules that imported it, one under another name."""
    names = ["trl", "trl.kernels", fused_trl.SEAM, "trl.trainer.utils"]
    package, kernels, seam, utils = modules = [ModuleType(name) for name in names]
    package.__version__ = "1.16.0"
    kernels.ChunkedLogProbFunction = seam.ChunkedLogProbFunction = TheirFunction
    utils._ChunkedLogProbFunction = TheirFunction
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)

    def bound():
        return kernels.ChunkedLogProbFunction, seam.ChunkedLogProbFunction, utils._ChunkedLogProbFunction

    return SimpleNamespace(package=package, kernels=kernels, seam=seam, utils=utils, bound=bound)


@pytest.fixture(autouse=True)
def this_modules_own_name(monkeypatch):
    """This module has the class, too: restore it after each test."""
    monkeypatch.setattr(sys.modules[__name__], "TheirFunction", TheirFunction)


def untouched(trl, theirs):
    return all(held is theirs for held in trl.bound())


def test_every_name_is_replaced_and_put_back(trl):
    theirs = TheirFunction
    with patch() as ours:
        assert isinstance(ours, FusedHead)
        assert all(held is ours for held in (*trl.bound(), TheirFunction))
    assert untouched(trl, theirs)
    assert TheirFunction is theirs


def test_a_module_imported_in_the_meantime_is_patched_too(trl, monkeypatch):
    theirs = TheirFunction
    late = ModuleType("late")
    monkeypatch.setitem(sys.modules, "late", late)
    patch()
    late.Function = trl.kernels.ChunkedLogProbFunction
    unpatch()
    assert late.Function is theirs


def test_plain_calls(trl):
    theirs = TheirFunction
    unpatch()  # nothing to do
    patch()
    patch(stash_bytes=0)
    assert {held.stash_bytes for held in trl.bound()} == {0}
    unpatch()
    assert untouched(trl, theirs)
    unpatch()
    assert untouched(trl, theirs)


def test_unpatch_without_trl(monkeypatch):
    monkeypatch.delitem(sys.modules, fused_trl.SEAM, raising=False)
    unpatch()


def test_nested_blocks_restore_what_they_found(trl):
    theirs = TheirFunction
    with patch(backend="eager") as outer:
        with patch(stash_bytes=0) as inner:
            assert trl.seam.ChunkedLogProbFunction is inner
            assert inner.replaces is theirs
        assert all(held is outer for held in trl.bound())
    assert untouched(trl, theirs)


def test_unpatch_inside_a_block(trl):
    theirs = TheirFunction
    with patch(), patch():
        unpatch()
        assert untouched(trl, theirs)
    assert untouched(trl, theirs)


def test_an_exception_leaves_nothing_behind(trl):
    theirs = TheirFunction
    with pytest.raises(KeyError, match="theirs"), patch():
        raise KeyError("theirs")
    assert untouched(trl, theirs)


@pytest.mark.parametrize(
    ("version", "text"),
    [("1.14.2", "was 1.14, must be at least 1.15"), ("0.9", "at least 1.15"), ("unknown", "two numbers")],
)
def test_versions_that_are_refused(trl, version, text):
    theirs = TheirFunction
    trl.package.__version__ = version
    with pytest.raises(RuntimeError, match=text):
        patch()
    assert untouched(trl, theirs)


@pytest.mark.parametrize("version", ["1.15.0", "1.16.3"])
def test_tested_versions_log_nothing(trl, version, caplog):
    trl.package.__version__ = version
    with caplog.at_level(logging.WARNING), patch():
        assert not caplog.records


@pytest.mark.parametrize("version", ["1.17.0.dev0", "2.0.1"])
def test_a_later_version_with_the_same_signature_is_patched_with_a_warning(trl, version, caplog):
    trl.package.__version__ = version
    with caplog.at_level(logging.WARNING), patch() as ours:
        assert trl.utils._ChunkedLogProbFunction is ours
    assert f"trl {version[: version.index('.') + 2]}" in caplog.text


@pytest.mark.parametrize("version", ["1.16.0", "1.17.0"])
@pytest.mark.parametrize(
    "forward",
    [
        lambda ctx, hidden, weight, bias, targets, temperature, chunk_size: None,
        lambda ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None,
        logit_scale=1.0, outputs=("entropy",): None,
        lambda ctx, hidden, weight, bias, targets, temperature, chunk_size, logit_scale=1.0,
        final_logit_softcapping=None, outputs=EXTRAS: None,
    ],
    ids=["fewer arguments", "other outputs", "another order"],
)  # fmt: skip
def test_another_signature_is_refused(trl, monkeypatch, version, forward):
    theirs = TheirFunction
    trl.package.__version__ = version
    monkeypatch.setattr(theirs, "forward", staticmethod(forward))
    with pytest.raises(RuntimeError, match=rf"{version[:4]}'s ChunkedLogProbFunction.forward takes \(ctx, hidden"):
        patch()
    assert untouched(trl, theirs)


def test_a_version_without_the_class_is_refused(trl):
    del trl.seam.ChunkedLogProbFunction
    with pytest.raises(RuntimeError, match=r"has no trl\.kernels\.chunked_logprob\.ChunkedLogProbFunction"):
        patch()


def test_no_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="trl: is not installed"):
        patch()


@pytest.mark.parametrize("stash_bytes", [-1, "much", 0.5, True, None])
def test_wrong_stash_bytes_are_refused_at_once(trl, stash_bytes):
    theirs = TheirFunction
    with pytest.raises(ValueError, match=f"stash_bytes: was {stash_bytes!r}, must be"):
        patch(stash_bytes=stash_bytes)
    assert untouched(trl, theirs)


def test_what_was_replaced_is_logged_once(trl, caplog):
    fused_trl._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="sdpo_kernels"):
        for _ in range(2):
            with patch(), patch(stash_bytes=0):
                pass
    modules = ", ".join(sorted([__name__, "trl.kernels", fused_trl.SEAM, "trl.trainer.utils"]))
    assert [record.getMessage() for record in caplog.records] == [
        f"trl 1.16: replaced ChunkedLogProbFunction by linear_logps in {modules}"
    ]


def test_an_unknown_backend_is_refused(trl):
    theirs = TheirFunction
    with pytest.raises(ValueError, match="backend: was 'cuda'"):
        patch(backend="cuda")
    assert untouched(trl, theirs)


def call(**options):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator).requires_grad_()
    weight = torch.randn(30, 8, generator=generator).requires_grad_()
    arguments = {"hidden": hidden, "weight": weight, "bias": None, "targets": torch.arange(5)}
    arguments |= {"temperature": 1.0, "chunk_size": 7}
    return FusedHead(TheirFunction).apply(**arguments | options)


def test_what_apply_refuses():
    with pytest.raises(ValueError, match=r"outputs: was \('entropie',\)"):
        call(outputs=("entropie",))
    with pytest.raises(ValueError, match="chunk_size: was 0"):
        call(chunk_size=0)
    with pytest.raises(ValueError, match="targets: was 30"):
        call(targets=torch.arange(26, 31))
    with pytest.raises(ValueError, match="softcap"):
        call(final_logit_softcapping=0.0)


def test_zero3_is_refused_where_a_backward_would_follow(monkeypatch):
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        call()
    with torch.no_grad():
        call()


def test_settings_reach_linear_logps(monkeypatch):
    seen = {}

    def spy(*args, **options):
        seen.update(options)
        return linear_logps(*args, **options)

    monkeypatch.setattr(fused_trl, "linear_logps", spy)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=generator), torch.randn(30, 8, generator=generator)
    FusedHead(TheirFunction, "eager", 64).apply(hidden, weight, None, torch.arange(5), 2.0, 7, 3.0, 0.5, ())
    expected = {"temperature": 2.0, "softcap": 3.0, "logit_scale": 0.5, "backend": "eager", "stash_bytes": 64}
    assert expected.items() <= seen.items()
