"""Triton kernels for CUDA.

`kernels.py` and `redo.py` run on the device, `launch.py` launches them, `tiles.py` chooses the tile, `backend.py`
is the walk over the vocabulary; `epilogue.py` is the pair epilogue.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sdpo_kernels.backends import eager_logits
from sdpo_kernels.backends.base import (
    Gradients,
    HeadCall,
    HeadForward,
    Keep,
    Needs,
    PairOutputs,
    Request,
    Saved,
    SliceForward,
)

DTYPES = (torch.float32, torch.bfloat16)


class TritonBackend:
    """float32 and bfloat16 on CUDA with every extra; under TRITON_INTERPRET=1 also on the CPU, for tests."""

    name = "triton"
    device_types: tuple[str, ...] | None = ("cuda",)
    asserts_inputs = True
    state_columns = 2  # the logsumexp, and k: what the stash's exponentials are relative to

    def stash_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """S, the unnormalised probabilities, in the operands' dtype."""
        return dtype

    def uses_grad_tol(self, device: torch.device) -> bool:
        """Yes: its products take the rows that each tile lists."""
        return True

    def supports(self, request: Request) -> str | None:
        """float32 and bfloat16, on CUDA."""
        for dtype in (request.dtype, request.weight_dtype):
            if dtype not in DTYPES:
                return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if request.dtype == torch.bfloat16 and request.device.type == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(request.device)
            if major < 8:
                return f"its bfloat16 tiles need compute capability 8.0 or later, not {major}.{minor}"
        return _unavailable_reason(request.device)

    def forward(self, call: HeadCall, keep: Keep) -> HeadForward:
        """See `base.Backend.forward`."""
        from sdpo_kernels.backends.triton import backend  # imported at first use: triton is slow to import

        with _on(call.hidden.device):
            return backend.forward(call, keep)

    def backward(
        self, call: HeadCall, saved: Saved, grad_logps: Tensor, grad_entropy: Tensor | None, needs: Needs
    ) -> Gradients:
        """See `base.Backend.backward`."""
        from sdpo_kernels.backends.triton import backend, routed

        with _on(call.hidden.device):
            # the entropy's gradient has no bound by probabilities
            if saved.tiles is not None and grad_entropy is None:
                return routed.backward(call, saved, grad_logps, needs)
            return backend.backward(call, saved, grad_logps, grad_entropy, needs)

    def supports_slices(self, request: Request) -> str | None:
        """Whatever it serves."""
        return self.supports(request)

    def target_logits(self, call: HeadCall) -> Tensor:
        """See `base.Backend.target_logits`."""
        from sdpo_kernels.backends.triton import backend

        with _on(call.hidden.device):
            return backend.target_logits(call)

    def slice_forward(self, call: HeadCall, target_logits: Tensor, keep: Keep) -> SliceForward:
        """See `base.Backend.slice_forward`."""
        from sdpo_kernels.backends.triton import backend

        with _on(call.hidden.device):
            return backend.slice_forward(call, target_logits, keep)

    def supports_pairs(self, device: torch.device) -> str | None:
        """On CUDA."""
        return _unavailable_reason(device)

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
        out: PairOutputs,
    ) -> None:
        """See `base.Backend.pair_epilogue`; one launch after the sort of its rows."""
        from sdpo_kernels.backends.triton import epilogue

        with _on(logps.device):
            epilogue.pair_epilogue(logps, index, segment, ref, counts, loss_type, beta, smoothing, out)

    def supports_rows(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Not yet: existing logits are served by eager."""
        return "it has no kernels for existing logits"

    logits_forward = staticmethod(eager_logits.logits_forward)
    logits_backward = staticmethod(eager_logits.logits_backward)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, not on the device of its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _unavailable_reason(device: torch.device) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it runs on CUDA, not on {device.type}"
    if torch.version.hip is not None:
        return "its tiles are for NVIDIA's GPUs, and this torch is built for ROCm"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None
