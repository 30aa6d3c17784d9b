"""All backends and the Hugging Face layer on a CUDA device; `benchmarks/gpu.sh` runs these tests if there is one."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels import ScoredRows, backends, fused_linear_dpo, linear_logps, logits_logps, logps_op
from sdpo_kernels.backends.base import EXTRAS, Keep
from tests.reference import extras_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["eager", "triton", "native"], autouse=True)
def backend(request, monkeypatch):
    """ "auto" uses this backend if it serves the call, else eager."""
    monkeypatch.delenv("SDPO_BACKEND", raising=False)
    monkeypatch.setattr(backends, "AUTO_ORDER", (request.param, "eager"))
    monkeypatch.setattr(backends, "NOT_AUTO", set())
    return request.param


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
    targets[1::5] = -100
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
    rounding = torch.finfo(dtype).eps  # gradients are rounded to the parameter's dtype; and bf16 dlogits once more
    assert error(hidden.grad, twin[0].grad) < max(rounding, 100 * exact)
    assert error(weight.grad, twin[1].grad) < max(rounding, 100 * exact)


@pytest.mark.parametrize("shape", [(1, 8, 70), (129, 65, 257), (300, 96, 4099), (77, 2304, 1000)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_with_and_without_the_copy_engine(shape, frozen, bias):
    """H = 65 is not a multiple of 16 bytes: descriptors do not support it, pointers do."""
    hidden, weight, targets = problem(torch.bfloat16, *shape)
    weight.requires_grad_(not frozen)
    b = torch.randn(shape[2], device="cuda").bfloat16() - 40 if bias else None
    twin = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    out = linear_logps(hidden, weight, targets, bias=b).logps
    z = twin[0] @ twin[1].T + (0 if b is None else b.double())
    expected = z.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1) * (targets >= 0)
    out.sum().backward()
    expected.sum().backward()
    assert error(out, expected) < 2e-6
    assert error(hidden.grad, twin[0].grad) < 2**-7
    if not frozen:
        assert error(weight.grad, twin[1].grad) < 2**-7


@pytest.mark.parametrize("stash_bytes", [0, 10**6, 10**9])
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_out_of_range_are_recomputed(stash_bytes, frozen):
    hidden, weight, targets = problem(torch.float32, 64, 48, 700)
    weight.requires_grad_(not frozen)
    bias = torch.zeros(700, device="cuda")
    bias[7] = -200.0
    targets[:] = 7
    targets[::2] = 9
    twin = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    out = linear_logps(hidden, weight, targets, bias=bias, stash_bytes=stash_bytes).logps
    expected = (twin[0] @ twin[1].T + bias.double()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert out.min() < -150
    out.sum().backward()
    expected.sum().backward()
    assert error(out, expected) < 1e-6
    assert error(hidden.grad, twin[0].grad) < 1e-5


def test_extras():
    hidden, weight, targets = problem(torch.float32)
    out = linear_logps(hidden, weight, targets, outputs=EXTRAS)
    wanted = extras_of(hidden.double() @ weight.double().T, targets)
    for name in EXTRAS[:3]:
        assert error(getattr(out, name), wanted[name]) < 1e-5
    assert torch.equal(out.is_top1, wanted["is_top1"].bool())


def test_a_graph_can_be_captured():
    hidden, weight, targets = problem(torch.bfloat16, 256, 64, 5000)
    rows = ScoredRows.from_labels(targets[None])

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        logps = linear_logps(hidden, weight, targets, rows=rows).logps
        logps.sum().backward()
        return logps

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager = step()
            gradient = weight.grad
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
        written = weight.grad
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)
    assert torch.equal(written, gradient)


@pytest.mark.parametrize("frozen", [False, True])
def test_policy_and_reference_of_one_head(frozen):
    hidden, weight, targets = problem(torch.bfloat16)
    weight.requires_grad_(not frozen)
    ref_hidden = problem(torch.bfloat16, n=333)[0].detach().flip(0)
    both = linear_logps(hidden, weight, targets, ref_hidden=ref_hidden)
    with torch.no_grad():
        alone = linear_logps(ref_hidden, weight, targets).logps
    assert error(both.ref_logps, alone) < 1e-6
    both.logps.sum().backward()
    assert hidden.grad.isfinite().all()


def test_data_parallel_of_one(tmp_path):
    """Gradients through DistributedDataParallel equal the bare module's; buckets are reduced during our backward."""
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hidden, weight, targets = problem(torch.bfloat16)
        body = torch.nn.Linear(64, 64, bias=False, device="cuda", dtype=torch.bfloat16)
        head = torch.nn.Linear(64, weight.shape[0], bias=False, device="cuda", dtype=torch.bfloat16)

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = body, head

            def forward(self, x):
                return linear_logps(self.body(x), self.head.weight, targets).logps

        found = []
        for wrap in (lambda model: model, torch.nn.parallel.DistributedDataParallel):
            model = Model()
            model.zero_grad()
            wrap(model)(hidden).sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        for alone, wrapped in zip(*found, strict=True):
            assert torch.equal(alone, wrapped)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("keep", [Keep.nothing(), Keep.columns(64), Keep.direction()])
def test_opcheck(keep, backend):
    hidden, weight, targets = problem(torch.float32, 20, 16, 100)
    weight.requires_grad_(not keep.is_direction)
    args = (hidden, weight, targets, None, None, 1.0, None, 1.0, "", torch.float32, backend, keep.encode(), None)
    torch.library.opcheck(logps_op.linear_logps_op, args)


def test_a_small_run_for_the_sanitizer():
    """`benchmarks/gpu.sh` runs this one under compute-sanitizer."""
    for frozen in (False, True):
        hidden, weight, targets = problem(torch.bfloat16, 130, 72, 300)
        weight.requires_grad_(not frozen)
        linear_logps(hidden, weight, targets, outputs=() if frozen else ("entropy",)).logps.sum().backward()
        assert hidden.grad.isfinite().all()


def test_no_synchronisation_if_rows_are_given():
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


def test_repeated_calls_give_the_same_bits():
    results = []
    for _ in range(2):
        hidden, weight, targets = problem(torch.bfloat16)
        linear_logps(hidden, weight, targets).logps.sum().backward()
        results.append((hidden.grad, weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_more_than_two_to_the_31_logits():
    """All rows but a few at the end are equal, so their log-probs and gradients must be, too."""
    n, h, v = 36000, 16, 60100
    hidden, weight, _ = problem(torch.bfloat16, 8, h, v)
    many = torch.cat([hidden.detach()[:1].expand(n - 7, h), hidden.detach()[1:]]).requires_grad_()
    targets = torch.full((n,), v - 3, device="cuda")
    logps = linear_logps(many, weight, targets, stash_bytes=2 * n * v).logps
    expected = truth(many[-8:], weight, targets[-8:])
    assert error(logps[-8:], expected) < 2e-6
    assert bool((logps[: n - 7] == logps[0]).all())
    (gradient,) = torch.autograd.grad(logps.sum(), many)
    assert gradient.isfinite().all()
    assert bool((gradient[: n - 7] == gradient[0]).all())


def test_a_reference_on_another_device_is_refused():
    hidden = torch.randn(2, 4, 32, device="cuda")
    weight, labels = torch.randn(50, 32, device="cuda"), torch.ones(2, 4, dtype=torch.int64, device="cuda")
    with pytest.raises(ValueError, match="ref_logps: was on cpu"):
        fused_linear_dpo(hidden, weight, labels, ref_logps=torch.zeros(2))


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
