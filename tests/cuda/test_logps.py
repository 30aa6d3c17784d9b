"""Log-probs and gradients of every backend on a device, against float64."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels import ScoredRows, linear_logps
from sdpo_kernels.backends.base import EXTRAS
from tests.cuda.common import DEVICE, ON_CUDA, doubles, error, needs_cuda, problem, skip_unless_supported, truth
from tests.reference import extras_of

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = [
    {},
    {"softcap": 5.0, "logit_scale": 1.3, "temperature": 0.7},
    {"stash_bytes": 0},
    {"stash_bytes": 10**9},
]
FLOAT32 = torch.finfo(torch.float32).eps
BFLOAT16 = torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, options, backend):
    skip_unless_supported(backend, dtype)
    hidden, weight, targets = problem(dtype)
    twin = doubles(hidden, weight)
    coefficient = torch.randn(targets.shape, device=DEVICE)
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
    b = torch.randn(shape[2], device=DEVICE).bfloat16() - 40 if bias else None
    twin = doubles(hidden, weight)
    out = linear_logps(hidden, weight, targets, bias=b).logps
    z = twin[0] @ twin[1].T + (0 if b is None else b.double())
    expected = z.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1) * (targets >= 0)
    out.sum().backward()
    expected.sum().backward()
    assert error(out, expected) < 2e-6
    assert error(hidden.grad, twin[0].grad) < BFLOAT16
    if not frozen:
        assert error(weight.grad, twin[1].grad) < BFLOAT16


@pytest.mark.parametrize("stash_bytes", [0, 10**6, 10**9])
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_out_of_range_are_recomputed(stash_bytes, frozen):
    hidden, weight, targets = problem(torch.float32, 64, 48, 700)
    weight.requires_grad_(not frozen)
    bias = torch.zeros(700, device=DEVICE)
    bias[7] = -200.0
    targets[:] = 7
    targets[::2] = 9
    twin = doubles(hidden, weight)
    out = linear_logps(hidden, weight, targets, bias=bias, stash_bytes=stash_bytes).logps
    expected = (twin[0] @ twin[1].T + bias.double()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert out.min() < -150
    out.sum().backward()
    expected.sum().backward()
    assert error(out, expected) < 1e-6
    assert error(hidden.grad, twin[0].grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extras(dtype, backend):
    skip_unless_supported(backend, dtype, EXTRAS)
    hidden, weight, targets = problem(dtype)
    out = linear_logps(hidden, weight, targets, outputs=EXTRAS)
    wanted = extras_of(hidden.double() @ weight.double().T, targets)
    for name in EXTRAS[:3]:
        assert error(getattr(out, name), wanted[name]) < 1e-5
    assert torch.equal(out.is_top1, wanted["is_top1"].bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_entropys_gradient(dtype, backend):
    skip_unless_supported(backend, dtype, ("entropy",))
    hidden, weight, targets = problem(dtype, n=70, v=700)
    twin = doubles(hidden, weight)
    out = linear_logps(hidden, weight, targets, outputs=("entropy",))
    (out.logps.sum() + 3 * out.entropy.sum()).backward()

    log_probs = (twin[0] @ twin[1].T).log_softmax(-1)
    scored = targets >= 0
    entropy = -(log_probs.exp() * log_probs).sum(-1) * scored
    (truth(*twin, targets).sum() + 3 * entropy.sum()).backward()
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    assert error(out.entropy, entropy) < 1e-5
    assert error(hidden.grad, twin[0].grad) < rounding
    assert error(weight.grad, twin[1].grad) < rounding


STRIDES = ("rows of a wider matrix", "columns", "one element further")


@pytest.mark.parametrize(
    ("stride", "of"), [(stride, of) for stride in STRIDES for of in ("hidden", "weight")] + [("expanded", "hidden")]
)
def test_strides(stride, of):
    """Views give what their contiguous copies give."""
    hidden, weight, targets = problem(torch.bfloat16, n=150, v=700)
    plain = {"hidden": hidden, "weight": weight}
    n, h = plain[of].shape
    base = torch.randn(n * h + 8 * n, device=DEVICE).bfloat16().div(2).requires_grad_()
    view = {
        "rows of a wider matrix": lambda: base.view(n, h + 8)[:, 4 : h + 4],
        "columns": lambda: base[: n * h].view(h, n).t(),
        "one element further": lambda: base[1 : n * h + 1].view(n, h),
        "expanded": lambda: base[:h].expand(n, h),
    }[stride]()

    found = []
    for operand in (view, view.detach().contiguous().requires_grad_()):
        given = plain | {of: operand}
        out = linear_logps(given["hidden"], given["weight"], targets).logps
        coefficients = torch.linspace(-1, 1, n if of == "hidden" else len(targets), device=DEVICE)
        found.append((out, *torch.autograd.grad((out * coefficients).sum(), [given["hidden"], given["weight"]])))
    for mine, right in zip(*found, strict=True):
        assert error(mine, right) < (2e-6 if mine.dtype == torch.float32 else BFLOAT16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_with_a_float32_weight(dtype):
    """Operands are rounded to bf16; the weight's gradient stays in float32."""
    hidden, _, targets = problem(dtype)
    weight = problem(torch.float32)[1].detach().requires_grad_()
    twin = doubles(hidden.bfloat16(), weight.bfloat16())
    with torch.autocast(DEVICE, torch.bfloat16):
        out = linear_logps(hidden, weight, targets).logps
    out.sum().backward()
    expected = truth(*twin, targets)
    expected.sum().backward()
    assert out.dtype == weight.grad.dtype == torch.float32
    assert hidden.grad.dtype == dtype
    assert error(out, expected) < 2e-6
    assert error(hidden.grad, twin[0].grad) < BFLOAT16
    assert error(weight.grad, twin[1].grad) < BFLOAT16


def of_the_matmuls(value: str) -> None:
    """The setting of torch's newer interface."""
    torch.backends.cuda.matmul.fp32_precision = value


@pytest.mark.parametrize(
    ("change", "to", "back", "read"),
    [
        (of_the_matmuls, "tf32", "none", lambda: torch.backends.cuda.matmul.fp32_precision),
        (torch.set_float32_matmul_precision, "high", "highest", torch.get_float32_matmul_precision),
    ],
    ids=["fp32_precision", "set_float32_matmul_precision"],
)
def test_tf32_of_the_session_does_not_count(change, to, back, read):
    hidden, weight, targets = problem(torch.float32)
    twin = doubles(hidden, weight)
    change(to)
    try:
        out = linear_logps(hidden, weight, targets, stash_bytes=0).logps
        out.sum().backward()
        assert read() == to
    finally:
        change(back)
    expected = truth(*twin, targets)
    expected.sum().backward()
    assert error(out, expected) < 20 * FLOAT32
    assert error(hidden.grad, twin[0].grad) < 100 * FLOAT32
    assert error(weight.grad, twin[1].grad) < 100 * FLOAT32


@pytest.mark.parametrize("stash_bytes", [0, "auto"])
def test_the_weights_gradient_over_several_chunks(stash_bytes):
    """2048 × 151936 logits are more than one chunk of any backend."""
    hidden, weight, targets = problem(torch.bfloat16, *((2048, 64, 151936) if ON_CUDA else (40, 64, 1500)))
    twin = doubles(hidden, weight)
    linear_logps(hidden, weight, targets, stash_bytes=stash_bytes).logps.sum().backward()
    truth(*twin, targets).sum().backward()
    # every part of the vocabulary by itself: one chunk must not hide behind the others
    for mine, right in zip(weight.grad.chunk(16), twin[1].grad.chunk(16), strict=True):
        assert error(mine, right) < BFLOAT16
    assert error(hidden.grad, twin[0].grad) < BFLOAT16


@needs_cuda
def test_no_allocation_of_all_logits():
    """Without a stash nothing of size N×V is allocated, not even in one byte a logit."""
    n, h, v = 16384, 64, 128256
    hidden, weight, targets = problem(torch.bfloat16, n, h, v)
    rows = ScoredRows.from_labels(targets[None])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logps(hidden, weight, targets, rows=rows, stash_bytes=0).logps.sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < n * v


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


def test_a_small_run_for_the_sanitizer(backend):
    """`benchmarks/gpu.sh` runs this one under compute-sanitizer."""
    for frozen in (False, True):
        hidden, weight, targets = problem(torch.bfloat16, 130, 72, 300)
        weight.requires_grad_(not frozen)
        outputs = () if frozen or (backend == "native" and ON_CUDA) else ("entropy",)
        linear_logps(hidden, weight, targets, outputs=outputs).logps.sum().backward()
        assert hidden.grad.isfinite().all()


def test_repeated_calls_give_the_same_bits():
    results = []
    for _ in range(2):
        hidden, weight, targets = problem(torch.bfloat16)
        linear_logps(hidden, weight, targets).logps.sum().backward()
        results.append((hidden.grad, weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@needs_cuda
def test_more_than_two_to_the_31_logits():
    """All rows but a few at the end are equal, so their log-probs and gradients must be, too, but for one rounding."""
    n, h, v = 36000, 16, 60100
    hidden, weight, _ = problem(torch.bfloat16, 8, h, v)
    many = torch.cat([hidden.detach()[:1].expand(n - 7, h), hidden.detach()[1:]]).requires_grad_()
    targets = torch.full((n,), v - 3, device=DEVICE)
    logps = linear_logps(many, weight, targets, stash_bytes=2 * n * v).logps
    expected = truth(many[-8:], weight, targets[-8:])
    assert error(logps[-8:], expected) < 2e-6
    equal = logps[: n - 7]
    assert bool(((equal - equal[0]).abs() <= 2 * FLOAT32 * equal[0].abs()).all())

    # cuBLAS may sum the last rows' products in another order
    (gradient,) = torch.autograd.grad(logps.sum(), many)
    assert gradient.isfinite().all()
    equal = gradient[: n - 7].float()
    assert bool(((equal - equal[0]).abs() <= BFLOAT16 * equal[0].abs()).all())


def test_512_tokens_at_a_large_vocabulary():
    hidden, weight, targets = problem(torch.bfloat16, n=512, h=512 if ON_CUDA else 32, v=151936 if ON_CUDA else 9000)
    targets.clamp_(min=0)
    with torch.no_grad():
        summed = linear_logps(hidden, weight, targets).logps.double().sum()
        assert abs(float(summed - truth(hidden, weight, targets).sum())) < 5e-3
