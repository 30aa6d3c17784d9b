"""The fused loss and the pair kernels of Triton and native, against four formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sdpo_kernels import ScoredRows, fused_linear_dpo
from tests.cuda.common import DEVICE, ON_CUDA, doubles, error, needs_cuda, run_alone, served, truth

BETA = 0.3
ORDER = [0, 2, 1, 3]  # the second sequence in memory is the first rejected one, and the other way round
REF = [-9.0, -11.0, -8.0, -12.0]
LOSSES = {"sigmoid": {}, "sigmoid smoothed": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.2},
          "hinge": {}, "ipo": {}}  # fmt: skip


def true_loss(name, chosen, rejected, counts, label_smoothing=0.0):
    """Mean loss of pairs from their log-ratios [B]."""
    z, e = BETA * (chosen - rejected), label_smoothing
    if name == "ipo":
        first, second = counts.double().chunk(2)
        return (chosen / first - rejected / second - 1 / (2 * BETA)).square().mean()
    if name == "hinge":
        return (1 - z).clamp(min=0).mean()
    right, wrong = -F.logsigmoid(z), -F.logsigmoid(-z)
    if name == "robust":
        return (((1 - e) * right - e * wrong) / (1 - 2 * e)).mean()
    return ((1 - e) * right + e * wrong).mean()


def batch(pairs, dtype, length=40, h=48, v=1003):
    """Hidden states, weight and labels whose sequences have between one scored token and all."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * pairs, length, h, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(v, h, generator=generator).div(4).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(v, (2 * pairs, length), generator=generator)
    counts = torch.randint(1, length + 1, (2 * pairs,), generator=generator)
    counts[0], counts[-1] = 1, length
    labels[torch.arange(length) >= counts[:, None]] = -100
    return hidden, weight, labels.to(DEVICE), counts.to(DEVICE)


@pytest.mark.parametrize("pairs", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradients_and_metrics(loss, dtype, pairs, backend):
    hidden, weight, labels, counts = batch(pairs, dtype)
    name = loss.split()[0]
    twin = doubles(hidden, weight)
    sums = truth(twin[0].flatten(0, 1), twin[1], labels.flatten()).view(labels.shape).sum(1)
    # margins of both signs and of about 1, so that hinge has pairs on both sides of its kink
    ref = (sums.detach() + torch.linspace(-4, 4, 2 * pairs, device=DEVICE).flip(0)).float()

    out = fused_linear_dpo(hidden, weight, labels, ref_logps=ref, beta=BETA, loss_type=name, **LOSSES[loss])
    out.loss.backward()
    chosen, rejected = (sums - ref.double()).chunk(2)
    expected = true_loss(name, chosen, rejected, counts, **LOSSES[loss])
    expected.backward()

    if backend != "eager":
        assert "pair_epilogue" in served
    assert error(out.loss, expected) < 1e-5
    assert error(out.margins, BETA * (chosen - rejected)) < 1e-4
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    assert error(hidden.grad, twin[0].grad) < rounding
    assert error(weight.grad, twin[1].grad) < rounding


def test_the_reference_is_scored_by_its_own_head(backend):
    hidden, weight, labels, _ = batch(3, torch.bfloat16)
    ref_hidden, ref_weight = hidden.detach().flip(-1), weight.detach().roll(1, 0)
    twin = doubles(hidden, weight)
    sums, ref = (
        truth(x.flatten(0, 1).double(), w.double(), labels.flatten()).view(labels.shape).sum(1)
        for x, w in (twin, (ref_hidden, ref_weight))
    )
    out = fused_linear_dpo(hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, beta=0.01)
    expected = -F.logsigmoid(0.01 * ((sums - ref)[:3] - (sums - ref)[3:])).mean()
    assert error(out.loss, expected) < 1e-5
    out.loss.backward()
    expected.backward()
    assert error(hidden.grad, twin[0].grad) < torch.finfo(torch.bfloat16).eps


def loss_of_permuted_rows(device: str, backend: str) -> float | str:
    """The loss if a collator numbers its sequences c0, r0, c1, r1 while they lie c0, c1, r0, r1, or the refusal."""
    hidden, weight, labels, rows = permuted(device)
    ref = torch.tensor(REF, device=device)
    try:
        return fused_linear_dpo(hidden, weight, labels, rows=rows, ref_logps=ref, backend=backend).loss.item()
    except ValueError as refusal:
        return str(refusal)


def permuted(device: str):
    """Four sequences of 2, 5, 3 and 4 scored tokens, whose `segment` does not ascend."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(4, 6, 16, generator=generator), torch.randn(30, 16, generator=generator)
    labels = torch.randint(30, (4, 6), generator=generator)
    labels[torch.arange(6) >= torch.tensor([2, 5, 3, 4])[:, None]] = -100
    own = ScoredRows.from_labels(labels)
    order = torch.tensor(ORDER)
    rows = ScoredRows(own.index, order[own.segment], own.counts[order])
    return hidden.to(device), weight.to(device), labels.to(device), rows.to(device)


def test_segments_that_do_not_ascend_are_honoured_or_refused(backend):
    """Never a wrong loss. On CUDA a refusal is a device assert, so the call has a process of its own."""
    # the eager backend's loss of the same sequences, in memory in the order that `segment` numbers them
    hidden, weight, labels, _ = permuted("cpu")
    ref = torch.tensor(REF)
    right = fused_linear_dpo(hidden[ORDER], weight, labels[ORDER], ref_logps=ref, backend="eager").loss.item()
    served.append("in another process")

    if ON_CUDA:
        done = run_alone(f"tests.cuda.test_fused_loss.loss_of_permuted_rows({DEVICE!r}, {backend!r})")
        found = done.stdout.splitlines()[-1] if done.returncode == 0 else done.stdout + done.stderr
    else:
        found = loss_of_permuted_rows(DEVICE, backend)
    assert "rows: " in str(found) or float(found) == pytest.approx(right, rel=1e-4)


@needs_cuda
def test_no_synchronisation_if_rows_are_given(backend):
    hidden, weight, labels, _ = batch(2, torch.bfloat16)
    rows = ScoredRows.from_labels(labels)
    ref = torch.full((4,), -70.0, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_linear_dpo(hidden, weight, labels, rows=rows, ref_logps=ref).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
