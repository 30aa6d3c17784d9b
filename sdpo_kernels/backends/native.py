"""The native backend: the C++ and CUDA kernels of csrc/. Exp-direct, one walk, stash (docs/architecture.md).

On the CPU operands are multiplied in bfloat16 where the chip has AVX-512-BF16, in float32 elsewhere; on CUDA by cuBLAS.
Sums and logits are float32 everywhere.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.backends import native_library, precision
from sdpo_kernels.backends.base import EXTRAS, KEEP_DIRECTION, KEEP_NOTHING, HeadCall, HeadForward, Request, Saved
from sdpo_kernels.backends.chunk_math import entropy_of, log_sum_sq_of
from sdpo_kernels.backends.eager import EagerBackend

DTYPES = (torch.float32, torch.bfloat16)
_ROW_EXTRAS = ("top", "sum", "sum_z", "sum_sq", "all", "target_z")  # of csrc/cpu/extras.h: e = exp(z − top)
_EAGER = EagerBackend()


@torch.compiler.assume_constant_result
@functools.cache
def _cuda_reason(device: int) -> str | None:
    """Loads CUDA's library when a CUDA tensor comes first; None, or why it cannot serve `device`."""
    try:
        reason = native_library.load_cuda()
    except RuntimeError as error:
        raise RuntimeError(f"backend: native: {error}, or set SDPO_BACKEND=eager") from error
    if reason is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it is built for compute capability 8.0 and later"
    return reason or torch.ops.sdpo_native.cuda_refuses(device) or None


class NativeBackend:
    """The CPU's library is loaded with the package, CUDA's when a CUDA tensor comes.

    A library that is there but does not fit is an error where it is wanted.
    """

    name = "native"
    device_types: tuple[str, ...] | None = ("cpu", "cuda")
    state_columns = 2  # the logsumexp, and k: what the stash's exponentials are relative to

    def __init__(self) -> None:
        self.reason: str | None = None  # why the CPU's library is not there; None: it is loaded
        self.misfit: str | None = None  # why the one that is there cannot be used
        try:
            self.reason = native_library.load()
        except RuntimeError as error:
            self.misfit = str(error)
        usable = self.reason is None and self.misfit is None
        self.bf16_products = usable and torch.ops.sdpo_native.cpu_chip() == "avx512bf16"

    @property
    def operators(self) -> Any:
        """The libraries' operators; torch's dispatcher knows which device's."""
        return torch.ops.sdpo_native

    def on_cuda(self, tensor: Tensor) -> bool:
        """Whether CUDA's kernels serve `tensor`: their stash lies by rows, not by blocks of columns."""
        return tensor.is_cuda

    def stash_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """S, the unnormalised probabilities, as the backward multiplies them."""
        bf16 = dtype == torch.bfloat16 and (device.type == "cuda" or self.bf16_products)
        return torch.bfloat16 if bf16 else torch.float32

    def supports(self, request: Request) -> str | None:
        """float32 and bfloat16; on CUDA log-probs alone."""
        for dtype in (request.dtype, request.weight_dtype):
            if dtype not in DTYPES:
                return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if request.outputs and request.device.type != "cpu":
            return f"on {request.device.type} it gives log-probs alone, none of: {', '.join(EXTRAS)}"
        return self._library(request.device)

    def _library(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"it runs on the CPU and on CUDA, not on {device.type}"
        if self.misfit is not None:
            raise RuntimeError(f"backend: native: {self.misfit}, or set SDPO_BACKEND=eager")
        if self.reason is not None or device.type == "cpu":
            return self.reason
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        return _cuda_reason(torch.cuda.current_device() if device.index is None else device.index)

    def forward(self, call: HeadCall, keep: int) -> HeadForward:
        """See `base.Backend.forward`.

        The stash lies in blocks of 64 columns, each [kept_rows, 64], on the CPU, and by rows on CUDA.
        """
        n_rows, width = call.hidden.shape
        logps = call.hidden.new_empty(n_rows, dtype=torch.float32)
        state = call.hidden.new_empty((n_rows, 2), dtype=torch.float64)
        new = call.hidden.new_empty if call.kept_rows == n_rows else call.hidden.new_zeros
        stash = direction = None
        if keep > KEEP_NOTHING:
            stash = new((call.kept_rows, keep), dtype=self.stash_dtype(call.dtype, call.hidden.device))
        elif keep == KEEP_DIRECTION:
            direction = new((call.kept_rows, width), dtype=torch.float32)
        kept = direction if stash is None else stash
        if call.outputs:
            sums = call.hidden.new_empty((n_rows, len(_ROW_EXTRAS)), dtype=torch.float64)
            self.operators.linear_forward_extras(*_inputs(call), logps, state, stash, direction, sums)
            return HeadForward(logps, state, **_extras(call, logps, sums), kept=kept)
        with self._full_precision(call.hidden):
            self.operators.linear_forward(*_inputs(call), logps, state, stash, direction)
        return HeadForward(logps, state, None, None, None, None, kept)

    def backward(
        self,
        call: HeadCall,
        saved: Saved,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `base.Backend.backward`. With a gradient of the entropy it is the eager backend's."""
        if grad_entropy is not None:
            anew = Saved(saved.logps, saved.state[:, :1], saved.entropy, None, None, KEEP_NOTHING)
            return _EAGER.backward(call, anew, grad_logps, grad_entropy, needs)
        if saved.keep == KEEP_DIRECTION:
            assert saved.kept is not None
            direction = saved.kept if saved.rows is None else saved.kept.index_select(0, saved.rows)
            return (direction * grad_logps.unsqueeze(1)).to(call.hidden.dtype), None, None
        hidden = _known(call.hidden)
        dx = hidden.new_empty(hidden.shape) if needs[0] else None
        dw = call.weight.new_empty(call.weight.shape) if needs[1] else None
        db = call.hidden.new_empty(call.weight.shape[0], dtype=torch.float32) if needs[2] else None
        stash, rows = (saved.kept if saved.keep > KEEP_NOTHING else None), saved.rows
        if self.on_cuda(call.hidden):
            stash, rows = (stash if stash is None or rows is None else stash.index_select(0, rows)), None
        with self._full_precision(call.hidden):
            self.operators.linear_backward(
                *_inputs(call), saved.logps, saved.state, stash, rows, grad_logps.float().contiguous(), dx, dw, db
            )
        if db is not None and call.bias is not None:
            db = db.to(call.bias.dtype)
        return (None if dx is None else dx.to(call.hidden.dtype)), dw, db

    def _full_precision(self, tensor: Tensor) -> AbstractContextManager[object]:
        """On CUDA the products are torch's, whose settings may allow less."""
        return precision.full(tensor.device) if self.on_cuda(tensor) else nullcontext()

    def supports_pairs(self, device: torch.device) -> str | None:
        """On the CPU and on CUDA."""
        return self._library(device)

    def pair_epilogue(
        self,
        logps: Tensor,
        index: Tensor | None,
        segment: Tensor | None,
        ref: Tensor,
        counts: Tensor,
        loss_type: int,
        beta: float,
        smoothing: float,
        out: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> None:
        """See `base.Backend.pair_epilogue`."""
        self.operators.pair_epilogue(logps, index, segment, ref, counts, loss_type, beta, smoothing, *out)

    def supports_rows(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """float32 and bfloat16."""
        if dtype not in DTYPES:
            return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        return self._library(device)

    def logits_forward(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See `base.Backend.logits_forward`: one read of the logits."""
        logps = logits.new_empty(logits.shape[0], dtype=torch.float32)
        lse = logits.new_empty(logits.shape[0], dtype=torch.float64)
        self.operators.logits_forward(_rows(logits), targets.contiguous(), temperature, logps, lse)
        return logps, lse

    def logits_backward(
        self,
        grad: Tensor,
        logits: Tensor,
        targets: Tensor,
        logps: Tensor,
        lse: Tensor,
        temperature: float,
        out: Tensor,
    ) -> None:
        """See `base.Backend.logits_backward`: one read and one write."""
        grad = grad.float().contiguous()
        self.operators.logits_backward(grad, _rows(logits), targets.contiguous(), logps, lse, temperature, out)


def _extras(call: HeadCall, logps: Tensor, sums: Tensor) -> dict[str, Tensor | None]:
    """The extras asked for, from what the kernel has summed over the columns without the target."""
    row = dict(zip(_ROW_EXTRAS, sums.unbind(1), strict=True))
    exact = logps.double()
    there = row["sum"] > 0  # else the target is the only column, or NaN
    mean_log_prob = torch.where(there, row["sum_z"] / row["sum"] - row["sum"].log(), 0 * row["sum"])
    sum_sq_probs = torch.where(there, row["sum_sq"] / row["sum"].square(), 0 * row["sum"])
    answers = {
        "entropy": entropy_of(exact, mean_log_prob).float(),
        "log_sum_sq_probs": log_sum_sq_of(exact, sum_sq_probs).float(),
        "mean_logits": (row["all"] / call.weight.shape[0]).float(),
        "is_top1": (row["target_z"] >= row["top"]) & ~row["sum"].isnan(),
    }
    return {name: answers[name] if name in call.outputs else None for name in EXTRAS}


def _inputs(call: HeadCall) -> tuple[object, ...]:
    """The leading arguments of both operators."""
    bias = None if call.bias is None else call.bias.detach().to(torch.float32).contiguous()
    head = call.head
    return (
        _rows(_known(call.hidden)), _rows(call.weight), bias, call.targets.contiguous(), head.logit_scale,
        head.softcap or 0.0, head.temperature, call.dtype == torch.bfloat16,
    )  # fmt: skip


def _known(hidden: Tensor) -> Tensor:
    """`hidden`, or, of another dtype under autocast, its numbers in float32: the kernels round them."""
    return hidden if hidden.dtype in DTYPES else hidden.float()


def _rows(matrix: Tensor) -> Tensor:
    """`matrix` itself, or a copy whose rows lie in one piece each."""
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()
