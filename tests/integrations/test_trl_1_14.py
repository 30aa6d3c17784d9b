"""TRL 1.14's form of the head: log-probs and entropy with their gradients, and a word where it is not reached."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from sdpo_kernels.integrations import trl as fused_trl
from sdpo_kernels.integrations.trl import FusedHeadWithEntropy, LogitsPath, patch, unpatch
from tests.integrations import trl_stubs
from tests.reference import extras_of, logits_of, target_logps

ROWS, WIDTH, VOCAB = 19, 12, 71


def make_problem(bias, dtype):
    """hidden, weight and bias, targets, and gradients for log-probs and entropy."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, spread=1.0):
        return (torch.randn(*shape, generator=generator) * spread).to(dtype)

    tensors = {"last_hidden": normal(ROWS, WIDTH), "weight": normal(VOCAB, WIDTH, spread=0.5)}
    tensors["bias"] = normal(VOCAB) if bias else None
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    return tensors, targets, [torch.randn(ROWS, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("above", [(0, 1), (0,), (1,)], ids=["both", "log-probs", "entropy"])
@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, 5.0, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_float64(dtype, temperature, softcap, scale, above, bias):
    tensors, targets, gradients = make_problem(bias, dtype)
    mine = {name: None if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
    found = FusedHeadWithEntropy(trl_stubs.TheirFunctionOf114).apply(
        *mine.values(), targets, temperature, 8, softcap, scale
    )
    assert [(t.shape, t.dtype) for t in found] == [((ROWS,), torch.float32)] * 2

    wide = {name: None if t is None else t.double().requires_grad_() for name, t in tensors.items()}
    z = logits_of(*wide.values(), temperature=temperature, logit_scale=scale, softcap=softcap)
    right = target_logps(z, targets), extras_of(z, targets)["entropy"]
    for value, exact in zip(found, right, strict=True):
        assert (value - exact).abs().max() < 1e-5

    torch.autograd.backward([found[i] for i in above], [gradients[i] for i in above])
    torch.autograd.backward([right[i] for i in above], [gradients[i].double() for i in above])
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    for name, leaf in wide.items():
        if leaf is not None:
            assert mine[name].grad.dtype == dtype
            assert (mine[name].grad - leaf.grad).norm() < rounding * leaf.grad.norm(), name


def test_policy_and_reference_get_the_same_bits():
    tensors, targets, _ = make_problem(False, torch.bfloat16)
    head = FusedHeadWithEntropy(trl_stubs.TheirFunctionOf114)
    policy = head.apply(*(None if t is None else t.clone().requires_grad_() for t in tensors.values()), targets, 1.0, 8)
    with torch.no_grad():
        reference = head.apply(*tensors.values(), targets, 1.0, 8)
    assert torch.equal(policy[0], reference[0])


def test_zero3_and_a_tile_of_no_columns_are_refused(monkeypatch):
    tensors, targets, _ = make_problem(False, torch.float32)
    head = FusedHeadWithEntropy(trl_stubs.TheirFunctionOf114)
    with pytest.raises(ValueError, match="chunk_size: was 0"):
        head.apply(*tensors.values(), targets, 1.0, 0)
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        head.apply(*tensors.values(), targets, 1.0, 8)


@pytest.fixture
def trl(monkeypatch):
    """A stub of TRL 1.14, where nothing has been logged yet."""
    fused_trl._log_once.cache_clear()
    return trl_stubs.make_1_14(monkeypatch)


def compute_loss(module, tensors, targets, use_liger_kernel):
    """What DPOTrainer._compute_loss of TRL 1.14 does with the head, in the trainer's own module."""
    hidden, weight, _ = tensors.values()
    if use_liger_kernel:
        return module._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8, None, 1.0)
    return module.selective_log_softmax_and_entropy(hidden @ weight.T, targets, entropy_requires_grad=False)


def test_a_trainer_that_computes_logits_is_told_once(trl, caplog):
    tensors, targets, _ = make_problem(False, torch.float32)
    with patch(), caplog.at_level(logging.WARNING):
        fused = compute_loss(trl.dpo, tensors, targets, True)
        assert not caplog.messages
        for _ in range(3):
            own = compute_loss(trl.dpo, tensors, targets, False)
        assert caplog.messages == [
            "trl 1.14: log-probs are computed from logits, not by the fused head: DPO, KTO and GRPO reach it only with "
            "use_liger_kernel=True"
        ]
    for value, exact in zip(fused, own, strict=True):
        assert (value - exact).abs().max() < 1e-5


def test_the_function_of_the_logits_is_restored_with_the_class(trl):
    theirs = trl_stubs.from_logits

    def bound():
        return [module.selective_log_softmax_and_entropy for module in (trl.seam, trl.dpo)]

    with patch():
        assert all(isinstance(held, LogitsPath) and held.replaces is theirs for held in bound())
        with patch(stash_bytes=0):
            assert all(held.replaces is theirs for held in bound())
        assert all(isinstance(held, LogitsPath) for held in bound())  # still patched
    assert all(held is theirs for held in bound())

    with patch():
        unpatch()
        assert all(held is theirs for held in bound())


def test_a_version_of_1_14_without_that_function_is_patched_all_the_same(trl):
    for module in (trl.seam, trl.dpo):
        del module.selective_log_softmax_and_entropy
    with patch() as ours:
        assert trl.dpo._ChunkedLogProbFunction is ours
    assert trl.dpo._ChunkedLogProbFunction is trl.theirs


def test_from_1_15_on_every_trainer_reaches_the_head(monkeypatch):
    trl_stubs.make_current(monkeypatch)
    utils = sys.modules["trl.trainer.utils"]
    utils.selective_log_softmax_and_entropy = trl_stubs.from_logits
    with patch():
        assert utils.selective_log_softmax_and_entropy is trl_stubs.from_logits
