"""CUDA graphs, torch.compile and opcheck, for every backend; on the CPU torch.compile without code generation."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels import ScoredRows, fused_linear_dpo, linear_logps, logps_op
from sdpo_kernels.backends import redone
from sdpo_kernels.backends.base import Keep
from tests.cuda.common import DEVICE, ON_CUDA, error, needs_cuda, problem


@needs_cuda
@pytest.mark.parametrize("grad_tol", [0.0, 0.05])
def test_a_graph_can_be_captured(grad_tol, backend):
    hidden, weight, targets = problem(torch.bfloat16, 256, 64, 5000)
    rows = ScoredRows.from_labels(targets[None])

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        logps = linear_logps(hidden, weight, targets, rows=rows, backend=backend, grad_tol=grad_tol).logps
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


MODES = [
    pytest.param({} if ON_CUDA else {"backend": "aot_eager"}, id="default"),
    pytest.param({"mode": "reduce-overhead"}, id="reduce-overhead", marks=needs_cuda),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given_rows", [True, False])
def test_compiled_is_as_eager(mode, given_rows, backend):
    """Three calls: with reduce-overhead the first two warm up and record, the third replays."""
    torch._dynamo.reset()
    labels = torch.randint(900, (4, 32), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    labels[:, :5] = -100
    rows = ScoredRows.from_labels(labels) if given_rows else None
    ref = torch.full((4,), -150.0, device=DEVICE)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = fused_linear_dpo(hidden * 2, weight, labels, rows=rows, ref_logps=ref)
        return out.loss * 3

    compiled = torch.compile(loss, fullgraph=True, **mode)
    for number in range(3):
        hidden, weight, _ = problem(torch.bfloat16, n=128, v=900)
        hidden = (hidden.detach() + number / 10).view(4, 32, 64).requires_grad_()
        found = []
        for function in (loss, compiled):
            value = function(hidden, weight)
            gradients = torch.autograd.grad(value, [hidden, weight])
            # a graph writes its next results over these
            found.append([t.detach().clone() for t in (value, *gradients)])
        for mine, right in zip(found[1], found[0], strict=True):
            assert error(mine, right) < (1e-5 if mine.dim() == 0 else torch.finfo(torch.bfloat16).eps)


@needs_cuda
def test_the_first_call_of_a_process_may_be_a_compiled_one(monkeypatch, backend):
    """What outlives a call must not lie in the memory of the graph that warms up."""
    torch._dynamo.reset()
    monkeypatch.setattr(redone, "_counters", {})
    hidden, weight, targets = problem(torch.bfloat16, 64, 64, 500)
    rows = ScoredRows.from_labels(targets[None])

    def logps(hidden: torch.Tensor) -> torch.Tensor:
        return linear_logps(hidden * 2, weight, targets, rows=rows).logps

    compiled = torch.compile(logps, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            found = compiled(hidden).clone()
        assert error(found, logps(hidden)) < 1e-6


@pytest.mark.parametrize("keep", [Keep.nothing(), Keep.columns(64), Keep.direction()])
def test_opcheck(keep, backend):
    hidden, weight, targets = problem(torch.float32, 20, 16, 100)
    weight.requires_grad_(not keep.is_direction)
    settings = (1.0, None, 1.0, "", torch.float32, backend, keep.encode())
    args = (hidden, weight, targets, None, None, *settings, None, None, 0.0, False)
    torch.library.opcheck(logps_op.linear_logps_op, args)
