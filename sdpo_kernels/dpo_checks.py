"""Checks of a batch of pairs: every ValueError of `fused_linear_dpo` about its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows


def check_batch(
    hidden: Tensor, labels: Tensor, n_columns: int | None, cu_seqlens: Tensor | None, rows: ScoredRows | None
) -> int:
    """Raise ValueError if the batch's tensors do not match; return its number of sequences, 2B.

    n_columns: V, or None if it is not known here: the head is a slice of the vocabulary.

    Values are checked on the CPU only: on CUDA that would synchronise.
    """
    n_sequences = _count_sequences(hidden, cu_seqlens)
    _check_labels(labels, hidden, n_columns)
    if rows is not None:
        _check_rows(rows, n_sequences)
    return n_sequences


def _count_sequences(hidden: Tensor, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise ValueError(
                f"hidden: was of shape {list(hidden.shape)}, must be [2B, T, H], or [N, H] with cu_seqlens"
            )
        name, n_sequences = "hidden", hidden.shape[0]
    else:
        if hidden.dim() != 2:
            raise ValueError(f"hidden: was of shape {list(hidden.shape)}, must be packed [N, H] as cu_seqlens is given")
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens: was {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}, must be int [2B+1]"
            )
        name, n_sequences = "cu_seqlens", cu_seqlens.shape[0] - 1
        _check_borders(cu_seqlens, hidden.shape[0])

    if n_sequences < 2 or n_sequences % 2:
        raise ValueError(
            f"{name}: was of {n_sequences} sequences, must be an even number, chosen half first, at least 2"
        )
    return n_sequences


def _check_borders(cu_seqlens: Tensor, n_rows: int) -> None:
    """cu_seqlens must ascend from 0 to N."""
    if cu_seqlens.is_cuda or torch.compiler.is_compiling():
        return
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != n_rows or borders != sorted(borders):
        raise ValueError(f"cu_seqlens: was {borders}, must ascend from 0 to {n_rows}, the rows of hidden")


def _check_labels(labels: Tensor, hidden: Tensor, n_columns: int | None) -> None:
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: was {labels.dtype} of shape {list(labels.shape)}, "
            f"must be torch.int64 of shape {list(hidden.shape[:-1])}"
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = (labels < 0) & (labels != IGNORE_INDEX)
        wrong = labels[outside if n_columns is None else outside | (labels >= n_columns)]
        if wrong.numel():
            where = "at least 0" if n_columns is None else f"in [0, {n_columns})"
            raise ValueError(f"labels: held {wrong[0].item()}, must be {where} or {IGNORE_INDEX} (not scored)")


def _check_rows(rows: ScoredRows, n_sequences: int) -> None:
    """Values on the CPU: a ValueError. On CUDA a device assert of the number of rows, which does not synchronise."""
    if rows.counts.shape != (n_sequences,) or rows.segment.shape != rows.index.shape:
        raise ValueError(
            f"rows: was of {rows.counts.shape[0]} sequences, {rows.index.shape[0]} rows and "
            f"{rows.segment.shape[0]} segments, "
            f"must be of {n_sequences} sequences and a segment for every row"
        )
    if rows.segment.is_cuda or torch.compiler.is_compiling():
        right = rows.counts.sum() == rows.index.shape[0]
        torch._assert_async(right, "rows: its counts must add up to the length of its index")
        return

    outside = rows.segment[(rows.segment < 0) | (rows.segment >= n_sequences)]
    if outside.numel():
        raise ValueError(f"rows: its segment held {outside[0].item()}, must be in [0, {n_sequences})")
    found = torch.bincount(rows.segment, minlength=n_sequences)
    wrong = (found != rows.counts).nonzero().squeeze(1).tolist()
    if wrong:
        raise ValueError(
            f"rows: its counts held {rows.counts[wrong[0]].item()} for sequence {wrong[0]}, must be "
            f"{found[wrong[0]].item()}, as often as its segment holds it"
        )


def check_reference(
    hidden: Tensor,
    weight: Tensor,
    n_sequences: int,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    *,
    needed: bool,
) -> None:
    """Raise ValueError if the reference is `needed` but missing, or does not match the policy."""
    if not needed and all(given is None for given in (ref_logps, ref_hidden, ref_weight, ref_bias)):
        return
    if ref_logps is not None:
        if ref_hidden is not None or ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_logps: was given together with ref_hidden/ref_weight/ref_bias, must be given alone")
        if ref_logps.shape != (n_sequences,):
            raise ValueError(
                f"ref_logps: was of shape {list(ref_logps.shape)}, must be [{n_sequences}], summed log-probs"
            )
        check_device("ref_logps", ref_logps, hidden)
        return

    # a head needs both its hidden states and its weight; the bias is optional
    if ref_hidden is None or ref_weight is None:
        missing = "ref_logps" if ref_hidden is None and ref_weight is None else (
            "ref_hidden" if ref_hidden is None else "ref_weight"
        )  # fmt: skip
        raise ValueError(f"{missing}: was None, must be given: either ref_logps, or both ref_hidden and ref_weight")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: was of shape {list(ref_hidden.shape)}, must be {[*hidden.shape[:-1], 'H']} as hidden is"
        )
    if ref_weight.dim() != 2 or ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: was of shape {list(ref_weight.shape)}, must be [{weight.shape[0]}, H]: "
            "policy and reference share one vocabulary"
        )


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raise ValueError if `tensor` is on another device than `like`."""
    if tensor.device != like.device:
        raise ValueError(f"{name}: was on {tensor.device}, must be on {like.device} as the rest is")


def check_counts(counts: Tensor) -> None:
    """Every sequence needs a scored token: a ValueError on CPU; on CUDA a device assert, which does not synchronise."""
    if counts.is_cuda or torch.compiler.is_compiling():
        torch._assert_async((counts > 0).all(), "labels: a sequence has no scored token")
        return
    empty = (counts == 0).nonzero().squeeze(1).tolist()
    if empty:
        raise ValueError(
            f"labels: sequence {empty[0]} has no scored token (all are {IGNORE_INDEX}), must have at least one"
        )
