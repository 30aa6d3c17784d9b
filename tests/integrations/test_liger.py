"""Liger's DPO loss, as class and function: equal to its own where that is right, to float64 where it is wrong."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from sdpo_kernels.integrations.liger import (
    LOSSES,
    LigerFusedLinearDPOFunction,
    LigerFusedLinearDPOLoss,
    liger_fused_linear_dpo,
)

PAIRS, LENGTH, WIDTH, VOCAB = 3, 7, 16, 97
NAMES = ("loss", "chosen_logps", "rejected_logps", "chosen_logits_mean", "rejected_logits_mean", "nll_loss",
         "chosen_rewards", "rejected_rewards")  # fmt: skip
NEEDS_SMOOTHING = ("robust", "exo_pair")


@pytest.fixture
def liger():
    """Liger's own class."""
    reason = "liger-kernel is not importable (make bench-env installs it)"
    return pytest.importorskip("liger_kernel.chunked_loss", reason=reason).LigerFusedLinearDPOLoss


def make_batch(seed=0, dtype=torch.float32):
    """Arguments of the call, with about a third of the targets masked; the reference has another head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, spread=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(dtype)

    target = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = -100
    return {
        "lin_weight": normal(VOCAB, WIDTH, spread=0.5), "_input": normal(2 * PAIRS, LENGTH, WIDTH), "target": target,
        "bias": normal(VOCAB), "ref_input": normal(2 * PAIRS, LENGTH, WIDTH),
        "ref_weight": normal(VOCAB, WIDTH, spread=0.5), "ref_bias": normal(VOCAB),
    }  # fmt: skip


TRAINED = ("lin_weight", "_input", "bias")
REFERENCE = ("ref_input", "ref_weight", "ref_bias")


def found(loss, batch, factor=1.7):
    """Every output and gradient by name."""
    leaves = {name: batch[name].clone().requires_grad_() for name in TRAINED if name in batch}
    value, further = loss(**batch | leaves)
    (value * factor).backward()
    answers = dict(zip(NAMES, (value, *further), strict=True))
    return {n: t.detach() for n, t in answers.items()} | {f"d_{n}": leaf.grad for n, leaf in leaves.items()}


def assert_near(mine, theirs, tolerance=3e-6):
    assert mine.keys() == theirs.keys()
    for name, right in theirs.items():
        assert (mine[name].shape, mine[name].dtype) == (right.shape, right.dtype), name
        error = (mine[name] - right).abs().max().item() / max(1.0, right.abs().max().item())
        assert error < tolerance, f"{name}: {error:.1e}"


def test_constructor_and_call_are_ligers(liger):
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(c, method)).parameters for c in (LigerFusedLinearDPOLoss, liger))
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def test_the_function_is_ligers(liger):
    theirs = pytest.importorskip("liger_kernel.chunked_loss.functional")
    _ctx, *expected = inspect.signature(theirs.LigerFusedLinearDPOFunction.forward).parameters.values()
    ours = inspect.signature(LigerFusedLinearDPOFunction.apply).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in expected]

    batch = make_batch()
    arguments = [batch[name] for name in ("_input", "lin_weight", "target", "bias", *REFERENCE)]
    arguments += [-100, 0.2, True, False, True, True, 1, "robust", 0.1, 0.05, 0.7]
    (mine, further), (right, others) = (f(*arguments) for f in (liger_fused_linear_dpo, theirs.liger_fused_linear_dpo))
    for value, exact in zip((mine, *further), (right, *others), strict=True):
        assert (value - exact).abs().max() < 1e-5


# in the order of the function's arguments, each another number than its default
FUNCTION_OPTIONS = {
    "ignore_index": -7, "beta": 0.2, "compute_nll_loss": True, "compiled": False, "use_ref_model": True,
    "average_log_prob": True, "chunk_size": 2, "loss_type": "robust", "label_smoothing": 0.1, "discopop_tau": 0.05,
    "alpha": 0.7,
}  # fmt: skip


def test_the_functions_positions_are_the_classs_names():
    batch = make_batch()
    batch["target"] = batch["target"].masked_fill(batch["target"] == -100, -7)
    expected = found(LigerFusedLinearDPOLoss(**FUNCTION_OPTIONS), batch)

    def function(lin_weight, _input, **others):
        return liger_fused_linear_dpo(_input, lin_weight, *others.values(), *FUNCTION_OPTIONS.values())

    ordered = {name: batch[name] for name in ("lin_weight", "_input", "target", "bias", *REFERENCE)}
    assert_near(found(function, ordered), expected, tolerance=1e-12)
    assert liger_fused_linear_dpo is LigerFusedLinearDPOFunction.apply


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss_type": "invalid_loss_type"}, "Unsupported loss_type"),
        (
            {"loss_type": "exo_pair", "label_smoothing": 0.0},
            r"label_smoothing must be > 0 for loss_type='exo_pair', was 0\.0",
        ),
        (
            {"loss_type": "robust", "label_smoothing": 0.5},
            r"label_smoothing must lie in \[0\.0, 0\.5\) for loss_type='robust', was 0\.5",
        ),
        (
            {"loss_type": "robust", "label_smoothing": -0.1},
            r"label_smoothing must lie in \[0\.0, 0\.5\) for loss_type='robust', was -0\.1",
        ),
    ],
)
def test_errors_in_ligers_words(options, text):
    with pytest.raises(ValueError, match=text):
        LigerFusedLinearDPOLoss(**options)
    batch = make_batch()
    with pytest.raises(ValueError, match=text):
        liger_fused_linear_dpo(batch["_input"], batch["lin_weight"], batch["target"], use_ref_model=False, **options)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("nll", [False, True], ids=["", "nll"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("reference", [False, True], ids=["no reference", "reference"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_equals_liger_where_liger_is_right(liger, loss_type, reference, average, nll, bias):
    options = {"loss_type": loss_type, "use_ref_model": reference, "average_log_prob": average, "beta": 0.2}
    options |= {"compute_nll_loss": nll, "alpha": 0.7, "compiled": False}
    options |= {"label_smoothing": 0.1} if loss_type in NEEDS_SMOOTHING else {}
    batch = make_batch()
    for name in (() if reference else REFERENCE) + (() if bias else ("bias", "ref_bias")):
        batch.pop(name, None)
    assert_near(found(LigerFusedLinearDPOLoss(**options), batch), found(liger(**options), batch))


def test_equals_liger_with_the_policys_head_as_reference(liger):
    batch = make_batch()
    batch |= {"ref_weight": batch["lin_weight"], "ref_bias": batch["bias"]}
    theirs = found(liger(compiled=False), batch)
    assert_near(found(LigerFusedLinearDPOLoss(), batch), theirs)
    loss = LigerFusedLinearDPOLoss()  # the very same tensors: one pass for both
    assert_near({"loss": loss(**batch)[0]}, {"loss": theirs["loss"]})


def test_another_ignore_index(liger):
    batch = make_batch()
    expected = found(LigerFusedLinearDPOLoss(), batch)
    batch["target"] = batch["target"].masked_fill(batch["target"] == -100, -7)
    mine = found(LigerFusedLinearDPOLoss(ignore_index=-7), batch)
    assert_near(mine, expected, tolerance=1e-12)
    assert_near(mine, found(liger(ignore_index=-7, compiled=False), batch))


def test_minus_100_is_no_label_where_ignore_index_is_another():
    with pytest.raises(ValueError, match="targets: was -1"):
        LigerFusedLinearDPOLoss(ignore_index=-7)(**make_batch())


def truth(batch, *, average=False, smoothing=0.0, beta=0.1):
    """Loss and gradients of the sigmoid loss in float64, by log_softmax; masked sequences have log-prob 0."""
    wide = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    leaves = {name: wide[name].clone().requires_grad_() for name in TRAINED}
    target, mask = wide["target"], wide["target"] != -100

    def logps(x, w, b):
        z = (x @ w.T + b).log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (z * mask).sum(1) / (mask.sum(1).clamp(min=1) if average else 1)

    ratio = logps(leaves["_input"], leaves["lin_weight"], leaves["bias"]) - logps(*(wide[n] for n in REFERENCE))
    z = beta * (ratio[:PAIRS] - ratio[PAIRS:])
    loss = (-(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)).mean()
    loss.backward()
    return {"loss": loss.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}


def assert_true(mine, right, tolerance=3e-6):
    assert_near({name: mine[name].double() for name in right}, right, tolerance)


def test_label_smoothing_is_honoured_with_sigmoid():
    batch = make_batch()
    smooth = found(LigerFusedLinearDPOLoss(label_smoothing=0.2), batch, factor=1.0)
    assert_true(smooth, truth(batch, smoothing=0.2))
    assert abs(smooth["loss"] - found(LigerFusedLinearDPOLoss(), batch)["loss"]) > 1e-2


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("masked", [[0], [4], [1, 4], [0, 1, 2], list(range(2 * PAIRS))], ids=str)
def test_masked_sequences_give_no_nan(average, masked):
    batch = make_batch()
    batch["target"][masked] = -100
    options = {"average_log_prob": average, "compute_nll_loss": False}
    mine = found(LigerFusedLinearDPOLoss(**options), batch, factor=1.0)
    assert_true(mine, truth(batch, average=average))
    assert all(t.isfinite().all() for t in mine.values())
    assert not mine["d__input"][masked].any()


def test_nll_of_no_chosen_token_is_0():
    batch = make_batch()
    batch["target"][:PAIRS] = -100
    mine = found(LigerFusedLinearDPOLoss(compute_nll_loss=True), batch, factor=1.0)
    assert mine["nll_loss"] == 0
    assert_true(mine, truth(batch))


def test_bfloat16_is_nearer_to_float64_than_liger(liger):
    batch = make_batch(dtype=torch.bfloat16)
    right = truth(batch)
    mine, theirs = (found(c, batch, factor=1.0) for c in (LigerFusedLinearDPOLoss(), liger(compiled=False)))
    assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in theirs.items()}
    assert abs(mine["loss"].double() - right["loss"]) < 1e-5
    assert abs(theirs["loss"].double() - right["loss"]) > 1e-5
    for name in ("d_lin_weight", "d__input"):
        errors = [(side[name].double() - right[name]).norm() for side in (mine, theirs)]
        assert errors[0] < errors[1], name


def test_logit_means_are_over_all_positions():
    batch = make_batch(dtype=torch.float64)
    z = batch["_input"] @ batch["lin_weight"].T + batch["bias"]
    mine = found(LigerFusedLinearDPOLoss(), batch)
    assert torch.allclose(mine["chosen_logits_mean"], z[:PAIRS].mean(), rtol=0, atol=1e-12)
    assert torch.allclose(mine["rejected_logits_mean"], z[PAIRS:].mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss_type": "ipo"}, "Unsupported loss_type: was 'ipo'"),
        ({"chunk_size": 0}, "chunk_size: was 0"),
        ({"beta": 0.0}, "beta: was 0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: the loss 'hinge' does not use it"),
        ({"discopop_tau": 0.1}, "discopop_tau: the loss 'sigmoid' does not use it"),
        ({"label_smoothing": 0.5}, "label_smoothing: was 0.5"),
    ],
)
def test_settings_that_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        LigerFusedLinearDPOLoss(**options)


def without(*names):
    return {name: value for name, value in make_batch().items() if name not in names}


@pytest.mark.parametrize(
    ("options", "batch", "text"),
    [
        (
            {},
            {n: t[:5] if t.shape[0] == 6 else t for n, t in make_batch().items()},
            r"_input: was of shape \[5, 7, 16\]",
        ),
        ({}, make_batch() | {"_input": torch.zeros(6, 16)}, r"must be \[2B, T, H\]"),
        ({}, make_batch() | {"target": torch.zeros(6, 6, dtype=torch.int64)}, r"target: was of shape \[6, 6\]"),
        ({}, without("ref_input"), "ref_input: was None"),
        ({}, without("ref_weight"), "ref_weight: was None"),
        ({"use_ref_model": False}, make_batch(), "ref_input: was given"),
        ({}, make_batch() | {"ref_input": torch.zeros(4, 7, 16)}, r"ref_input: was of shape \[4, 7, 16\]"),
    ],
    ids=["odd", "flat", "target", "no ref_input", "no ref_weight", "unused reference", "other reference"],
)
def test_batches_that_are_refused(options, batch, text):
    with pytest.raises(ValueError, match=text):
        LigerFusedLinearDPOLoss(**options)(**batch)
