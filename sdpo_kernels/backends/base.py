"""What a backend is asked and what it answers: the contract between `logps.py` and the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sdpo_kernels.head import Head

EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

KEEP_NOTHING = 0  # backward recomputes every chunk; a positive number = vocabulary columns to stash
STASH_MULTIPLE = 64  # of a stash's columns; those past V are padding
KEEP_DIRECTION = -1  # frozen head: forward also accumulates dlogp/dhidden up to one factor a row, no backward GEMM


@dataclass(frozen=True)
class Request:
    """What has to be known to choose a backend; made of metadata only."""

    device: torch.device
    dtype: torch.dtype  # the dtype the products' operands are rounded to
    weight_dtype: torch.dtype
    head: Head
    outputs: tuple[str, ...]  # which of EXTRAS


@dataclass(frozen=True)
class HeadCall:
    """One problem: N scored rows against a head of V columns."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]; may be of another dtype than `dtype`: backends cast it chunk by chunk
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64 in [0, V)
    head: Head
    dtype: torch.dtype  # float32, bfloat16, float16 or float64: what operands are rounded to
    outputs: tuple[str, ...]
    kept_rows: int  # rows of what a forward keeps: N, or more where the fake kernel could not know N; the rest is 0
    ref_hidden: Tensor | None = None  # [N, H] of a reference with this very head: its log-probs alone are wanted


class HeadForward(NamedTuple):
    """A forward's answer: float32 (float64 for float64 operands) vectors [N]; extras not asked for are None."""

    logps: Tensor
    state: Tensor  # [N, state_columns] float64: what the backward needs to know of each row
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None  # bool: no other column's logit is above the target's
    kept: Tensor | None  # stash [kept_rows, columns] or direction [kept_rows, H], see KEEP_*; laid out as it likes
    ref_logps: Tensor | None = None  # of ref_hidden; a backend that leaves it out is asked again for those rows alone


class Saved(NamedTuple):
    """What a backward gets back of its forward."""

    logps: Tensor
    state: Tensor
    entropy: Tensor | None  # given where its gradient is wanted
    kept: Tensor | None  # as the forward left it
    rows: Tensor | None  # [N] int64: which rows of the forward these are; None: all, in order
    keep: int


class Backend(Protocol):
    """What is asked of a backend: the answers depend on shapes, dtypes and the machine, never on values."""

    name: str
    device_types: tuple[str, ...] | None  # where it runs at all; None: anywhere
    state_columns: int  # float64 numbers of a row that a forward saves for its backward

    def stash_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """What a stash holds for operands of `dtype` on `device`."""

    def supports(self, request: Request) -> str | None:
        """None where the request can be served, else the reason it cannot."""

    def forward(self, call: HeadCall, keep: int) -> HeadForward:
        """Log-probs and extras of the scored rows, and what `keep` asks to keep for the backward."""

    def backward(
        self,
        call: HeadCall,
        saved: Saved,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden [N, H], weight [V, H] and bias [V], each in its tensor's dtype; None where not needed."""

    def supports_pairs(self, device: torch.device) -> str | None:
        """None where the pair epilogue is there for `device`, else the reason it is not."""

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
        """Fill `out`: loss, sums [2B], metrics [4, B], slopes [2B]; see `epilogue_op.py`."""

    def supports_rows(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None where rows (of logits, of log-probs) can be served, else the reason they cannot."""

    def logits_forward(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """logps [N] float32 (float64) and logsumexp [N] float64 of logits [N, V]/temperature; 0 where not scored."""

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
        """Write dL/dlogits to `out` [N, V], contiguous and of logits' dtype; it may be `logits` itself."""
