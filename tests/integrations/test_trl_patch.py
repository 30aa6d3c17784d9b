"""patch() and unpatch() on a stub of TRL, of both generations: what they replace, restore and reject."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch

from sdpo_kernels import linear_logps
from sdpo_kernels.integrations import trl as fused_trl
from sdpo_kernels.integrations import trl_head
from sdpo_kernels.integrations.trl import FusedHead, patch, unpatch
from sdpo_kernels.integrations.trl_head import EXTRAS
from sdpo_kernels.integrations.trl_versions import CURRENT, OF_1_14
from tests.integrations import trl_stubs
from tests.integrations.trl_stubs import make_1_14, make_current


@pytest.fixture(params=[make_current, make_1_14], ids=["1.16", "1.14"])
def trl(monkeypatch, request):
    """A package `trl`."""
    return request.param(monkeypatch)


def untouched(trl):
    return all(held is trl.theirs for held in trl.bound())


def test_every_name_is_replaced_and_put_back(trl):
    with patch() as ours:
        assert type(ours) is trl.head
        assert ours.replaces is trl.theirs
        assert all(held is ours for held in (*trl.bound(), getattr(trl_stubs, trl.theirs.__name__)))
    assert untouched(trl)
    assert getattr(trl_stubs, trl.theirs.__name__) is trl.theirs


def test_a_module_imported_in_the_meantime_is_patched_too(trl, monkeypatch):
    late = ModuleType("late")
    monkeypatch.setitem(sys.modules, "late", late)
    patch()
    late.Function = trl.bound()[0]
    unpatch()
    assert late.Function is trl.theirs


def test_plain_calls(trl):
    unpatch()  # nothing to do
    patch()
    patch(stash_bytes=0)
    assert {held.stash_bytes for held in trl.bound()} == {0}
    unpatch()
    assert untouched(trl)
    unpatch()
    assert untouched(trl)


def test_unpatch_without_trl(monkeypatch):
    for where in (CURRENT, OF_1_14):
        monkeypatch.delitem(sys.modules, where.module, raising=False)
    unpatch()


def test_nested_blocks_restore_what_they_found(trl):
    with patch(backend="eager") as outer:
        with patch(stash_bytes=0) as inner:
            assert all(held is inner for held in trl.bound())
            assert inner.replaces is trl.theirs
        assert all(held is outer for held in trl.bound())
    assert untouched(trl)


def test_a_block_restores_what_it_found_whatever_was_patched_in_it(trl):
    with patch() as outer:
        with patch():
            patch(stash_bytes=0)
        assert all(held is outer for held in trl.bound())
        patch(stash_bytes=0)
    assert untouched(trl)


def test_unpatch_inside_a_block(trl):
    with patch(), patch():
        unpatch()
        assert untouched(trl)
    assert untouched(trl)


def test_an_exception_leaves_nothing_behind(trl):
    with pytest.raises(KeyError, match="theirs"), patch():
        raise KeyError("theirs")
    assert untouched(trl)


@pytest.mark.parametrize(
    ("version", "text"),
    [("1.13.0", "was 1.13, must be at least 1.14"), ("0.9", "at least 1.14"), ("unknown", "two numbers")],
)
def test_versions_that_are_refused(trl, version, text):
    trl.package.__version__ = version
    with pytest.raises(RuntimeError, match=text):
        patch()
    assert untouched(trl)


@pytest.mark.parametrize(
    ("make", "version"), [(make_current, "1.15.0"), (make_current, "1.16.3"), (make_1_14, "1.14.0")]
)
def test_tested_versions_log_nothing(monkeypatch, make, version, caplog):
    trl = make(monkeypatch)
    trl.package.__version__ = version
    with caplog.at_level(logging.WARNING), patch():
        assert not caplog.records


@pytest.mark.parametrize("version", ["1.17.0.dev0", "2.0.1"])
def test_a_later_version_with_the_same_signature_is_patched_with_a_warning(monkeypatch, version, caplog):
    trl = make_current(monkeypatch)
    trl.package.__version__ = version
    with caplog.at_level(logging.WARNING), patch() as ours:
        assert all(held is ours for held in trl.bound())
    assert f"trl {version[: version.index('.') + 2]}" in caplog.text


def of_current(forward):
    return [(make_current, version, forward) for version in ("1.16.0", "1.17.0")]


@pytest.mark.parametrize(
    ("make", "version", "forward"),
    [
        *of_current(lambda ctx, hidden, weight, bias, targets, temperature, chunk_size: None),
        *of_current(lambda ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None,
                    logit_scale=1.0, outputs=("entropy",): None),
        *of_current(lambda ctx, hidden, weight, bias, targets, temperature, chunk_size, logit_scale=1.0,
                    final_logit_softcapping=None, outputs=EXTRAS: None),
        (make_1_14, "1.14.1", trl_stubs.TheirFunction.forward),
        (make_1_14, "1.14.1", lambda ctx, last_hidden, weight, targets, temperature, chunk_size,
         final_logit_softcapping=None, logit_scale=1.0: None),  # TRL 1.12's
    ],
)  # fmt: skip
def test_another_signature_is_refused(monkeypatch, make, version, forward):
    trl = make(monkeypatch)
    trl.package.__version__ = version
    monkeypatch.setattr(trl.theirs, "forward", staticmethod(forward))
    text = rf"trl: {version[:4]}'s {trl.where.name}.forward takes \(ctx, .*; this patch knows \(ctx"
    with pytest.raises(RuntimeError, match=text):
        patch()
    assert untouched(trl)


def test_a_version_without_the_class_is_refused(trl):
    delattr(trl.seam, trl.where.name)
    with pytest.raises(RuntimeError, match=rf"has no {trl.where.module}\.{trl.where.name}, which patch"):
        patch()


def test_no_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="trl: is not installed"):
        patch()


@pytest.mark.parametrize("stash_bytes", [-1, "much", 0.5, True, None])
def test_wrong_stash_bytes_are_refused_at_once(trl, stash_bytes):
    with pytest.raises(ValueError, match=f"stash_bytes: was {stash_bytes!r}, must be"):
        patch(stash_bytes=stash_bytes)
    assert untouched(trl)


def test_what_was_replaced_is_logged_once(trl, caplog):
    fused_trl._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="sdpo_kernels"):
        for _ in range(2):
            with patch(), patch(stash_bytes=0):
                pass
    modules = ", ".join(sorted([trl_stubs.__name__, *trl.names]))
    (message,) = caplog.messages
    version = trl.package.__version__[:4]
    assert message.startswith(f"trl {version}: replaced {trl.where.name} by linear_logps in {modules}")
    assert message.endswith("reach it only with use_liger_kernel=True") == (version == "1.14")


def test_an_unknown_backend_is_refused(trl):
    with pytest.raises(ValueError, match="backend: was 'cuda'"):
        patch(backend="cuda")
    assert untouched(trl)


def call(**options):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator).requires_grad_()
    weight = torch.randn(30, 8, generator=generator).requires_grad_()
    arguments = {"hidden": hidden, "weight": weight, "bias": None, "targets": torch.arange(5)}
    arguments |= {"temperature": 1.0, "chunk_size": 7}
    return FusedHead(trl_stubs.TheirFunction).apply(**arguments | options)


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

    monkeypatch.setattr(trl_head, "linear_logps", spy)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 8, generator=generator), torch.randn(30, 8, generator=generator)
    ours = FusedHead(trl_stubs.TheirFunction, "eager", 64, 0.01, True)
    ours.apply(hidden, weight, None, torch.arange(5), 2.0, 7, 3.0, 0.5, ())
    expected = {"temperature": 2.0, "softcap": 3.0, "logit_scale": 0.5, "backend": "eager", "stash_bytes": 64}
    expected |= {"grad_tol": 0.01, "grad_tol_relative": True}
    assert expected.items() <= seen.items()
