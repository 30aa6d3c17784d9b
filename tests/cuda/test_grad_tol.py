"""`grad_tol` on the device: gradients of the tiles that are kept, by float64, and the bits of a repeated run."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels import linear_logps
from sdpo_kernels.backends import BACKENDS
from sdpo_kernels.backends.base import HeadCall, Keep
from sdpo_kernels.backends.grad_tol import TILE, unpacked
from sdpo_kernels.head import Head
from tests.cuda.common import DEVICE, error, problem, served

TOLERANCE = 0.05


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("stash_bytes", [0, 10**12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_tiles_that_are_kept(dtype, stash_bytes, relative, backend):
    if not BACKENDS[backend].uses_grad_tol(torch.device(DEVICE)):
        served.append("skipped")
        pytest.skip(f"{backend} leaves nothing out")
    hidden, weight, targets = problem(dtype)
    n_columns = len(weight)
    with torch.no_grad():
        weight *= 2

    def gradients(tolerance: float) -> tuple[torch.Tensor, ...]:
        options = {"grad_tol": tolerance, "grad_tol_relative": relative, "stash_bytes": stash_bytes}
        out = linear_logps(hidden, weight, targets, backend=backend, **options)
        return torch.autograd.grad(out.logps.sum(), [hidden, weight])

    scored = (targets >= 0).nonzero().squeeze(1)
    call = HeadCall(hidden[scored].detach(), weight.detach(), None, targets[scored], Head(), dtype, (), len(scored))
    words = BACKENDS[backend].forward(call, Keep.columns(0, TOLERANCE, relative)).tiles
    kept = unpacked(words, -(-n_columns // TILE))
    assert 0.02 < kept.double().mean() < 0.9

    # dL/dz in float64, without the tiles that are left out
    x, w = hidden.detach().double(), weight.detach().double()
    dz = -(x @ w.T).softmax(1)
    dz[scored, targets[scored]] += 1
    dz[scored] *= kept.repeat_interleave(TILE, 1)[:, :n_columns]
    dz[targets < 0] = 0
    found, again = gradients(TOLERANCE), gradients(TOLERANCE)
    for mine, second, exact, right in zip(found, again, gradients(0.0), (dz @ w, dz.T @ x), strict=True):
        assert torch.equal(mine, second)
        assert error(mine, right) <= (1e-5 if dtype == torch.float32 else 5e-3)
        assert not torch.equal(mine, exact)
