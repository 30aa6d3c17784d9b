"""Slices of the vocabulary on a device, and the primitive in a group of one process, over NCCL where there is CUDA."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sdpo_kernels import linear_logps
from sdpo_kernels.vocab_parallel import vocab_parallel_linear_logps
from tests.cuda.common import DEVICE, ON_CUDA, problem, skip_unless_supported
from tests.sliced import Sliced

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("stash_bytes", [0, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_slices_and_the_whole(dtype, stash_bytes, backend):
    """Log-probs to float32's rounding, gradients to their dtype's."""
    skip_unless_supported(backend, dtype)
    found = []
    for function in (Sliced([0, 1024, 4096]), linear_logps):
        hidden, weight, targets = problem(dtype)
        logps = function(hidden, weight, targets, stash_bytes=stash_bytes).logps
        logps.backward(torch.linspace(-1, 1, len(logps), device=DEVICE))
        found.append((logps.detach(), hidden.grad, weight.grad))

    (cut, *gradients), (whole, *expected) = found
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)
    # of float32 the sums of products have other orders, of bfloat16 each is rounded once
    roundings = 2 if dtype == torch.bfloat16 else 16
    for one, other in zip(gradients, expected, strict=True):
        assert float((one - other).float().norm() / other.float().norm()) <= roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_group_of_one_process(sequence_parallel, backend, tmp_path):
    """The collectives with one rank: the bits of `linear_logps` where slices and wholes are summed alike."""
    dist.init_process_group("nccl" if ON_CUDA else "gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        hidden, weight, targets = problem(torch.bfloat16)
        out = vocab_parallel_linear_logps(
            hidden, weight, targets, slice_rows=[len(weight)], sequence_parallel=sequence_parallel
        )
        out.logps.sum().backward()
    finally:
        dist.destroy_process_group()

    own, head, targets = problem(torch.bfloat16)
    whole = linear_logps(own, head, targets)
    whole.logps.sum().backward()
    exact = backend != "eager"  # eager takes the target's logit from the products, slices in float64
    torch.testing.assert_close(out.logps, whole.logps, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
    for one, other in ((weight.grad, head.grad), (hidden.grad, own.grad)):
        torch.testing.assert_close(one, other, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-2)
