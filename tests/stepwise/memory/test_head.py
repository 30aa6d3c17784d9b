"""The head's rules are those of logps.py and of the backends."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdpo_kernels import linear_logps, logps_op
from sdpo_kernels.backends import BACKENDS
from sdpo_kernels.integrations.sharded_head import sharded_linear_logps
from sdpo_kernels.stepwise.memory import head
from sdpo_kernels.stepwise.memory.head import HeadCase, HeadMemory
from sdpo_kernels.stepwise.memory.live import LiveBytes

ROOT = Path(__file__).resolve().parents[3]
CASE = HeadCase(
    tokens=40, rows=40, columns=700, width=48, hidden_dtype=torch.float32, weight_dtype=torch.float32,
    compute=torch.float32, trains=True, gathered=False, device="cpu",
)  # fmt: skip


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("columns", [700, 20000])
def test_what_the_forward_keeps_is_what_linear_logps_keeps(trains, columns):
    hidden = torch.randn(40, 48, requires_grad=True)
    weight = torch.randn(columns, 48, requires_grad=trains)
    targets = torch.arange(40)
    with LiveBytes([hidden, weight, targets]) as live:
        out = linear_logps(hidden, weight, targets)
        kept = live.now
        del out
    found = HeadMemory.of(replace(CASE, columns=columns, trains=trains))
    assert found.stash > 0
    assert found.kept - 4 * 40 * 48 == pytest.approx(kept, abs=40 * head.ROW_BYTES)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("columns", [700, 20000])
def test_with_a_tolerance_a_frozen_head_keeps_what_a_trained_one_does(trains, columns):
    hidden = torch.randn(40, 48, requires_grad=True)
    weight = torch.randn(columns, 48, requires_grad=trains)
    targets = torch.arange(40)
    with LiveBytes([hidden, weight, targets]) as live:
        out = linear_logps(hidden, weight, targets, grad_tol=0.01)
        kept = live.now
        del out
    found = HeadMemory.of(replace(CASE, columns=columns, trains=trains, grad_tol=0.01))
    assert found.kept - 4 * 40 * 48 == pytest.approx(kept, abs=40 * head.ROW_BYTES)
    on_cuda = replace(CASE, columns=columns, trains=False, device="cuda", grad_tol=0.01)
    assert HeadMemory.of(on_cuda).stash == HeadMemory.of(replace(on_cuda, trains=True, grad_tol=0.0)).stash


@pytest.mark.parametrize("columns", [700, 20000])
def test_a_lora_on_the_head_has_a_stash_and_a_copy_of_the_head_in_both_passes(columns):
    weight, lora_b = torch.randn(columns, 48), torch.randn(columns, 8, requires_grad=True)
    hidden, targets = torch.randn(40, 56, requires_grad=True), torch.arange(40)
    with LiveBytes([hidden, weight, lora_b, targets]) as live:
        out = linear_logps(hidden, weight, targets, lora_b=lora_b)
        kept = live.now

    # the op itself, whose own tensors a dispatch mode sees only if it is called directly
    index, options = torch.arange(40), (1.0, None, 1.0, "", torch.float32, "native", 0, None)
    with LiveBytes([hidden, weight, lora_b, targets, index]) as inside:
        del out
        logps_op._linear_logps(hidden.detach(), weight, targets, None, index, *options, lora_b.detach(), 0.0, False)
    both = inside.peak

    given = 4 * (40 * 48 + 40 * 56 + 8 * columns)  # x, [x, s·A·x] and B
    slack = 40 * head.ROW_BYTES + 4 * 40 * 56
    found, frozen = (HeadMemory.of(replace(CASE, columns=columns, lora=lora, trains=lora > 0)) for lora in (8, 0))
    assert found.stash > 2 * frozen.stash
    assert found.kept - given == pytest.approx(kept, abs=slack)
    stashed = found.stash // (4 * 40)
    chunk = 4 * 40 * max(0, columns - stashed)
    assert found.forward == pytest.approx(both + chunk, abs=slack)
    assert found.scratch == pytest.approx(both + chunk, abs=slack)


def test_a_head_that_is_cut_keeps_no_stash():
    found = HeadMemory.of(replace(CASE, columns=20000, is_cut=True))
    assert (found.stash, found.kept) == (0, 40 * (4 * 48 + head.ROW_BYTES))
    assert found.backward > 8192 * 48 * 3 * 4 + 4 * 40 * 8192


def test_the_sizes_of_chunks_are_those_of_the_kernels():
    assert inspect.signature(sharded_linear_logps).parameters["chunk_columns"].default == head.CUT_CHUNK
    chunks = (ROOT / "csrc/cpu/chunks.h").read_text()
    assert 1 << int(re.search(r"CHUNK_ELEMENTS = int64_t\(1\) << (\d+)", chunks)[1]) == head.CPU_CHUNK
    source = (ROOT / "sdpo_kernels/backends/triton/backend.py").read_text()
    assert 2 ** int(re.search(r"CHUNK_ELEMENTS = 2\*\*(\d+)", source)[1]) == head.GPU_CHUNK
    assert 4 * 2 ** int(re.search(r"SLAB_ELEMENTS = 2\*\*(\d+)", source)[1]) == head.GPU_SLAB


def test_eager_leaves_nothing_out(monkeypatch):
    """As the last resort of "auto", which it is where there are no compiled kernels."""
    exact = HeadMemory.of(replace(CASE, trains=False))
    monkeypatch.setenv("SDPO_BACKEND", "auto")
    monkeypatch.setattr(type(BACKENDS["native"]), "supports", lambda self, request: "not now")
    as_exact = HeadMemory.of(replace(CASE, trains=False))
    assert HeadMemory.of(replace(CASE, trains=False, grad_tol=0.01)) == as_exact
    assert as_exact.stash == exact.stash  # a direction


@pytest.mark.parametrize("trains", [True, False])
def test_on_a_gpu_float16_is_computed_by_eager_which_leaves_nothing_out(trains):
    half = dict.fromkeys(("hidden_dtype", "weight_dtype", "compute"), torch.float16)
    case = replace(CASE, **half, trains=trains, device="cuda")
    assert HeadMemory.of(replace(case, grad_tol=0.01)) == HeadMemory.of(case)
