"""Compile Triton's kernels for sm_90 ahead of a run, without a GPU: `python -m benchmarks.compile_triton`.

The backend itself walks through each problem, on tensors without data (torch's FakeTensorMode), while a driver that
launches nothing stands in for CUDA's. So the kernels are compiled for the very shapes, strides and options of the real
run, and land in TRITON_CACHE_DIR under the keys that it will ask for.

A key has the source of the kernel and of Triton itself (Python files and libtriton.so), ptxas's version, the target and
the options, and nothing else of the machine; so a cache made here serves there if both have the same wheel of Triton:
`triton_key` tells. The cache's index holds whole paths, so the folder must have the same path on both machines.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu import SHAPES
from sdpo_kernels.backends import BACKENDS
from sdpo_kernels.backends.base import EXTRAS, HeadCall, HeadForward, Keep, Needs, PairOutputs, Saved
from sdpo_kernels.backends.slices import state_of
from sdpo_kernels.head import Head

ARCHITECTURE = (9, 0)
PAIRS = 4


@dataclass(frozen=True)
class Problem:
    """One way to call the backend."""

    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None
    outputs: tuple[str, ...] = ()
    bias: bool = False
    frozen: bool = False
    stash: bool = True
    grad_tol: float = 0.0


class NoDriver:
    """In place of CUDA's driver: every kernel is compiled, none is loaded or launched."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return (1, 1, 0, 0, 1024)  # module, function, registers, spills, threads


def main(arguments: list[str] | None = None) -> int:
    """Compile what the benchmarks and tests launch; with --jobs in several processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_triton")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part is None and options.jobs > 1:
        command = [sys.executable, "-m", "benchmarks.compile_triton", f"--jobs={options.jobs}"]
        parts = [subprocess.Popen([*command, f"--part={part}"]) for part in range(options.jobs)]
        return max(part.wait() for part in parts)

    with without_a_gpu():
        chosen = list(problems())[options.part or 0 :: options.jobs]
        for problem in chosen:
            walk(problem)
        if not options.part:
            pair_losses()
            for dtype in (torch.bfloat16, torch.float32):
                slice_walk(Problem(266, 64, 5003, dtype))
    return 0


def triton_key() -> str:
    """What a cached kernel's key says of Triton itself."""
    try:
        from triton.runtime.cache import triton_key as key
    except ImportError:  # before 3.6
        from triton.compiler.compiler import triton_key as key
    return str(key())


def problems() -> Iterator[Problem]:
    """The benchmarks' shapes, then the tests'."""
    for rows, hidden, vocab in SHAPES:
        yield from (Problem(rows, hidden, vocab), Problem(rows, hidden, vocab, stash=False))
    rows, hidden, vocab = SHAPES[-1]
    yield Problem(rows, hidden, vocab, softcap=30.0)
    yield Problem(1024, 2048, 151936)
    # of benchmarks/routed.py
    yield Problem(8192, 576, 49152, stash=False, grad_tol=2**-8)
    yield Problem(8192, 640, 262144, stash=False, grad_tol=2**-8)

    # sizes that no power of two divides, as in tests/cuda
    for dtype, softcap, stash in itertools.product((torch.bfloat16, torch.float32), (None, 5.0), (True, False)):
        yield Problem(266, 64, 5003, dtype, softcap, stash=stash)
    for dtype, frozen in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        yield Problem(266, 64, 5003, dtype, frozen=frozen)
        yield Problem(266, 64, 5003, dtype, outputs=EXTRAS)
    for (rows, hidden, vocab), frozen, bias in itertools.product(
        ((1, 8, 70), (103, 65, 257), (240, 96, 4099), (61, 2304, 1000)), (False, True), (False, True)
    ):
        yield Problem(rows, hidden, vocab, frozen=frozen, bias=bias)


@contextmanager
def without_a_gpu() -> Iterator[None]:
    """Inside, the Triton backend takes fake CUDA tensors and only compiles."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", ARCHITECTURE[0] * 10 + ARCHITECTURE[1], 32)
    triton.runtime.driver.set_active(NoDriver(target))
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=ARCHITECTURE),
        mock.patch("torch.cuda.device", return_value=nullcontext()),
        warnings.catch_warnings(),
        FakeTensorMode(),
    ):
        # Triton reads addresses; those of tensors without data are 0, and so aligned like real ones
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def walk(problem: Problem) -> None:
    """Forward and backward of one problem."""
    backend, dtype = BACKENDS["triton"], problem.dtype
    hidden = torch.empty(problem.rows, problem.hidden, dtype=dtype, device="cuda")
    weight = torch.empty(problem.vocab, problem.hidden, dtype=dtype, device="cuda")
    bias = torch.empty(problem.vocab, dtype=dtype, device="cuda") if problem.bias else None
    targets = torch.empty(problem.rows, dtype=torch.int64, device="cuda")
    call = HeadCall(hidden, weight, bias, targets, Head(softcap=problem.softcap), dtype, problem.outputs, problem.rows)

    columns = -(-problem.vocab // 64) * 64 if problem.stash else 0
    keep = Keep.direction() if problem.frozen else Keep.columns(columns, problem.grad_tol)
    # without gradients first: the reference's forward
    backend.forward(call, Keep.nothing())
    found: HeadForward = backend.forward(call, keep)
    saved = Saved(found.logps, found.state, None, found.kept, None, keep, found.tiles)
    needs = Needs(True, not problem.frozen, problem.bias and not problem.frozen)
    backend.backward(call, saved, found.logps, None, needs)


def slice_walk(problem: Problem) -> None:
    """The same of a problem whose head is a slice of the vocabulary."""
    backend, dtype = BACKENDS["triton"], problem.dtype
    hidden = torch.empty(problem.rows, problem.hidden, dtype=dtype, device="cuda")
    weight = torch.empty(problem.vocab, problem.hidden, dtype=dtype, device="cuda")
    targets = torch.empty(problem.rows, dtype=torch.int64, device="cuda")
    head = Head(softcap=problem.softcap)
    call = HeadCall(hidden, weight, None, targets, head, dtype, problem.outputs, problem.rows, is_slice=True)
    keep = Keep.columns(-(-problem.vocab // 64) * 64)
    found = backend.slice_forward(call, backend.target_logits(call), keep)
    logps = torch.empty(problem.rows, device="cuda")
    saved = Saved(logps, state_of(backend, found.k, found.k), None, found.kept, None, keep)
    backend.backward(replace(call, hidden=hidden.float()), saved, logps, None, Needs(True, True, False))


def pair_losses(sizes: Sequence[int] = (2, 3, PAIRS, 70)) -> None:
    """The pair epilogue of every loss, with rows and without."""
    for pairs, loss, indexed in itertools.product(sizes, range(4), (True, False)):
        pair_loss(pairs, loss, indexed, "cuda")


def pair_loss(pairs: int, loss: int, indexed: bool, device: str) -> None:
    """One launch of the pair epilogue."""
    vector = torch.zeros(2 * pairs, device=device)
    index = torch.zeros(100, dtype=torch.int64, device=device) if indexed else None
    counts = torch.ones(2 * pairs, dtype=torch.int64, device=device)
    out = PairOutputs(vector.new_empty(()), vector, vector.new_empty((4, pairs)), vector)
    logps = torch.zeros(100, device=device) if indexed else vector
    BACKENDS["triton"].pair_epilogue(logps, index, index, vector, counts, loss, 0.1, 0.0, out)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_DIR", "/tmp/sdpo-triton")
    raise SystemExit(main())
