"""Methods of another library are replaced, restored, or refused whole."""

from __future__ import annotations

import logging

import pytest

from sdpo_kernels.integrations.method_patch import MethodPatch, undo


class Base:
    def score(self, batch):
        return "own"


class Trainer(Base):
    def step(self, batch, scale=1.0):
        return "own"


def ours(self, *args):
    return "ours"


def test_methods_are_replaced_and_restored(caplog):
    step = Trainer.step
    with caplog.at_level(logging.INFO), MethodPatch("pytest", tried=(pytest.__version__,)) as patch:
        original = patch.replace(Trainer, "step", ("self", "batch", "scale"), ours)
        assert original is step
        assert Trainer().step(1) == "ours"

        # inherited: the base class keeps its own
        patch.replace(Trainer, "score", ("self", "batch"), ours)
        assert Trainer().score(1) == "ours"
        assert Base().score(1) == "own"
        patch.activate()
    assert caplog.messages == [
        f"pytest {pytest.__version__}: replaced Trainer.step, Trainer.score, to score tokens without logits"
    ]
    assert Trainer.step is step
    assert "score" not in vars(Trainer)
    assert Trainer().score(1) == "own"
    undo("pytest")
    assert Trainer.step is step


def replaced_by(answer: str) -> MethodPatch:
    patch = MethodPatch("pytest", tried=(pytest.__version__,))
    patch.replace(Trainer, "step", ("self", "batch", "scale"), lambda self, *args: answer)
    patch.activate()
    return patch


def test_a_block_restores_what_it_found():
    """The outer block's methods after an inner block, and the library's own after the outer one."""
    step = Trainer.step
    with replaced_by("outer"):
        with replaced_by("inner"):
            assert Trainer().step(1) == "inner"
        assert Trainer().step(1) == "outer"
        replaced_by("a second patch, without a block of its own")
    assert Trainer.step is step

    with replaced_by("outer"), replaced_by("inner"):
        undo("pytest")
        assert Trainer.step is step
    assert Trainer.step is step


def test_another_signature_is_refused_and_nothing_stays_replaced():
    step = Trainer.step
    patch = MethodPatch("pytest", tried=(pytest.__version__,))
    patch.replace(Trainer, "step", ("self", "batch", "scale"), ours)
    with pytest.raises(RuntimeError, match=r"Trainer.score was one of \(self, batch\), must take \(self, rows\)"):
        patch.replace(Trainer, "score", ("self", "rows"), ours)
    assert Trainer.step is step

    with pytest.raises(RuntimeError, match=r"pytest: .*'s Trainer.other was missing, must take \(self\)"):
        patch.replace(Trainer, "other", ("self",), ours)


def test_versions(caplog):
    with pytest.raises(ImportError, match=r"no-such-trainer: is not installed, must be 1.0 or 1.1"):
        MethodPatch("no-such-trainer", tried=("1.0", "1.1"))
    MethodPatch("pytest", tried=("0.1",))
    assert "is untested with sdpo_kernels (tried: 0.1); only signatures were compared" in caplog.text
