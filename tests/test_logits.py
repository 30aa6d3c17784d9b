"""logits_logps: values and gradients against float64, the gradient in place, extremes, errors, compile."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_kernels import logits, logits_logps
from sdpo_kernels.backends import eager_logits
from sdpo_kernels.rows import IGNORE_INDEX
from tests.reference import allocations, error, size, skip_unless_served, target_logps

pytestmark = pytest.mark.usefixtures("each_backend")
EPS = torch.finfo(torch.float32).eps


def batch(shape: tuple[int, ...], n_columns: int, seed: int, masked: float = 0.0, scale: float = 3.0):
    """Logits [*shape, V] in float64, targets [*shape], and a gradient for the log-probs."""
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(*shape, n_columns, generator=generator, dtype=torch.float64)
    targets = torch.randint(n_columns, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < masked] = IGNORE_INDEX
    return z, targets, torch.randn(shape, generator=generator, dtype=torch.float64)


def naive(z: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype, temperature: float):
    """log_softmax's values and gradient of `z`, computed in `dtype`."""
    leaf = z.detach().clone().requires_grad_()
    logps = target_logps(leaf.to(dtype) / temperature, targets)
    logps.backward(grad.to(dtype))
    return logps.detach(), leaf.grad


def ours(z: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor, inplace: bool = False, **options):
    """Values and gradient of logits_logps; the logits are the result of a computation, like a model's."""
    leaf = z.detach().clone().requires_grad_()
    given = leaf * 1
    logps = logits_logps(given, targets, inplace_backward=inplace, **options)
    logps.backward(grad.to(logps.dtype))
    torch.testing.assert_close(given.detach(), leaf.grad if inplace else z, rtol=0, atol=0, equal_nan=True)
    return logps.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_and_gradients(dtype, each_backend):
    skip_unless_served(each_backend, dtype)

    @given(
        st.sampled_from([(), (1,), (7,), (2, 3), (2, 1, 5)]),
        st.integers(1, 120),
        st.integers(0, 2**31),
        st.sampled_from([0.0, 0.4, 1.0]),
        st.sampled_from([1.0, 0.6, 3.0]),
        st.booleans(),
        st.sampled_from([1, 200, 10**6]),
    )
    def holds(shape, n_columns, seed, masked, temperature, inplace, chunk):
        z, targets, grad = batch(shape, n_columns, seed, masked)
        z = z.to(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(eager_logits, "CHUNK_ELEMENTS", max(chunk, n_columns))
            logps, gradient = ours(z, targets, grad, inplace, temperature=temperature)
        truth = naive(z.double(), targets, grad, torch.float64, temperature)
        working = torch.float64 if dtype == torch.float64 else torch.float32
        plain = naive(z, targets, grad, working, temperature)
        slack = 256 if dtype == torch.float64 else 4  # float64 ground truth has roundings of its own
        assert logps.dtype == working
        assert gradient.dtype == dtype
        rounding = torch.finfo(working).eps * max(size(truth[0]), 1.0)
        assert error(logps, truth[0]) <= 3 * error(plain[0], truth[0]) + slack * rounding
        if each_backend == "native":  # its exponentials are relative to the target's logit, as large as −logp rounded
            slack = max(slack, size(truth[0]))
        rounding = torch.finfo(dtype).eps * size(grad) / temperature
        assert error(gradient, truth[1]) <= 3 * error(plain[1], truth[1]) + slack * rounding
        assert not gradient[targets == IGNORE_INDEX].any()

    holds()


@pytest.mark.parametrize("offset", [-1000.0, 1000.0, 30000.0])
def test_logits_far_from_0_cost_no_precision(offset):
    z, targets, grad = batch((20,), 50, 1)
    z = (z + offset).float()  # exact from here on
    truth, plain = naive(z.double(), targets, grad, torch.float64, 1.0), naive(z, targets, grad, torch.float32, 1.0)
    logps, gradient = ours(z, targets, grad)
    assert error(logps, truth[0]) <= 2 * error(plain[0], truth[0])
    assert error(gradient, truth[1]) <= 3 * error(plain[1], truth[1])


def test_near_certainty_nothing_is_lost():
    z = torch.tensor([[40.0, 0.0, 1.0]])
    logps, gradient = ours(z, torch.tensor([0]), torch.ones(1))
    rest = z[0, 1:].double().logsumexp(0) - 40
    assert abs(logps.item() / -rest.exp().item() - 1) < 4 * EPS
    assert abs(gradient[0, 0].item() / rest.exp().item() - 1) < 4 * EPS


@pytest.mark.parametrize("row", [[torch.nan, 0.0, 1.0], [0.0, torch.inf, 1.0], [torch.inf, 0.0, 1.0]], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_nan_where_float64_has_nan_and_only_in_that_row(row, inplace):
    z = torch.tensor([[0.0, 1.0, 2.0], row, [0.0, 1.0, 2.0]])
    logps, gradient = ours(z, torch.tensor([0, 0, 2]), torch.ones(3), inplace)
    assert logps.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_masked_columns_have_probability_0(inplace, temperature, dtype):
    z = torch.randn(3, 600, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[:, 5::3] = -torch.inf
    z[1, 1:] = -torch.inf
    targets = torch.tensor([0, 0, 5])  # among others; alone; masked itself
    logps, gradient = ours(z, targets, torch.ones(3), inplace, temperature=temperature)
    right, wanted = naive(z.double(), targets, torch.ones(3), torch.float64, temperature)
    assert torch.equal(logps[1:], torch.tensor([0.0, -torch.inf]))
    assert abs(logps[0] - right[0]) <= 8 * EPS * abs(right[0])
    rounding = torch.finfo(dtype).eps
    assert error(gradient[:2], wanted[:2]) <= rounding / temperature
    assert not gradient[:, 5::3][:2].any()


def test_nan_in_a_row_whose_target_is_masked():
    z = torch.zeros(1, 600)
    z[0, 0], z[0, 300], z[0, 301:] = -torch.inf, torch.nan, -torch.inf
    assert logits_logps(z, torch.tensor([0])).isnan().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_not_scored_get_0_even_from_nan(inplace):
    z = torch.full((2, 3), torch.nan)
    z[1] = 0.0
    logps, gradient = ours(z, torch.tensor([-100, 1]), torch.ones(2), inplace)
    assert logps[0] == 0.0
    assert not gradient[0].any()


def test_overwriting_a_tensor_that_upstream_needs_is_an_error():
    leaf = torch.zeros(2, 3, requires_grad=True)
    result = leaf.tanh()  # its backward reads its result
    loss = logits_logps(result, torch.tensor([0, 1]), inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_in_place_raises():
    given = torch.zeros(2, 3, requires_grad=True) * 1
    loss = logits_logps(given, torch.tensor([0, 1]), inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_without_a_gradient_leaves_the_logits_alone():
    z = torch.randn(2, 3)
    before = z.clone()
    logits_logps(z, torch.tensor([0, 1]), inplace_backward=True)
    with torch.no_grad():
        logits_logps(z.requires_grad_() * 1, torch.tensor([0, 1]), inplace_backward=True)
    assert torch.equal(z, before)


def test_expanded_and_transposed_logits():
    z, targets, _ = batch((4,), 9, 3)
    z = z.float()
    wide = z[:, :1].expand(4, 9)
    assert error(logits_logps(wide, targets), target_logps(wide.double(), targets)) <= 4 * EPS * math.log(9)
    turned = z.T.contiguous().T
    assert error(logits_logps(turned, targets), target_logps(z.double(), targets)) <= 4 * EPS * size(z)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_float32_copy_of_the_logits(inplace, tmp_path, monkeypatch):
    n_rows, n_columns = 512, 4096
    monkeypatch.setattr(eager_logits, "CHUNK_ELEMENTS", 16 * n_columns)
    z, targets, grad = batch((n_rows,), n_columns, 0)
    given = z.bfloat16().requires_grad_() * 1
    with allocations(tmp_path / "trace.json") as found:
        logits_logps(given, targets, inplace_backward=inplace).backward(grad.float())
    whole = 2 * n_rows * n_columns  # bytes of the bfloat16 logits
    extra = found["peak"] - 2 * whole  # the gradient of `given` and of the leaf under it …
    assert extra < whole / 4 if not inplace else extra + whole < whole / 4  # … in place only the latter


@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck(inplace):
    z, targets, grad = batch((5,), 40, 0, masked=0.3)
    z = z.float()
    if not inplace:  # opcheck runs the backward repeatedly
        torch.library.opcheck(logits._logits_logps, (z.clone().requires_grad_(), targets, 0.7, False))
    logps, lse = logits._logits_logps(z, targets, 0.7, inplace)
    op = logits._gradient_ if inplace else logits._gradient
    torch.library.opcheck(op, (grad.float(), z, targets, logps, lse, 0.7))


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_without_a_graph_break(inplace):
    torch._dynamo.reset()
    z, targets, grad = batch((2, 5), 40, 0, masked=0.3)
    leaf = z.float().requires_grad_()

    def function(leaf):
        return logits_logps(leaf * 2, targets, temperature=0.7, inplace_backward=inplace) * 3

    found = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
    expected = function(leaf)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(out, leaf, grad.float())[0] for out in (found, expected)]
    assert torch.equal(*gradients)


LEAF = torch.zeros(4, 9, requires_grad=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.tensor(1.0)}, r"logits: was torch.float32 of shape \[\], must be floating \[..., V\]"),
        ({"logits": torch.zeros(4, 0)}, r"logits: was torch.float32 of shape \[4, 0\], must be floating"),
        ({"logits": torch.zeros(4, 9, dtype=torch.int64)}, r"logits: was torch.int64 of shape \[4, 9\], must"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: was torch.int64 of shape \[3\], must be .* \[4\]"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, r"targets: was torch.int32 of shape \[4\], must"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, r"targets: was on meta, must be on cpu"),
        ({"targets": torch.tensor([0, 1, 2, 9])}, r"targets: was 9, must be in \[0, 9\) or -100"),
        ({"targets": torch.tensor([0, 1, 2, -1])}, r"targets: was -1, must be in \[0, 9\) or -100"),
        ({"temperature": 0.0}, r"temperature: was 0.0, must be a finite number above 0"),
        ({"logits": LEAF, "inplace_backward": True}, r"logits: was a leaf, must be a contiguous result"),
        ({"logits": (LEAF * 1).T.T[:, ::2], "inplace_backward": True}, r"logits: was not contiguous, must be"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_argument_its_value_and_what_it_should_be(changes, message):
    inputs = {"logits": torch.zeros(4, 9), "targets": torch.zeros(4, dtype=torch.int64)} | changes
    with pytest.raises(ValueError, match="^" + message):
        logits_logps(inputs.pop("logits"), inputs.pop("targets"), **inputs)
