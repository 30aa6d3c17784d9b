"""The pair epilogue in one launch of one program: segment sums, a loss of the sigmoid family, slopes and metrics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdpo_kernels.backends.base import PairOutputs
from sdpo_kernels.backends.triton.kernels import log1p_of

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
def sequence_sums(logps, index, count, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """Log-probs of tokens summed over each sequence, whose `count` rows follow each other in `index`; float64."""
    total = tl.zeros([SEQUENCES], tl.float64)
    first = tl.cumsum(count, 0) - count
    for start in range(0, tl.max(count, 0), BLOCK):
        step = start + tl.arange(0, BLOCK)
        inside = step[None, :] < count[:, None]
        row = tl.load(index + first[:, None] + step[None, :], inside, other=0)
        total += tl.sum(tl.load(logps + row, inside, other=0.0).to(tl.float64), 1)
    return total


@triton.jit(do_not_specialize=["n_pairs"])
def pair_kernel(
    logps, index, ref, counts,  # [N] with index [n_scored] int64, else [2B]; [2B]; [2B] int64
    loss, sums, metrics, slopes,  # [1], [2B], [4, B], [2B]
    n_pairs, beta, smoothing,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, LOSS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """One program for all pairs.

    1. sum the log-probs of each sequence in float64; its scored rows are consecutive in `index`, chosen first
    2. log-ratios a (chosen) and b (rejected) against the reference, from sums rounded to float32
    3. loss and slopes of each pair, divided by the number of pairs
    4. rewards, margins and accuracy
    """
    # PAIRS is a power of two: chosen sequences take the first half of the block, rejected ones the second
    place = tl.arange(0, 2 * PAIRS)
    pair = place % PAIRS
    sequence = place // PAIRS * n_pairs + pair
    there = pair < n_pairs

    count = tl.load(counts + sequence, there, other=0)
    if HAS_INDEX:
        total = sequence_sums(logps, index, count, 2 * PAIRS, BLOCK)
    else:
        total = tl.load(logps + sequence, there, other=0.0).to(tl.float64)

    # the caller gets float32 sums; loss and slopes must be of those very numbers
    summed = total.to(tl.float32)
    tl.store(sums + sequence, summed, there)
    ratio = summed.to(tl.float64) - tl.load(ref + sequence, there, other=0.0).to(tl.float64)
    a, b = tl.split(tl.trans(tl.reshape(ratio, [2, PAIRS])))
    chosen_count, rejected_count = tl.split(tl.trans(tl.reshape(count.to(tl.float64), [2, PAIRS])))

    # a count of 1 keeps padding from dividing by 0
    i = tl.arange(0, PAIRS)
    real = i < n_pairs
    chosen_count = tl.where(real, chosen_count, 1.0)
    rejected_count = tl.where(real, rejected_count, 1.0)
    value, chosen_slope, rejected_slope = pair_loss(a, b, chosen_count, rejected_count, beta, smoothing, LOSS)
    tl.store(slopes + i, (chosen_slope / n_pairs).to(tl.float32), real)
    tl.store(slopes + n_pairs + i, (rejected_slope / n_pairs).to(tl.float32), real)

    tl.store(metrics + i, (beta * a).to(tl.float32), real)
    tl.store(metrics + n_pairs + i, (beta * b).to(tl.float32), real)
    tl.store(metrics + 2 * n_pairs + i, (beta * (a - b)).to(tl.float32), real)
    tl.store(metrics + 3 * n_pairs + i, tl.where(a > b, 1.0, 0.0), real)

    # a store of one element, as a block of length 1
    one = tl.arange(0, 1)
    tl.store(loss + one, (tl.sum(tl.where(real, value, 0.0), 0) / n_pairs).to(tl.float32) + tl.zeros([1], tl.float32))


def pair_epilogue(
    logps: Tensor, index: Tensor | None, ref: Tensor, counts: Tensor, loss_type: int, beta: float, smoothing: float,
    out: PairOutputs,
) -> None:  # fmt: skip
    """See `base.Backend.pair_epilogue`."""
    n_pairs = ref.shape[0] // 2
    pairs = triton.next_power_of_2(n_pairs)
    block = max(16, ELEMENTS // (2 * pairs))
    pair_kernel[(1,)](
        logps, index, ref, counts, out.loss.view(1), out.sums, out.metrics, out.slopes, n_pairs, beta, smoothing,
        PAIRS=pairs, BLOCK=block, LOSS=loss_type, HAS_INDEX=index is not None, num_warps=8,
    )  # fmt: skip
