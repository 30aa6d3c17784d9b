"""The contract between `logps.py` and the backends: what a backend is asked and what it returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sdpo_kernels.head import Head

EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SHIFT = 58 * math.log(2)  # sums of exponentials are times 2**-58, which makes room for unlikely targets
STASH_MULTIPLE = 64  # a stash has a multiple of this many columns; those past V are padding

_DIRECTION_CODE = -1  # of Keep in the ops' schemas


@dataclass(frozen=True)
class Keep:
    """What a forward keeps for its backward; made by `nothing`, `columns` or `direction`."""

    n_columns: int = 0
    is_direction: bool = False
    grad_tol: float = 0.0  # above 0: also which tiles the backward takes (`grad_tol.py`); never with a direction
    grad_tol_relative: bool = False

    @classmethod
    def nothing(cls) -> Keep:
        """The backward recomputes every chunk."""
        return cls()

    @classmethod
    def columns(cls, n_columns: int, grad_tol: float = 0.0, grad_tol_relative: bool = False) -> Keep:
        """A stash of the vocabulary's first columns, a multiple of STASH_MULTIPLE; 0 is `nothing`."""
        return cls(n_columns=n_columns, grad_tol=grad_tol, grad_tol_relative=grad_tol_relative)

    @classmethod
    def direction(cls) -> Keep:
        """For a frozen head: d logp / d hidden up to one factor per row, so that the backward needs no GEMM."""
        return cls(is_direction=True)

    @classmethod
    def decode(cls, code: int, grad_tol: float = 0.0, grad_tol_relative: bool = False) -> Keep:
        """The inverse of `encode`."""
        return cls.direction() if code == _DIRECTION_CODE else cls.columns(code, grad_tol, grad_tol_relative)

    def encode(self) -> int:
        """The int that the custom ops take: -1 for the direction, else the number of columns."""
        return _DIRECTION_CODE if self.is_direction else self.n_columns


@dataclass(frozen=True)
class Request:
    """What is needed to choose a backend; metadata only."""

    device: torch.device
    dtype: torch.dtype  # the dtype the products' operands are rounded to
    weight_dtype: torch.dtype
    head: Head
    outputs: tuple[str, ...]  # a subset of EXTRAS


@dataclass(frozen=True)
class HeadCall:
    """One problem: N scored rows and a head of V columns."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]; its dtype may differ from `dtype`: backends cast it chunk by chunk
    bias: Tensor | None  # [V]
    targets: Tensor  # [N] int64 in [0, V); of a slice: -1 where the target is a column of another slice
    head: Head
    dtype: torch.dtype  # float32, bfloat16, float16 or float64: what operands are rounded to
    outputs: tuple[str, ...]
    kept_rows: int  # rows of what a forward keeps: N, or more if the fake kernel could not know N; the rest is 0
    ref_hidden: Tensor | None = None  # [N, H] of a reference with this very head: only its log-probs are wanted
    index: Tensor | None = None  # [N] int64 where the rows are in the batch, only to be checked: it must ascend
    is_slice: bool = False  # the head is a part of the vocabulary's columns

    @property
    def known_targets(self) -> Tensor:
        """[N] rows of the weight: the targets, or any row where the target is in another slice."""
        return self.targets.clamp(min=0) if self.is_slice else self.targets


class HeadForward(NamedTuple):
    """Result of a forward: float32 (float64 for float64 operands) vectors [N]; extras not requested are None."""

    logps: Tensor
    state: Tensor  # [N, state_columns] float64: what the backward needs to know about each row
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None  # bool: no other column's logit is above the target's
    kept: Tensor | None  # stash [kept_rows, columns] or direction [kept_rows, H], see Keep; the layout is the backend's
    ref_logps: Tensor | None = None  # of ref_hidden; a backend that leaves it out is called again for those rows alone
    tiles: Tensor | None = None  # [kept_rows, words] int64, given if keep.grad_tol is above 0: see `grad_tol.py`


class SliceForward(NamedTuple):
    """What a slice of the vocabulary answers: float64 vectors [N]; extras not requested are None (`slices.py`)."""

    total: Tensor  # 2**-58 · Σ exp(z − k) over the slice's columns without the target's
    k: Tensor
    kept: Tensor | None  # as in HeadForward
    mean_log_prob: Tensor | None = None  # Σ q log q, q the softmax over the same columns
    sum_sq_probs: Tensor | None = None  # Σ q²
    sum_logits: Tensor | None = None  # Σ z over all of the slice's columns
    max_rest: Tensor | None = None  # max z over the columns of `total`
    target_z: Tensor | None = None  # z at the target as the same products give it; 0 in other slices


class Saved(NamedTuple):
    """What a backward gets back from its forward."""

    logps: Tensor
    state: Tensor
    entropy: Tensor | None  # given if its gradient is wanted
    kept: Tensor | None  # as the forward left it
    rows: Tensor | None  # [N] int64: which rows of the forward these are; None: all, in order
    keep: Keep
    tiles: Tensor | None = None  # as the forward left them


class Needs(NamedTuple):
    """Which gradients a backward computes."""

    hidden: bool
    weight: bool
    bias: bool
    from_column: int = 0  # of H: the weight's gradient is wanted for the columns from here on


class Gradients(NamedTuple):
    """Gradients, each in the dtype of its tensor; None if not needed."""

    hidden: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H − Needs.from_column]
    bias: Tensor | None  # [V]


class PairOutputs(NamedTuple):
    """What a pair epilogue computes for B pairs."""

    loss: Tensor  # scalar, mean over pairs
    sums: Tensor  # [2B] log-probs summed over each sequence
    metrics: Tensor  # [4, B] rewards of chosen and rejected, margins, accuracy (1 or 0)
    slopes: Tensor  # [2B] d loss / d sums


class Backend(Protocol):
    """A backend's interface; its results depend on shapes, dtypes and the machine, never on values."""

    name: str
    device_types: tuple[str, ...] | None  # where it runs at all; None: anywhere
    state_columns: int  # float64 numbers per row that a forward saves for its backward
    asserts_inputs: bool  # on CUDA its forward asserts that targets are in range and `index` ascends: saves launches

    def stash_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of a stash for operands of `dtype` on `device`."""

    def uses_grad_tol(self, device: torch.device) -> bool:
        """Whether its backward can leave tiles out; a backend that cannot is never given a tolerance: it is exact."""

    def supports(self, request: Request) -> str | None:
        """None if the request can be served, else the reason it cannot."""

    def forward(self, call: HeadCall, keep: Keep) -> HeadForward:
        """Log-probs and extras of the scored rows, and what `keep` asks to keep for the backward."""

    def backward(
        self, call: HeadCall, saved: Saved, grad_logps: Tensor, grad_entropy: Tensor | None, needs: Needs
    ) -> Gradients:
        """Gradients of hidden [N, H], weight [V, H] and bias [V]."""

    def supports_slices(self, request: Request) -> str | None:
        """None if a slice of the vocabulary can be served, else the reason it cannot."""

    def target_logits(self, call: HeadCall) -> Tensor:
        """z [N] float64 at the targets, 0 where the target is in another slice."""

    def slice_forward(self, call: HeadCall, target_logits: Tensor, keep: Keep) -> SliceForward:
        """The sums of a slice, given the logits of all rows' targets; never keeps a direction.

        For its gradients call `backward` with the log-probs and `slices.state_of`.
        """

    def supports_pairs(self, device: torch.device) -> str | None:
        """None if there is a pair epilogue for `device`, else the reason there is not."""

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
        """Fill `out`; see `epilogue_op.py`."""

    def supports_rows(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if existing rows (of logits, of log-probs) can be served, else the reason they cannot."""

    def logits_forward(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """logps [N] float32 (float64) and logsumexp [N] float64 of logits [N, V]/temperature; 0 if not scored."""

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
