"""The native backend: the C++ kernels of csrc/, here on the CPU. Exp-direct, one walk, stash (docs/architecture.md).

Operands are multiplied in bfloat16 where the chip has AVX-512-BF16, in float32 elsewhere; sums and logits are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_kernels.backends import native_library
from sdpo_kernels.backends.base import EXTRAS, KEEP_DIRECTION, KEEP_NOTHING, HeadCall, HeadForward, Request, Saved

DTYPES = (torch.float32, torch.bfloat16)


class NativeBackend:
    """Its library is loaded with the package; one that is there but does not fit is an error where it is wanted."""

    name = "native"
    device_types: tuple[str, ...] | None = ("cpu",)
    state_columns = 2  # the logsumexp, and k: what the stash's exponentials are relative to

    def __init__(self) -> None:
        self.reason: str | None = None  # why the library is not there; None: it is loaded
        self.misfit: str | None = None  # why the library that is there cannot be used
        try:
            self.reason = native_library.load()
        except RuntimeError as error:
            self.misfit = str(error)
        usable = self.reason is None and self.misfit is None
        self.bf16_products = usable and torch.ops.sdpo_native.cpu_chip() == "avx512bf16"

    def stash_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """S, the unnormalised probabilities, as the backward multiplies them."""
        return torch.bfloat16 if dtype == torch.bfloat16 and self.bf16_products else torch.float32

    def supports(self, request: Request) -> str | None:
        """float32 and bfloat16 on the CPU, log-probs alone."""
        if request.device.type != "cpu":
            return f"it runs on the CPU, not on {request.device.type}"
        for dtype in (request.dtype, request.weight_dtype):
            if dtype not in DTYPES:
                return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if request.outputs:
            return f"it gives log-probs alone, none of: {', '.join(EXTRAS)}"
        return self._library()

    def _library(self) -> str | None:
        if self.misfit is not None:
            raise RuntimeError(f"backend: native: {self.misfit}, or set SDPO_BACKEND=eager")
        return self.reason

    def forward(self, call: HeadCall, keep: int) -> HeadForward:
        """See `base.Backend.forward`. The stash is laid out in blocks of 64 columns, each [kept_rows, 64]."""
        n_rows, width = call.hidden.shape
        logps = call.hidden.new_empty(n_rows, dtype=torch.float32)
        state = call.hidden.new_empty((n_rows, 2), dtype=torch.float64)
        new = torch.empty if call.kept_rows == n_rows else torch.zeros
        stash = direction = None
        if keep > KEEP_NOTHING:
            stash = new((call.kept_rows, keep), dtype=self.stash_dtype(call.dtype))
        elif keep == KEEP_DIRECTION:
            direction = new((call.kept_rows, width), dtype=torch.float32)
        torch.ops.sdpo_native.linear_forward(*_inputs(call), logps, state, stash, direction)
        kept = direction if stash is None else stash
        return HeadForward(logps, state, None, None, None, None, kept)

    def backward(
        self,
        call: HeadCall,
        saved: Saved,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `base.Backend.backward`."""
        if saved.keep == KEEP_DIRECTION:
            assert saved.kept is not None
            direction = saved.kept if saved.rows is None else saved.kept.index_select(0, saved.rows)
            return (direction * grad_logps.unsqueeze(1)).to(call.hidden.dtype), None, None
        dx = torch.empty_like(_known(call.hidden), memory_format=torch.contiguous_format) if needs[0] else None
        dw = torch.empty_like(call.weight, memory_format=torch.contiguous_format) if needs[1] else None
        db = call.hidden.new_empty(call.weight.shape[0], dtype=torch.float32) if needs[2] else None
        stash = saved.kept if saved.keep > KEEP_NOTHING else None
        torch.ops.sdpo_native.linear_backward(
            *_inputs(call), saved.logps, saved.state, stash, saved.rows, grad_logps.float().contiguous(), dx, dw, db
        )
        if db is not None and call.bias is not None:
            db = db.to(call.bias.dtype)
        return (None if dx is None else dx.to(call.hidden.dtype)), dw, db

    def supports_pairs(self, device: torch.device) -> str | None:
        """On the CPU."""
        return f"it runs on the CPU, not on {device.type}" if device.type != "cpu" else self._library()

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
        torch.ops.sdpo_native.pair_epilogue(logps, index, segment, ref, counts, loss_type, beta, smoothing, *out)

    def supports_rows(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """float32 and bfloat16 on the CPU."""
        if device.type != "cpu" or dtype not in DTYPES:
            return f"it takes float32 and bfloat16 on the CPU, not {str(dtype).removeprefix('torch.')} on {device.type}"
        return self._library()

    def logits_forward(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See `base.Backend.logits_forward`: one read of the logits."""
        logps = logits.new_empty(logits.shape[0], dtype=torch.float32)
        lse = logits.new_empty(logits.shape[0], dtype=torch.float64)
        torch.ops.sdpo_native.logits_forward(_rows(logits), targets.contiguous(), temperature, logps, lse)
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
        torch.ops.sdpo_native.logits_backward(grad, _rows(logits), targets.contiguous(), logps, lse, temperature, out)


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
