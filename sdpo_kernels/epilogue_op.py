"""The pair epilogue as one custom op: segment sums, a loss of the sigmoid family, its slopes, rewards and margins.

The arithmetic is in csrc/pair_math.h and backends/triton/epilogue.py; losses/ is their reference implementation and
serves everything else. Only `dpo_output.py` calls this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdpo_kernels.backends import get_backend, pair_backend
from sdpo_kernels.backends.base import PairOutputs
from sdpo_kernels.namespaces import OPERATORS
from sdpo_kernels.rows import ScoredRows

MOST_PAIRS = 4096  # one small block computes them all
LOSSES = ("sigmoid", "robust", "hinge", "ipo")  # the order of PairLoss in csrc/pair_math.h


def serving_backend(backend: str, logps: Tensor, n_pairs: int, loss_type: str) -> str | None:
    """The name of the backend whose op computes this loss; None: autograd through losses/ does."""
    if loss_type not in LOSSES or logps.dtype != torch.float32 or n_pairs > MOST_PAIRS:
        return None
    found = pair_backend(backend, logps.device)
    return None if found is None else found.name


def pair_epilogue(
    logps: Tensor,
    rows: ScoredRows | None,
    ref: Tensor,
    counts: Tensor,
    *,
    backend: str,
    loss_type: str,
    beta: float,
    smoothing: float,
) -> PairOutputs:
    """Loss, sums, metrics and slopes of B pairs; the gradient flows through the loss alone.

    Args:
        logps: [N] of tokens with `rows`, or [2B] already summed; float32.
        ref, counts: [2B] the reference's sums (float32) and the numbers of scored tokens (int64).
        smoothing: the loss's label_smoothing; 0 for losses without it.
    """
    index, segment = (None, None) if rows is None else (rows.index, rows.segment)
    number = LOSSES.index(loss_type)
    return PairOutputs(*_pair_epilogue(logps, index, segment, ref, counts, number, beta, smoothing, backend))


class _Inputs(NamedTuple):
    """One entry for each input of the op: the inputs themselves, or their gradients."""

    logps: Any = None
    index: Any = None
    segment: Any = None
    ref: Any = None
    counts: Any = None
    loss_type: Any = None
    beta: Any = None
    smoothing: Any = None
    backend: Any = None


@torch.library.custom_op(f"{OPERATORS}::pair_epilogue", mutates_args=())
def _pair_epilogue(
    logps: Tensor,
    index: Tensor | None,
    segment: Tensor | None,
    ref: Tensor,
    counts: Tensor,
    loss_type: int,
    beta: float,
    smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PairOutputs, as a plain tuple."""
    out = _empty(logps, ref)
    get_backend(backend).pair_epilogue(
        logps.contiguous(), None if index is None else index.contiguous(),
        None if segment is None else segment.contiguous(), ref.contiguous(), counts.long().contiguous(),
        loss_type, beta, smoothing, out,
    )  # fmt: skip
    return out[:]  # a slice of a NamedTuple is the plain tuple that an op returns


def _empty(logps: Tensor, ref: Tensor) -> PairOutputs:
    n = ref.shape[0]
    return PairOutputs(
        loss=logps.new_empty(()), sums=logps.new_empty(n), metrics=logps.new_empty((4, n // 2)),
        slopes=logps.new_empty(n),
    )  # fmt: skip


@_pair_epilogue.register_fake
def _(logps, index, segment, ref, counts, loss_type, beta, smoothing, backend):
    return _empty(logps, ref)[:]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, out = _Inputs(*inputs), PairOutputs(*output)
    ctx.n_rows = given.logps.shape[0]
    ctx.mark_non_differentiable(out.sums, out.metrics, out.slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given.index, given.segment, out.slopes)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return _Inputs()[:]
    index, segment, slopes = ctx.saved_tensors

    # d loss / d sums is d loss / d logps of each scored token of the sequence
    slopes = slopes * grad
    if index is not None:
        slopes = slopes.new_zeros(ctx.n_rows).index_copy(0, index, slopes.index_select(0, segment))
    return _Inputs(logps=slopes)[:]


_pair_epilogue.register_autograd(_backward, setup_context=_setup_context)
