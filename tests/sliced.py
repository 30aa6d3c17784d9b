"""`linear_logps` with its vocabulary cut into slices, all in this process: what ranks of a group do, without a group.

found = case.ours(Sliced([0, 64, 128]))     # three slices; the last one ends at V
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.backends import choose_backend, slices
from sdpo_kernels.backends.base import HeadCall, Keep, Needs, Request, Saved
from sdpo_kernels.head import Head, product_dtype
from sdpo_kernels.logps import LinearLogps


class Sliced:
    """Called as `linear_logps` is; `stash_bytes` is for each slice, and 0 or enough for everything."""

    def __init__(self, starts: Sequence[int]) -> None:
        self.starts = starts

    def __call__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
        outputs: Sequence[str] = (), temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None,
        backend: str = "auto", stash_bytes: int = 0,
    ) -> LinearLogps:  # fmt: skip
        head = Head(logit_scale, softcap, temperature)
        request = Request(hidden.device, hidden.dtype, weight.dtype, head, tuple(outputs))
        chosen = choose_backend(backend, request)
        assert chosen.supports_slices(request) is None
        options = (chosen, head, tuple(outputs), bool(stash_bytes), list(self.starts))
        found = _Sliced.apply(hidden, weight, bias, targets, *options)
        return LinearLogps(found[0], **dict(zip(outputs, found[1:], strict=True)))


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, *options: Any) -> Any:
        backend, head, outputs, stashed, starts = options
        index = (targets != -100).nonzero().squeeze(1)
        stops = [*starts[1:], len(weight)]
        calls = []
        for start, stop in zip(starts, stops, strict=True):
            mine = targets[index] - start
            mine = torch.where((mine >= 0) & (mine < stop - start), mine, -1)
            own_bias = None if bias is None else bias[start:stop]
            calls.append(
                HeadCall(
                    hidden[index],
                    weight[start:stop],
                    own_bias,
                    mine,
                    head,
                    hidden.dtype,
                    outputs,
                    len(index),
                    is_slice=True,
                )
            )

        z = sum(backend.target_logits(call) for call in calls)
        keeps = [Keep.columns(-(-len(call.weight) // 64) * 64 if stashed else 0) for call in calls]
        parts = [backend.slice_forward(call, z, keep) for call, keep in zip(calls, keeps, strict=True)]
        merged = slices.merge(parts, z, len(weight), outputs, product_dtype(hidden.dtype))

        ctx.saved = (backend, calls, keeps, parts, merged, index, outputs, bias, hidden)
        found = [merged.logps, *(getattr(merged, name) for name in outputs)]
        whole = [value.new_zeros(len(targets)).index_copy(0, index, value) for value in found]
        ctx.mark_non_differentiable(*(w for n, w in zip(outputs, whole[1:], strict=True) if n != "entropy"))
        return tuple(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *grad_extras: Tensor) -> Any:
        backend, calls, keeps, parts, merged, index, outputs, bias, hidden = ctx.saved
        needs = Needs(*ctx.needs_input_grad[:3])
        grad_entropy = dict(zip(outputs, grad_extras, strict=True)).get("entropy")
        if grad_entropy is not None:
            grad_entropy = grad_entropy[index] if bool(grad_entropy.any()) else None
        found = []
        for call, keep, part in zip(calls, keeps, parts, strict=True):
            state = slices.state_of(backend, merged.lse, part.k)
            saved = Saved(merged.logps, state, merged.entropy, part.kept, None, keep)
            found.append(slices.slice_backward(backend, call, saved, grad[index], grad_entropy, needs))

        dx = None
        if needs.hidden:
            dx = sum(part.hidden for part in found).to(hidden.dtype)
            dx = hidden.new_zeros(hidden.shape).index_copy(0, index, dx)
        dw = torch.cat([part.weight for part in found]) if needs.weight else None
        db = torch.cat([part.bias for part in found]) if needs.bias and bias is not None else None
        return dx, dw, db, *[None] * 6
