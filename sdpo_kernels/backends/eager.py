"""The eager backend: plain torch on any device and dtype, one walk over the vocabulary in chunks with all rows in each.

Logits are float32 whatever the operands' dtype (float64 for float64); what is done with them is in `chunk_math.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.backends import eager_logits, precision
from sdpo_kernels.backends.base import KEEP_DIRECTION, KEEP_NOTHING, HeadCall, HeadForward, Request, Saved
from sdpo_kernels.backends.chunk_math import RunningSums, dlogits
from sdpo_kernels.head import product_dtype

CHUNK_ELEMENTS = 2**23  # logits plus weights of one chunk: 32 MiB in float32
CUDA_CHUNK = 8  # times as much on a CUDA device, whose products want to be large
MIN_CHUNK_COLUMNS = 128


class EagerBackend:
    """Plain torch; the twin that faster backends are compared with."""

    name = "eager"
    device_types: tuple[str, ...] | None = None
    state_columns = 1  # logsumexp over all columns: as float32, one of 20 would cost gradients 1e-6

    def stash_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The stash holds logits as the products are summed."""
        return product_dtype(dtype)

    def supports(self, request: Request) -> str | None:
        """Every device and floating dtype that linear_logps accepts."""
        return None

    def supports_pairs(self, device: torch.device) -> str | None:
        """No: autograd through losses.py is its pair epilogue."""
        return "it takes pair losses through autograd"

    def pair_epilogue(self, *_: Any) -> None:
        """Not there, see `supports_pairs`."""
        raise NotImplementedError

    def supports_rows(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Every device and floating dtype that logits_logps accepts."""
        return None

    logits_forward = staticmethod(eager_logits.logits_forward)
    logits_backward = staticmethod(eager_logits.logits_backward)

    def forward(self, call: HeadCall, keep: int) -> HeadForward:
        """See `base.Backend.forward`."""
        with precision.full(call.hidden.device):
            return self._forward(call, keep)

    def _forward(self, call: HeadCall, keep: int) -> HeadForward:
        x = _operand(call.hidden, call)
        sums = RunningSums(x.shape[0], x.device, product_dtype(call.dtype), call.outputs)
        width = call.weight.shape[1] if keep == KEEP_DIRECTION else keep
        kept = x.new_empty((call.kept_rows, width), dtype=product_dtype(call.dtype))
        kept[x.shape[0] :].zero_()
        kept[:, call.weight.shape[0] :].zero_()
        direction = kept[: x.shape[0]].zero_() if keep == KEEP_DIRECTION else None
        stash = kept[: x.shape[0], : max(keep, 0)]
        for start, stop in vocabulary_chunks(call):  # whatever is kept: policy and reference get the same bits
            w = _operand(call.weight[start:stop], call)
            z = _logits(x, w, call, start, stop)
            if start < keep:
                stash[:, start:stop] = z[:, : keep - start]
            probs, shrink = sums.add(z, call.targets - start)  # of this chunk in, and of all before by, the new sum
            if direction is not None:
                call.head.times_slope_(probs, z)
                direction.mul_(shrink.unsqueeze(1)).sub_(precision.matmul(probs.to(w.dtype), w))
        if direction is not None:
            slope = call.head.times_slope_(
                torch.ones_like(direction[:, 0]), sums.z_target.to(direction.dtype, copy=True)
            )
            w_target = call.weight.index_select(0, call.targets).to(call.dtype)
            direction.addcmul_(slope.unsqueeze(1), w_target.to(direction.dtype))
        return sums.finish(call.weight.shape[0], kept if keep != KEEP_NOTHING else None)

    def backward(
        self,
        call: HeadCall,
        saved: Saved,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `base.Backend.backward`."""
        coefficient = grad_logps.to(saved.logps.dtype)
        if saved.keep == KEEP_DIRECTION:
            assert saved.kept is not None
            rest_prob = -torch.expm1(saved.logps)
            return (
                (_rows_of(saved.kept, saved.rows) * (coefficient * rest_prob).unsqueeze(1)).to(call.hidden.dtype),
                None,
                None,
            )
        with precision.full(call.hidden.device):
            return self._backward(call, saved, coefficient, grad_entropy, needs)

    def _backward(
        self,
        call: HeadCall,
        saved: Saved,
        coefficient: Tensor,
        grad_entropy: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x = _operand(call.hidden, call)
        dx = torch.zeros_like(x, dtype=product_dtype(call.dtype)) if needs[0] else None
        dw = call.weight.new_empty(call.weight.shape) if needs[1] else None
        db = call.bias.new_empty(call.bias.shape) if needs[2] and call.bias is not None else None
        stashed = min(max(saved.keep, 0), call.weight.shape[0])
        for start, stop in vocabulary_chunks(call, stashed):
            w = _operand(call.weight[start:stop], call)
            if stop <= stashed:
                assert saved.kept is not None
                z = _rows_of(saved.kept[:, start:stop], saved.rows).clone()
            else:
                z = _logits(x, w, call, start, stop)
            grad = dlogits(z, call.targets - start, saved, coefficient, grad_entropy)
            call.head.times_slope_(grad, z)
            if db is not None:
                db[start:stop] = grad.sum(0)
            grad = grad.to(w.dtype)
            if dw is not None:
                dw[start:stop] = precision.matmul(grad.t(), x)
            if dx is not None:
                dx += precision.matmul(grad, w)
        return (None if dx is None else dx.to(call.hidden.dtype)), dw, db


def vocabulary_chunks(call: HeadCall, border: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of the walk's chunks; borders depend on shapes and kind of device only, one of them is `border`."""
    n_columns, width = call.weight.shape
    elements = CHUNK_ELEMENTS * (CUDA_CHUNK if call.hidden.is_cuda else 1)
    step = max(MIN_CHUNK_COLUMNS, elements // (call.hidden.shape[0] + width))
    for first, last in ((0, border), (border, n_columns)):
        for start in range(first, last, step):
            yield start, min(start + step, last)


def _rows_of(kept: Tensor, rows: Tensor | None) -> Tensor:
    return kept if rows is None else kept.index_select(0, rows)


def _logits(x: Tensor, w: Tensor, call: HeadCall, start: int, stop: int) -> Tensor:
    """The logits z [N, stop − start] of a chunk, in the product dtype."""
    z = precision.matmul(x, w.t())
    if call.bias is not None:
        z += call.bias[start:stop].to(z.dtype)
    return call.head.logits_(z)


def _operand(tensor: Tensor, call: HeadCall) -> Tensor:
    """`tensor` rounded to the call's dtype, then as the products want it."""
    rounded = tensor.to(call.dtype)
    if rounded.is_cuda and call.dtype == torch.bfloat16:
        return rounded  # tensor cores sum bf16 products in float32; elsewhere they have to be upcast
    return rounded.to(product_dtype(call.dtype))
