"""Gradients as near to those of exact logits as their dtypes allow, in every backend; see tests/exact.py.

Those of the Triton backend are in triton_interpreted.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from sdpo_kernels import backends, fused_linear_dpo
from sdpo_kernels.backends import eager
from tests.backends.emulated import emulated_backend
from tests.exact import (
    HEADS,
    HIDDEN,
    OTHERS,
    OTHERS_OF_TWO,
    ROWS,
    check_exact,
    coefficients,
    exact_case,
    exact_cases,
    multiples,
    rounded,
)
from tests.reference import chunk_columns, random_case, target_logps

pytestmark = pytest.mark.xdist_group("emulator")
NATIVE = backends.BACKENDS["native"]
STASHES = [0, 2 * ROWS * 512, 10**12]  # none, the first 512 columns, all


@pytest.fixture(scope="module", params=["eager", "native", "emulated"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of the CPU, and the CUDA kernels in the emulator."""
    if request.param == "native" and NATIVE.unavailable_reason is not None:
        pytest.skip(NATIVE.unavailable_reason)
    if request.param == "emulated" and shutil.which("g++") is None:
        pytest.skip("needs g++")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "emulated":
            patch.setitem(backends.BACKENDS, "emulated", emulated_backend())
        yield request.param


@pytest.mark.parametrize("stash_bytes", STASHES)
def test_bfloat16(backend, stash_bytes):
    check_exact(exact_cases(backend=backend, stash_bytes=stash_bytes), stashed=stash_bytes > 0)


@pytest.mark.parametrize("stash_bytes", STASHES)
def test_the_same_coefficient_in_every_row(backend, stash_bytes):
    """The gradient of a sum of log-probs: the target's coefficient is near 1, so its row of dW is nearly x itself."""

    def cases():
        for case in exact_cases(backend=backend, stash_bytes=stash_bytes):
            case.grad = None
            yield case

    check_exact(cases(), stashed=stash_bytes > 0)


@pytest.mark.parametrize("stash_bytes", STASHES)
def test_a_float32_head_under_autocast(backend, stash_bytes):
    """Its gradient is not rounded at all: what is left is the rounding of S, and of r ⊙ X if there is a stash."""
    if backend == "eager":
        pytest.skip("on the CPU it rounds nothing but the operands")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_exact(exact_cases(backend=backend, stash_bytes=stash_bytes, dtype=torch.float32), stashed=stash_bytes > 0)


@pytest.mark.parametrize("head", HEADS)
def test_float16_in_eager(head):
    check_exact([exact_case(head, torch.float16, backend="eager")], stashed=False, operands=torch.float16)


@pytest.mark.parametrize("stash_bytes", STASHES)
def test_a_frozen_head(backend, stash_bytes):
    """d logp / d hidden of the forward never rounds S's target, as S is not kept."""
    for case in exact_cases(backend=backend, stash_bytes=stash_bytes):
        case.trains = ("hidden",)
        assert multiples(case, case.ours(), torch.bfloat16, rounded).hidden <= HIDDEN


@pytest.mark.parametrize("stash_bytes", STASHES)
def test_token_weights(backend, stash_bytes):
    """ld_dpo: each row has a coefficient of its own, and those beyond the shorter sequence of a pair a smaller one."""
    case, beta, alpha = exact_case("ignored"), 0.1, 0.3
    labels, leaves = case.targets.view(4, -1), [t.clone().requires_grad_() for t in (case.hidden, case.weight)]
    hidden = leaves[0].view(4, -1, leaves[0].shape[1])
    out = fused_linear_dpo(
        hidden, leaves[1], labels, ref_logps=torch.zeros(4), beta=beta, loss_type="ld_dpo", ld_alpha=alpha,
        backend=backend, stash_bytes=stash_bytes,
    )  # fmt: skip
    out.loss.backward()

    # the slope of the loss by each token's log-prob: −β·σ(−z)·weight / 2 pairs, with the other sign for rejected ones
    scored = labels >= 0
    shorter = torch.minimum(*scored.sum(1).chunk(2)).repeat(2).unsqueeze(1)
    weights = torch.where(scored.cumsum(1) <= shorter, 1.0, alpha).double() * scored
    logps = target_logps(case.hidden.double() @ case.weight.double().T, case.targets).view(4, -1)
    chosen, rejected = (weights * logps).sum(1).chunk(2)
    slopes = (-beta * torch.sigmoid(-beta * (chosen - rejected)) / 2).repeat(2) * torch.tensor([1.0, 1.0, -1.0, -1.0])
    case.grad = (slopes.unsqueeze(1) * weights).flatten()

    found = {"d_hidden": leaves[0].grad, "d_weight": leaves[1].grad}
    errors = multiples(case, found, torch.bfloat16, rounded)
    assert max(errors.hidden, errors.targets) <= HIDDEN, errors
    assert errors.others <= (OTHERS_OF_TWO if stash_bytes else OTHERS), errors


def test_every_chunk_adds_its_own_targets():
    """So many rows that the CPU's chunks have four blocks, with each target hundreds of times."""
    case = random_case(17000, 8, 700, dtype=torch.bfloat16, trains=("hidden", "weight"))
    case.settings = {"backend": "native", "stash_bytes": 0}
    check_exact([case], stashed=False)


def test_a_weight_so_wide_that_its_gradient_takes_several_slabs(backend):
    case = random_case(3, 40000, 600, dtype=torch.bfloat16, trains=("hidden", "weight"))
    case.targets[:] = torch.tensor([0, 300, 599])
    case.settings = {"backend": backend, "stash_bytes": 0}
    check_exact([case], stashed=False)


@pytest.mark.parametrize("stash_bytes", STASHES)
def test_rows_out_of_range(backend, stash_bytes):
    """Log-probs of −100 and less: S is stored with another k."""
    case = exact_case("plain", backend=backend, stash_bytes=stash_bytes)
    case.bias = torch.zeros(len(case.weight), dtype=torch.bfloat16)
    case.bias[7] = -120.0
    check_exact([case], stashed=stash_bytes > 0)


@pytest.mark.parametrize("stash_bytes", STASHES)
def test_the_biass_gradient(backend, stash_bytes):
    """Summed in float64 from S; the target's coefficient, near 1, would otherwise cost 2**-9 of itself."""
    case = exact_case("bias", backend=backend, stash_bytes=stash_bytes)
    case.bias, case.trains = case.bias.float(), ("hidden", "weight", "bias")
    found, exact = case.ours()["d_bias"].double(), coefficients(case, torch.bfloat16)
    is_target = torch.zeros(len(found), dtype=torch.bool).index_fill_(0, case.targets, True)
    assert (found - exact.sum(0))[is_target].norm() <= 2**-12 * exact.sum(0)[is_target].norm()


@pytest.mark.parametrize("columns", [300, 5000])
def test_eager_on_cuda(monkeypatch, columns):
    """There, its products take bfloat16 operands and sum them in float32; here that path runs on the CPU."""
    monkeypatch.setattr(eager, "_operand", lambda tensor, call: tensor.to(call.dtype))
    with chunk_columns(columns):
        check_exact(exact_cases(backend="eager"), stashed=False)
