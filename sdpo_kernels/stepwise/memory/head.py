"""What the fused head takes: rows, stash, chunk. The rules are those of `logps.py` and of the backends.

The stash is what the forward keeps so that the backward need not recompute logits; chunks of the vocabulary are scratch
memory while the head works. A frozen head keeps one vector [H] a scored row instead, unless its backward leaves tiles
out (`grad_tol`). A LoRA on it (`lora_b`) trains, so it has a stash, and each of its passes makes one weight of both,
[W, B].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdpo_kernels.backends import choose_backend, takes_grad_tol, triton
from sdpo_kernels.backends.base import STASH_MULTIPLE, Backend, Request
from sdpo_kernels.head import Head
from sdpo_kernels.logps import HOST_MEMORY, automatic_stash_bytes

GPU_CHUNK = 2**28  # elements of a chunk: CHUNK_ELEMENTS of backends/triton/backend.py
GPU_SLAB = 4 * 2**23  # bytes of dW before it is rounded: SLAB_ELEMENTS there
CPU_CHUNK = 2**22  # CHUNK_ELEMENTS of csrc/cpu/chunks.h
CUT_CHUNK = 8192  # rows of W that sharded_linear_logps sends at a time
ROW_BYTES = 64  # of a scored row's log-prob, state and metrics


@dataclass(frozen=True)
class HeadCase:
    """One call of the head."""

    tokens: int  # hidden states that enter it
    rows: int  # scored
    columns: int  # V
    width: int  # H
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    compute: torch.dtype  # what the products' operands are rounded to
    trains: bool  # the weight, or a LoRA on it
    gathered: bool  # with shared prompts the scored hidden states are copied out first
    device: str  # "cuda" or "cpu"
    memory: int | None = None  # of the device; None: this machine's
    is_cut: bool = False  # spread over the GPUs, as under FSDP2
    lora: int = 0  # r of a LoRA on the head, whose weight is frozen then
    grad_tol: float = 0.0

    @property
    def leaves_out(self) -> bool:
        """Whether its backward leaves tiles out."""
        if self.grad_tol == 0 or self.is_cut:
            return False
        if self.device != "cpu":
            return {self.compute, self.weight_dtype} <= set(triton.DTYPES)
        return takes_grad_tol("auto", _backend(self), torch.device("cpu"))

    @property
    def walks_back(self) -> bool:
        """Whether its backward goes over the vocabulary again."""
        return self.trains or self.leaves_out


@dataclass(frozen=True)
class HeadMemory:
    """In bytes."""

    kept: int  # from its forward to its backward
    stash: int  # of that, the stash, or the direction of a frozen head
    forward: int  # scratch in the forward
    backward: int  # scratch and the hidden states' gradient; without the weight's gradient
    scratch: int  # of that, what the kernels allocate for themselves

    @classmethod
    def of(cls, case: HeadCase) -> HeadMemory:
        """The head's memory."""
        item, rows, width = case.hidden_dtype.itemsize, case.rows, case.width + case.lora
        entering = rows if case.gathered else case.tokens
        hidden = entering * case.width * item
        if case.lora:  # [x, s·A·x], and B in the weight's dtype
            hidden += entering * width * item + case.columns * case.lora * case.weight_dtype.itemsize
        own = rows * width * item if rows < entering else 0  # the scored rows alone
        stash = 0 if case.is_cut else _stash(case)
        chunk = _cut_chunk(case) if case.is_cut else _chunk(case, stash)

        # dX of the scored rows, in float32 while it is summed, then of all hidden states
        sums = rows * width * (4 + (item if item < 4 else 0))
        if case.device != "cpu" and not case.is_cut:
            sums += rows * width * (4 * case.leaves_out + case.compute.itemsize * case.trains)  # a second sum; r ⊙ X
        both = case.columns * width * case.weight_dtype.itemsize if case.lora else 0
        # sums of tiles in the forward, a bit for each until the backward, where the kept ones are listed
        tiles = rows * -(-case.columns // STASH_MULTIPLE) if case.leaves_out else 0
        scratch = own + sums + both + 4 * tiles + (chunk if case.walks_back or case.is_cut else 0)
        spread = case.tokens * width * item
        kept = hidden + stash + ROW_BYTES * rows + tiles // 8
        return cls(kept, stash, own + chunk + both + 4 * tiles, scratch + spread, scratch)


def _stash(case: HeadCase) -> int:
    if not case.walks_back:
        return 4 * case.rows * (case.width + case.lora)
    item = _stash_item(case)
    budget = automatic_stash_bytes(case.rows, case.columns, case.width, case.memory or HOST_MEMORY)
    everything = -(-case.columns // STASH_MULTIPLE) * STASH_MULTIPLE
    columns = min(budget // max(1, case.rows * item) // STASH_MULTIPLE * STASH_MULTIPLE, everything)
    return case.rows * columns * item


def _stash_item(case: HeadCase) -> int:
    """Bytes of one number of the stash."""
    if case.device != "cpu":
        return 2 if case.compute.itemsize == 2 else 4
    return _backend(case).stash_dtype(case.compute, torch.device("cpu")).itemsize


def _backend(case: HeadCase) -> Backend:
    """The backend of a call on the CPU."""
    return choose_backend("auto", Request(torch.device("cpu"), case.compute, case.weight_dtype, Head(), ()))


def _chunk(case: HeadCase, stash: int) -> int:
    """Scratch memory of a chunk: its part of S unless that is stashed, rows of W in another dtype, a slab of dW."""
    item = _stash_item(case)
    stashed = stash // max(1, case.rows * item) if case.walks_back else 0
    left = max(0, case.columns - stashed)
    if case.device == "cpu":
        return min(CPU_CHUNK, case.rows * left) * item

    width = case.width + case.lora
    columns = min(case.columns, max(STASH_MULTIPLE, GPU_CHUNK // max(case.rows, width)))
    cast = columns * width * item if case.weight_dtype != case.compute else 0
    slab = min(GPU_SLAB, 4 * case.columns * (case.lora or width)) if case.trains and not case.leaves_out else 0
    return case.rows * min(columns, left) * item + cast + slab


def _cut_chunk(case: HeadCase) -> int:
    """Two chunks' rows of W, one of them on its way; with dW that and the rows in float32; S of a chunk."""
    columns, item = min(CUT_CHUNK, case.columns), case.compute.itemsize
    exact = 4 + (4 if item < 4 else 0) if case.trains else 0
    return columns * case.width * (2 * item + exact) + case.rows * columns * _stash_item(case)
