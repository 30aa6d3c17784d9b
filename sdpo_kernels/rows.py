"""Which rows of a batch are scored, and which sequence each belongs to.

A row is one position of the flattened batch. Rows without a label (prompt, padding) never reach a GEMM.
`ScoredRows` is made once, by a collator or from labels, and every entry point takes it: with it nothing has to be
looked up on the device, so neither forward nor backward synchronises with the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label of a row that is not scored, as in torch's cross_entropy


class ScoredRows(NamedTuple):
    """The scored rows of a batch of S sequences; all three are int64 on the batch's device."""

    index: Tensor  # type: ignore[assignment]  # [N_scored] row numbers in the flattened batch, ascending
    segment: Tensor  # [N_scored] the sequence, 0 … S-1, of each scored row, in any order
    counts: Tensor  # [S] scored rows of each sequence: how often `segment` holds it

    @classmethod
    def from_labels(cls, labels: Tensor, cu_seqlens: Tensor | None = None) -> ScoredRows:
        """Find the scored rows of `labels`: [S, T], or packed [N] with `cu_seqlens` [S+1]. Synchronises with CUDA."""
        sequences = sequence_of_rows(labels, cu_seqlens)
        index = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)
        segment = sequences.index_select(0, index)
        counts = segment_sum(torch.ones_like(segment), segment, _number_of_sequences(labels, cu_seqlens))
        return cls(index, segment, counts)

    @classmethod
    def every(cls, count: int, device: torch.device) -> ScoredRows:
        """All `count` rows, as one sequence. Does not synchronise."""
        counts = torch.full((1,), count, device=device)
        return cls(torch.arange(count, device=device), torch.zeros(count, dtype=torch.int64, device=device), counts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ScoredRows:
        """The same rows on another device."""
        return ScoredRows(*(t.to(device, non_blocking=non_blocking) for t in self))


def check_targets(scored: Tensor, n_columns: int) -> None:
    """Targets of scored rows must be in [0, V): a ValueError on the CPU; on CUDA a device assert, without waiting."""
    right = (scored >= 0) & (scored < n_columns)
    if scored.is_cuda:
        torch._assert_async(right.all(), f"targets: must be in [0, {n_columns}) or {IGNORE_INDEX}")
    elif not bool(right.all()):
        wrong = scored[~right][0].item()
        raise ValueError(f"targets: was {wrong}, must be in [0, {n_columns}) or {IGNORE_INDEX} (not scored)")


def check_ascending(index: Tensor) -> None:
    """Rows must ascend, or results would be added up wrongly; on CUDA a device assert, without waiting.

    On the CPU `logps.check_rows` has compared the index with the batch, too.
    """
    if index.is_cuda:
        torch._assert_async((index[1:] > index[:-1]).all(), "rows: its index must be ascending")


def busy_rows(grad_logps: Tensor, grad_entropy: Tensor | None) -> Tensor | None:
    """Which rows have a coefficient other than 0, [M] int64; None: all.

    On the CPU the others are left out: they would add work to the GEMMs and change nothing, except that 0 times a NaN
    of a row's hidden state would be NaN. On CUDA, where finding them would synchronise with the device, all remain.
    """
    if grad_logps.is_cuda:
        return None
    busy = grad_logps != 0
    if grad_entropy is not None:
        busy |= grad_entropy != 0
    return None if bool(busy.all()) else busy.nonzero().squeeze(1)


def all_rows(labels: Tensor, cu_seqlens: Tensor | None = None) -> ScoredRows:
    """Every row, scored or not, with the counts of the scored ones: no shape depends on data, as compile requires.

    Sums over these rows are right because the log-prob of a row that is not scored is 0.
    """
    segments = sequence_of_rows(labels, cu_seqlens)
    is_scored = (labels.reshape(-1) != IGNORE_INDEX).long()
    counts = segment_sum(is_scored, segments, _number_of_sequences(labels, cu_seqlens))
    return ScoredRows(torch.arange(segments.shape[0], device=labels.device), segments, counts)


def _number_of_sequences(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    return labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def sequence_of_rows(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The sequence number [N] of every row of `labels` ([S, T], or packed [N] with `cu_seqlens` [S+1])."""
    if cu_seqlens is None:
        n_sequences, length = labels.shape
        return torch.arange(n_sequences, device=labels.device).repeat_interleave(
            length, output_size=n_sequences * length
        )
    rows = torch.arange(labels.shape[0], device=labels.device)
    return torch.searchsorted(cu_seqlens[1:].to(rows.dtype), rows, right=True)


def sequence_logps(logps: Tensor, rows: ScoredRows, weights: Tensor | None = None) -> Tensor:
    """Sum per-token `logps` [N] over the scored rows of each sequence into [S], in logps' dtype.

    `weights` [N_scored] float64 weigh the rows. The sum is computed in float64, so that packed and padded batches agree
    and long sequences lose no digits.
    """
    scored = logps.index_select(0, rows.index).double()
    if weights is not None:
        scored = scored * weights
    return segment_sum(scored, rows.segment, rows.counts.shape[0]).to(logps.dtype)


def sorted_by_sequence(index: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """`index` and `segment` with the rows of each sequence next to each other, in their order; no synchronisation."""
    segment, order = segment.sort(stable=True)
    return index.index_select(0, order), segment


def segment_sum(values: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """Sum `values` [N] by `segment` [N] into [n_segments], same dtype; deterministic on CPU and CUDA."""
    # index_put with accumulate sorts on CUDA, where index_add would use atomics in any order
    zeros = torch.zeros(n_segments, dtype=values.dtype, device=values.device)
    return zeros.index_put((segment,), values, accumulate=True)
