"""The eager backend and the Hugging Face layer on a CUDA device; `benchmarks/gpu.sh` runs these where one is lent."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels import ScoredRows, fused_linear_dpo, linear_logps, logits_logps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS = [
    {},
    {"softcap": 5.0, "logit_scale": 1.3, "temperature": 0.7},
    {"stash_bytes": 0},
    {"stash_bytes": 10**9},
]


def problem(dtype: torch.dtype, n: int = 333, h: int = 64, v: int = 5003) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(v, h, device="cuda").div(4).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), device="cuda")
    targets[::5] = -100
    return hidden, weight, targets


def truth(hidden, weight, targets, softcap=None, logit_scale=1.0, temperature=1.0, **_):
    z = hidden.double() @ weight.double().T * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logps = (z / temperature).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return logps * (targets >= 0)


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, options):
    hidden, weight, targets = problem(dtype)
    twin = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    coefficient = torch.randn(targets.shape, device="cuda")
    out = linear_logps(hidden, weight, targets, **options).logps
    expected = truth(*twin, targets, **options)
    (out.double() * coefficient).sum().backward()
    (expected * coefficient).sum().backward()
    exact = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert error(out, expected) < 20 * exact
    rounding = torch.finfo(dtype).eps  # gradients are rounded to the parameter's dtype; bf16 dlogits besides
    assert error(hidden.grad, twin[0].grad) < max(rounding, 100 * exact)
    assert error(weight.grad, twin[1].grad) < max(rounding, 100 * exact)


def test_no_synchronisation_where_rows_are_given():
    hidden = torch.randn(4, 16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(1000, (4, 16), device="cuda")
    labels[:, :5] = -100
    rows = ScoredRows.from_labels(labels)
    ref = torch.full((4,), -70.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_linear_dpo(hidden, weight, labels, rows=rows, ref_logps=ref).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_twice():
    results = []
    for _ in range(2):
        hidden, weight, targets = problem(torch.bfloat16)
        linear_logps(hidden, weight, targets).logps.sum().backward()
        results.append((hidden.grad, weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_512_tokens_at_a_large_vocabulary():
    hidden, weight, targets = problem(torch.bfloat16, n=512, h=512, v=151936)
    targets.clamp_(min=0)
    with torch.no_grad():
        summed = linear_logps(hidden, weight, targets).logps.double().sum()
        assert abs(float(summed - truth(hidden, weight, targets).sum())) < 5e-3


def test_logits_in_place():
    logits = torch.randn(64, 5003, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(5003, (64,), device="cuda")
    leaf = logits.clone().requires_grad_()
    logits_logps(leaf * 1.0, targets, inplace_backward=True).sum().backward()
    twin = logits.double().requires_grad_()
    twin.log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert error(leaf.grad, twin.grad) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_on_cuda(dtype):
    pytest.importorskip("transformers")
    from sdpo_kernels.integrations.causal_lm import attach_fused_head, check_head
    from sdpo_kernels.integrations.packed_attention import use_packed_attention
    from tests.integrations.tiny_models import tiny_model

    model = attach_fused_head(tiny_model("llama").to("cuda", dtype))
    assert use_packed_attention(model) is None
    assert check_head(model, torch.arange(3, 40, device="cuda")) < 1
