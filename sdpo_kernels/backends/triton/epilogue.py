"""The pair epilogue in one launch of one program: segment sums, a loss of the sigmoid family, slopes and metrics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdpo_kernels.backends.base import PairOutputs
from sdpo_kernels.backends.triton.kernels import log1p_of
from sdpo_kernels.backends.triton.launch import COMPILED
from sdpo_kernels.rows import sorted_by_sequence

PAIRS_AT_ONCE = 64  # more in one block would not fit the registers
ELEMENTS = 2048  # log-probs summed at a time
ROBUST, HINGE, IPO = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # as in epilogue_op.LOSSES


@triton.jit
def softplus(x):
    """log1p(exp(x)) in float64, without overflow."""
    return tl.maximum(x, 0.0) + log1p_of(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float64, without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def pair_loss(a, b, chosen_count, rejected_count, beta, smoothing, LOSS: tl.constexpr):
    """Loss of each pair and its derivatives by the chosen and the rejected sum; csrc/pair_math.h in Triton."""
    # IPO compares means over tokens, the others sums
    if LOSS == IPO:
        d = a / chosen_count - b / rejected_count - 1.0 / (2.0 * beta)
        return d * d, 2.0 * d / chosen_count, -2.0 * d / rejected_count

    # slope: d loss / d z, with z = beta · (a − b)
    z = beta * (a - b)
    if LOSS == HINGE:
        # slope 0 at the kink; NaN stays NaN
        value = tl.where(1.0 - z > 0, 1.0 - z, tl.where(z != z, z, 0.0))
        slope = tl.where(1.0 - z > 0, -1.0, tl.where(z != z, z, 0.0))
    elif LOSS == ROBUST:
        scale = 1.0 / (1.0 - 2.0 * smoothing)
        value = scale * ((1.0 - smoothing) * softplus(-z) - smoothing * softplus(z))
        slope = scale * (-(1.0 - smoothing) * sigmoid(-z) - smoothing * sigmoid(z))
    else:
        value = (1.0 - smoothing) * softplus(-z) + smoothing * softplus(z)
        slope = -(1.0 - smoothing) * sigmoid(-z) + smoothing * sigmoid(z)
    return value, beta * slope, -beta * slope


@triton.jit
def sequence_sums(logps, index, begin, end, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """Log-probs of the rows index[begin … end − 1] summed for each sequence, in float64."""
    total = tl.zeros([SEQUENCES], tl.float64)
    for start in range(0, tl.max(end - begin, 0), BLOCK):
        place = begin[:, None] + start + tl.arange(0, BLOCK)[None, :]
        inside = place < end[:, None]
        row = tl.load(index + place, inside, other=0)
        total += tl.sum(tl.load(logps + row, inside, other=0.0).to(tl.float64), 1)
    return total


@triton.jit
def some_pairs(
    logps, index, borders, ref, counts, sums, metrics, slopes, start, n_pairs, beta, smoothing,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, LOSS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """Pairs start … start + PAIRS − 1: stores all but the loss, and returns each one's, 0 past the last pair."""
    # chosen sequences take the first half of the block, rejected ones the second
    place = tl.arange(0, 2 * PAIRS)
    pair = start + place % PAIRS
    sequence = place // PAIRS * n_pairs + pair
    there = pair < n_pairs

    if HAS_INDEX:
        begin = tl.load(borders + sequence, there, other=0)
        end = tl.load(borders + sequence + 1, there, other=0)
        total = sequence_sums(logps, index, begin, end, 2 * PAIRS, BLOCK)
    else:
        total = tl.load(logps + sequence, there, other=0.0).to(tl.float64)

    # the caller gets float32 sums; loss and slopes must be of those very numbers
    summed = total.to(tl.float32)
    tl.store(sums + sequence, summed, there)
    ratio = summed.to(tl.float64) - tl.load(ref + sequence, there, other=0.0).to(tl.float64)
    a, b = tl.split(tl.trans(tl.reshape(ratio, [2, PAIRS])))

    # a count of 1 keeps padding from dividing by 0
    count = tl.load(counts + sequence, there, other=1).to(tl.float64)
    chosen_count, rejected_count = tl.split(tl.trans(tl.reshape(count, [2, PAIRS])))
    value, chosen_slope, rejected_slope = pair_loss(a, b, chosen_count, rejected_count, beta, smoothing, LOSS)

    i = start + tl.arange(0, PAIRS)
    real = i < n_pairs
    tl.store(slopes + i, (chosen_slope / n_pairs).to(tl.float32), real)
    tl.store(slopes + n_pairs + i, (rejected_slope / n_pairs).to(tl.float32), real)

    tl.store(metrics + i, (beta * a).to(tl.float32), real)
    tl.store(metrics + n_pairs + i, (beta * b).to(tl.float32), real)
    tl.store(metrics + 2 * n_pairs + i, (beta * (a - b)).to(tl.float32), real)
    tl.store(metrics + 3 * n_pairs + i, tl.where(a > b, 1.0, 0.0), real)
    return tl.where(real, value, 0.0)


@triton.jit(do_not_specialize=["n_pairs"])
def pair_kernel(
    logps, index, borders, ref, counts,  # [N] with index [n_scored] and borders [2B + 1] int64, else [2B]; [2B]; [2B]
    loss, sums, metrics, slopes,  # [1], [2B], [4, B], [2B]
    n_pairs, beta, smoothing,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, LOSS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """One program for all pairs, PAIRS (a power of two) at a time.

    1. sum the log-probs of each sequence in float64; its rows in `index` are those from border to border
    2. log-ratios a (chosen) and b (rejected) against the reference, from sums rounded to float32
    3. loss and slopes of each pair, divided by the number of pairs
    4. rewards, margins and accuracy
    """
    total = tl.zeros([PAIRS], tl.float64)
    for start in range(0, n_pairs, PAIRS):
        total += some_pairs(
            logps, index, borders, ref, counts, sums, metrics, slopes, start, n_pairs, beta, smoothing,
            PAIRS, BLOCK, LOSS, HAS_INDEX,
        )  # fmt: skip

    # a store of one element, as a block of length 1
    one = tl.arange(0, 1)
    tl.store(loss + one, (tl.sum(total, 0) / n_pairs).to(tl.float32) + tl.zeros([1], tl.float32))


def pair_epilogue(
    logps: Tensor, index: Tensor | None, segment: Tensor | None, ref: Tensor, counts: Tensor, loss_type: int,
    beta: float, smoothing: float, out: PairOutputs,
) -> None:  # fmt: skip
    """See `base.Backend.pair_epilogue`."""
    borders = None
    if index is not None and segment is not None:
        index, segment = sorted_by_sequence(index, segment)
        borders = torch.searchsorted(segment, torch.arange(ref.shape[0] + 1, device=segment.device))

    n_pairs = ref.shape[0] // 2
    pairs = min(triton.next_power_of_2(n_pairs), PAIRS_AT_ONCE)
    pair_kernel[(1,)](
        logps, index, borders, ref, counts, out.loss.view(1), out.sums, out.metrics, out.slopes, n_pairs, beta,
        smoothing, PAIRS=pairs, BLOCK=max(16, ELEMENTS // (2 * pairs)), LOSS=loss_type, HAS_INDEX=index is not None,
        num_warps=8, **COMPILED,
    )  # fmt: skip
