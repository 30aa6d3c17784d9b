"""The pair epilogue as one custom op: segment sums, a loss of the sigmoid family, its slopes, rewards and margins.

The arithmetic is csrc/pair_math.h and backends/triton/epilogue.py; losses/ is their twin and serves everything else. Only
`dpo.py` calls this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.backends import get_backend, pair_backend
from sdpo_kernels.rows import ScoredRows

MOST_PAIRS = 4096  # one small block does them all
LOSSES = ("sigmoid", "robust", "hinge", "ipo")  # the order of PairLoss in csrc/pair_math.h


def serves(backend: str, logps: Tensor, n_pairs: int, loss_type: str) -> str | None:
    """The name of the backend whose op computes this loss; None: autograd through losses/ does."""
    if loss_type not in LOSSES or logps.dtype != torch.float32 or n_pairs > MOST_PAIRS:
        return None
    chosen = pair_backend(backend, logps.device)
    return None if chosen is None else chosen.name


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar, mean over pairs), sums [2B] and metrics [4, B]; the gradient goes through the loss alone.

    Args:
        logps: [N] of tokens with `rows`, or [2B] summed already; float32.
        ref, counts: [2B] the reference's sums (float32) and the scored tokens (int64).
        smoothing: the loss's label_smoothing; 0 where it has none.

    The metrics are the rewards of chosen and rejected, the margins and the accuracy (1 or 0) of each pair.
    """
    index, segment = (None, None) if rows is None else (rows.index, rows.segment)
    number = LOSSES.index(loss_type)
    loss, sums, metrics, _ = _pair_epilogue(logps, index, segment, ref, counts, number, beta, smoothing, backend)
    return loss, sums, metrics


@torch.library.custom_op("sdpo_kernels::pair_epilogue", mutates_args=())
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
    """loss, sums [2B], metrics [4, B], slopes [2B]."""
    out = _empty(logps, ref)
    get_backend(backend).pair_epilogue(
        logps.contiguous(), None if index is None else index.contiguous(),
        None if segment is None else segment.contiguous(), ref.contiguous(), counts.long().contiguous(),
        loss_type, beta, smoothing, out,
    )  # fmt: skip
    return out


def _empty(logps: Tensor, ref: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = ref.shape[0]
    return logps.new_empty(()), logps.new_empty(n), logps.new_empty((4, n // 2)), logps.new_empty(n)


@_pair_epilogue.register_fake
def _(logps, index, segment, ref, counts, loss_type, beta, smoothing, backend):
    return _empty(logps, ref)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logps, index, segment, *_ = inputs
    ctx.n_rows = logps.shape[0]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index, segment, output[3])


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    index, segment, slopes = ctx.saved_tensors
    slopes = slopes * grad
    if index is not None:
        slopes = slopes.new_zeros(ctx.n_rows).index_copy(0, index, slopes.index_select(0, segment))
    return (slopes,) + (None,) * 8


_pair_epilogue.register_autograd(_backward, setup_context=_setup_context)
