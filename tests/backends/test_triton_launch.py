"""What the Triton backend launches, without a GPU: a stand-in for each kernel notes how it was launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from sdpo_kernels import backends
from sdpo_kernels.backends import redone
from sdpo_kernels.backends.base import EXTRAS, HeadCall, Keep, Needs, PairOutputs, Request, Saved
from sdpo_kernels.backends.triton import (
    chosen,
    epilogue,
    gradients,
    kernels,
    launch,
    persistent,
    routed_kernels,
    targets,
)
from sdpo_kernels.backends.triton.tiles import PLAIN
from sdpo_kernels.head import Head

HOPPER = PLAIN[9]
LAUNCHED: list[str] = []
KERNELS = {
    name: module
    for module in (kernels, launch, epilogue, gradients, targets, chosen, routed_kernels)
    for name in vars(module)
    if name.endswith("_kernel")
}


class Noted:
    """Takes a kernel's place."""

    def __init__(self, name: str, launches: dict[str, dict[str, Any]]):
        self.name, self.launches = name, launches

    def __getitem__(self, grid: Any) -> Any:
        def launched(*inputs: Any, **options: Any) -> None:
            self.launches[self.name] = options
            LAUNCHED.append(self.name)

        return launched


@pytest.fixture
def launches(monkeypatch) -> dict[str, dict[str, Any]]:
    """Kernel → the keywords of its last launch."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, Noted(name, found))
    return found


def launch_a_step(frozen: bool = False, grad_tol: float = 0.0) -> tuple[int, int]:
    """Forward and backward of 6 rows and a head of 100 columns, on the CPU; returns the launches of each on a GPU."""
    call = HeadCall(
        hidden=torch.zeros(6, 16), weight=torch.zeros(100, 16), bias=None, targets=torch.zeros(6, dtype=torch.int64),
        head=Head(), dtype=torch.float32, outputs=(), kept_rows=6,
    )  # fmt: skip
    keep, grad = Keep.direction() if frozen else Keep.columns(0 if grad_tol else 128, grad_tol), torch.ones(6)
    backend = backends.BACKENDS["triton"]
    redone.counter(call.hidden)  # is made once
    LAUNCHED.clear()
    with Launches() as forward:
        out = backend.forward(call, keep)
    of_kernels = len(LAUNCHED)

    saved = Saved(torch.zeros(6), torch.zeros(6, 2, dtype=torch.float64), None, out.kept, None, keep, out.tiles)
    with Launches() as backward:
        backend.backward(call, saved, grad, None, Needs(True, not frozen, False))
    assert not backward.waits
    return forward.count + of_kernels, backward.count + len(LAUNCHED) - of_kernels


class Launches(TorchDispatchMode):
    """Counts torch's own operators that would be launched: all but views, empty results and fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waits = 0  # of the host for the device

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += op.name() == "aten::_local_scalar_dense"
        out = op(*args, **(kwargs or {}))
        if op.name().startswith(("aten::empty", "aten::new_empty")):
            return out
        found = out if isinstance(out, (tuple, list)) else [out]
        results = [one for one in found if isinstance(one, torch.Tensor) and one.numel()]
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)}
        fresh = [one for one in results if op._schema.is_mutable or one.untyped_storage().data_ptr() not in given]
        self.count += bool(fresh)
        return out


def test_launches_of_a_small_step(launches):
    """Before the kernels of gradients.py: 6 and 29, frozen 24 and 1."""
    assert launch_a_step() == (5, 8)
    assert launch_a_step(frozen=True) == (9, 1)


def test_launches_of_a_small_step_with_a_tolerance(launches):
    """One chunk; of the 15 in the backward 9 are kernels of ours, the others sort rows, their bits and targets."""
    assert launch_a_step(grad_tol=0.1) == (5, 15)
    kept = ["choose", "counts", "lists", "kept_logits", "unions", "hidden", "weight"]
    assert {f"{name}_kernel" for name in kept} <= set(LAUNCHED)


def by_quack(monkeypatch) -> None:
    """From now on every call is one of the persistent kernel's, with tiles of 48 columns."""
    monkeypatch.setattr(persistent, "serves", lambda *operands: True)
    monkeypatch.setattr(persistent, "logits", lambda *operands: LAUNCHED.append("persistent"))
    for module in (persistent, launch):
        monkeypatch.setattr(module, "PERSISTENT_COLUMNS", 48)


def test_launches_of_a_small_step_with_the_persistent_kernel(launches, monkeypatch):
    """Two more: itself, before the columns that are left over, and the floats that it takes of each row."""
    by_quack(monkeypatch)
    assert launch_a_step() == (7, 8)
    assert [name for name in LAUNCHED if name in ("persistent", "logits_kernel")] == ["persistent", "logits_kernel"]


def pair_outputs(n_pairs: int) -> PairOutputs:
    n = 2 * n_pairs
    return PairOutputs(torch.zeros(()), torch.zeros(n), torch.zeros(4, n_pairs), torch.zeros(n))


def launch_pairs(n_pairs: int) -> None:
    ref, counts = torch.zeros(2 * n_pairs), torch.ones(2 * n_pairs, dtype=torch.int64)
    epilogue.pair_epilogue(ref, None, None, ref, counts, 0, 0.1, 0.0, pair_outputs(n_pairs))


def test_every_kernel_is_launched_as_the_compiled_ones_that_are_inspected(launches, monkeypatch):
    """test_triton_compiles.py compiles with launch.COMPILED; without it Triton 3.9 has no fused multiply-add."""
    launch_a_step()
    launch_a_step(grad_tol=0.1)
    launch_pairs(1)
    by_quack(monkeypatch)
    launch_a_step()
    assert launches.keys() == KERNELS.keys()
    for name, options in launches.items():
        assert options.get("enable_fp_fusion") is True, name
        assert options.get("debug", False) is (name == "target_logits_kernel"), name  # only there device_assert asserts


def test_many_pairs_are_a_loop_not_a_larger_kernel(launches):
    """A block of 4096 pairs compiled for minutes and spilled 31 KB a thread."""
    launch_pairs(4096)
    assert launches["pair_kernel"]["PAIRS"] == epilogue.PAIRS_AT_ONCE <= 64


@pytest.mark.parametrize(
    ("x", "described"),
    [
        (torch.zeros(6, 16), True),
        (torch.zeros(1, 16).expand(6, 16), False),
        (torch.zeros(64).as_strided((6, 16), (8, 1)), False),  # a row begins before the last one ends
        (torch.zeros(6, 18)[:, :16], False),  # rows that begin at no multiple of 16 bytes
    ],
    ids=["rows one after the other", "expanded", "overlapping", "not aligned"],
)
def test_the_copy_engine_takes_separate_and_aligned_rows(x, described):
    other = torch.zeros(100, 16)
    for matrices in ((x, other, other), (other, x, other), (other, other, x)):
        *found, is_described = launch.operands(*matrices, HOPPER)
        assert is_described is described
        assert all((one is matrix) is not described for one, matrix in zip(found, matrices, strict=True))
    *_, out, is_described = launch.operands(x, other, None, HOPPER)
    assert (out, is_described) == (None, described)


def test_rocm_is_refused_with_the_reason(monkeypatch):
    """Its devices are called cuda, too, and a compute capability of 9 there is no Hopper."""
    request = Request(torch.device("cuda"), torch.bfloat16, torch.bfloat16, Head(), EXTRAS)
    triton = backends.BACKENDS["triton"]
    assert triton.supports(request) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reason = "its tiles are for NVIDIA's GPUs, and this torch is built for ROCm"
    assert (triton.supports(request), triton.supports_pairs(request.device)) == (reason, reason)
