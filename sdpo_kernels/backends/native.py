"""The native backend: the C++ and CUDA kernels of csrc/.

How a call is computed ("Exp-direct" in docs/architecture.md gives the formulas; csrc/walk.h is the walk):

    1. each row's target logit, by a dot product in float64: k
    2. one walk over the vocabulary: E = 2**-58 · exp(z − k) (2⁻⁵⁸) and the rows' sums of E
    3. rows out of range are recomputed with k = their logsumexp
    4. log-probs from the sums; for the backward, a stash of S = E · dz/da, or the direction of a frozen head
    5. backward: dX and dW are two products with S, stashed or recomputed

On the CPU, operands are multiplied in bfloat16 if the chip has AVX-512-BF16, else in float32; on CUDA by cuBLAS. Sums
and logits are float32 everywhere.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sdpo_kernels.backends import native_library, precision, redone
from sdpo_kernels.backends.base import (
    EXTRAS,
    Gradients,
    HeadCall,
    HeadForward,
    Keep,
    Needs,
    PairOutputs,
    Request,
    Saved,
    SliceForward,
)
from sdpo_kernels.backends.chunk_math import entropy_of, log_sum_sq_of
from sdpo_kernels.backends.eager import EagerBackend
from sdpo_kernels.backends.grad_tol import words_of
from sdpo_kernels.rows import sorted_by_sequence

DTYPES = (torch.float32, torch.bfloat16)
_ROW_EXTRAS = ("top", "sum", "sum_z", "sum_sq", "all", "target_z")  # of csrc/cpu/extras.h: e = exp(z − top)
_EAGER = EagerBackend()


@functools.cache
def _cuda_unavailable_reason(device: int) -> str | None:
    """Load the CUDA library at the first CUDA tensor; None, or why it cannot serve `device`."""
    try:
        reason = native_library.load_cuda()
    except RuntimeError as error:
        raise RuntimeError(f"backend: native: {error}, or set SDPO_BACKEND=eager") from error
    if reason is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it is built for compute capability 8.0 and later"
    return reason or native_library.OPERATORS.cuda_refuses(device) or None


# what torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second
_cuda_unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


class NativeBackend:
    """The CPU library is loaded with the package, the CUDA library at the first CUDA tensor.

    A library that exists but cannot be loaded raises an error when it is needed.
    """

    name = "native"
    device_types: tuple[str, ...] | None = ("cpu", "cuda")
    asserts_inputs = False
    state_columns = 2  # the logsumexp, and k: what the stash's exponentials are relative to

    def __init__(self) -> None:
        self.unavailable_reason: str | None = None  # why there is no CPU library; None: it is loaded
        self.load_error: str | None = None  # why the one that exists cannot be used
        try:
            self.unavailable_reason = native_library.load()
        except RuntimeError as error:
            self.load_error = str(error)

        usable = self.unavailable_reason is None and self.load_error is None
        self.bf16_products = usable and native_library.OPERATORS.cpu_chip() == "avx512bf16"

    @property
    def operators(self) -> Any:
        """The libraries' operators; torch's dispatcher picks the device's."""
        return native_library.OPERATORS

    def on_cuda(self, tensor: Tensor) -> bool:
        """Whether the CUDA kernels serve `tensor`: their stash is stored by rows, not by blocks of columns."""
        return tensor.is_cuda

    def stash_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """S, the unnormalised probabilities, in the dtype that the backward multiplies."""
        bf16 = dtype == torch.bfloat16 and (device.type == "cuda" or self.bf16_products)
        return torch.bfloat16 if bf16 else torch.float32

    def uses_grad_tol(self, device: torch.device) -> bool:
        """On the CPU; the CUDA kernels multiply whole chunks."""
        return device.type == "cpu"

    def supports(self, request: Request) -> str | None:
        """float32 and bfloat16; on CUDA log-probs only."""
        for dtype in (request.dtype, request.weight_dtype):
            if dtype not in DTYPES:
                return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if request.outputs and request.device.type != "cpu":
            return f"on {request.device.type} it computes log-probs only, none of: {', '.join(EXTRAS)}"
        return self._library(request.device)

    def _library(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"it runs on the CPU and on CUDA, not on {device.type}"
        if self.load_error is not None:
            raise RuntimeError(f"backend: native: {self.load_error}, or set SDPO_BACKEND=eager")
        if self.unavailable_reason is not None or device.type == "cpu":
            return self.unavailable_reason
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        return _cuda_unavailable_reason(torch.cuda.current_device() if device.index is None else device.index)

    def forward(self, call: HeadCall, keep: Keep) -> HeadForward:
        """See `base.Backend.forward`.

        On the CPU the stash is stored in blocks of 64 columns, each [kept_rows, 64]; on CUDA by rows.
        """
        n_rows, width = call.hidden.shape
        # operators write into tensors that the caller allocates: torch's allocator, no copies
        logps = call.hidden.new_empty(n_rows, dtype=torch.float32)
        state = call.hidden.new_empty((n_rows, 2), dtype=torch.float64)

        # rows that the operator does not write must be 0
        new = call.hidden.new_empty if call.kept_rows == n_rows else call.hidden.new_zeros
        stash = direction = None
        if keep.is_direction:
            direction = new((call.kept_rows, width), dtype=torch.float32)
        elif keep.n_columns:
            stash = new((call.kept_rows, keep.n_columns), dtype=self.stash_dtype(call.dtype, call.hidden.device))
        kept = direction if stash is None else stash
        tiles = new((call.kept_rows, words_of(len(call.weight))), dtype=torch.int64) if keep.grad_tol > 0 else None

        tolerance = (keep.grad_tol, keep.grad_tol_relative)
        row = self._forward(call, None, logps, state, stash, direction, tolerance=tolerance, tiles=tiles)
        redone.count(logps)
        extras = dict.fromkeys(EXTRAS) if row is None else _extras(call, logps, row)
        return HeadForward(logps, state, **extras, kept=kept, tiles=tiles)

    def _forward(
        self,
        call: HeadCall,
        target_logits: Tensor | None,
        *out: Tensor | None,
        tolerance: tuple[float, bool] = (0.0, False),
        tiles: Tensor | None = None,
    ) -> dict[str, Tensor] | None:
        """Fill `out` (log-probs, state, stash, direction) and `tiles`; if extras are requested, return their sums."""
        if not call.outputs and tiles is None:
            with self._full_precision(call.hidden):
                self.operators.linear_forward(*_inputs(call), target_logits, *out)
            return None

        sums = None
        if call.outputs:
            sums = call.hidden.new_empty((call.hidden.shape[0], len(_ROW_EXTRAS)), dtype=torch.float64)
        self.operators.linear_forward_more(*_inputs(call), target_logits, *out, sums, *tolerance, tiles)
        return None if sums is None else _normalised(dict(zip(_ROW_EXTRAS, sums.unbind(1), strict=True)))

    def supports_slices(self, request: Request) -> str | None:
        """Whatever it serves."""
        return self.supports(request)

    def target_logits(self, call: HeadCall) -> Tensor:
        """See `base.Backend.target_logits`."""
        out = call.hidden.new_empty(call.hidden.shape[0], dtype=torch.float64)
        self.operators.target_logits(*_inputs(call), out)
        return out

    def slice_forward(self, call: HeadCall, target_logits: Tensor, keep: Keep) -> SliceForward:
        """See `base.Backend.slice_forward`."""
        state = call.hidden.new_empty((call.hidden.shape[0], 2), dtype=torch.float64)
        stash = None
        if keep.n_columns:
            dtype = self.stash_dtype(call.dtype, call.hidden.device)
            stash = call.hidden.new_empty((call.hidden.shape[0], keep.n_columns), dtype=dtype)
        row = self._forward(call, target_logits.contiguous(), None, state, stash, None)
        extras = {} if row is None else {name: row[name] for name in SliceForward._fields if name in row}
        return SliceForward(state[:, 0], state[:, 1], stash, **extras)

    def backward(
        self, call: HeadCall, saved: Saved, grad_logps: Tensor, grad_entropy: Tensor | None, needs: Needs
    ) -> Gradients:
        """See `base.Backend.backward`. A gradient of the entropy, rare, is left to the eager backend."""
        if grad_entropy is not None:
            recomputed = Saved(saved.logps, saved.state[:, :1], saved.entropy, None, None, Keep.nothing())
            return _EAGER.backward(call, recomputed, grad_logps, grad_entropy, needs)
        if saved.keep.is_direction:
            assert saved.kept is not None
            direction = saved.kept if saved.rows is None else saved.kept.index_select(0, saved.rows)
            return Gradients((direction * grad_logps.unsqueeze(1)).to(call.hidden.dtype), None, None)

        # each gradient has its tensor's dtype, rounded once from float32 sums
        hidden = _known(call.hidden)
        dx = hidden.new_empty(hidden.shape) if needs.hidden else None
        weight_hidden = hidden[:, needs.from_column :]
        dw = call.weight.new_empty((call.weight.shape[0], weight_hidden.shape[1])) if needs.weight else None
        db = call.hidden.new_empty(call.weight.shape[0], dtype=torch.float32) if needs.bias else None

        # the CPU kernels skip rows of the stash by index; cuBLAS needs them next to each other
        stash, rows = (saved.kept if saved.keep.n_columns else None), saved.rows
        if self.on_cuda(call.hidden):
            stash, rows = (stash if stash is None or rows is None else stash.index_select(0, rows)), None

        given = (
            *_inputs(call), saved.logps, saved.state, stash, rows, grad_logps.float().contiguous(),
            _rows(weight_hidden), dx, dw, db,
        )  # fmt: skip
        if saved.tiles is not None:
            self.operators.linear_backward_tiles(*given, saved.tiles)
        else:
            with self._full_precision(call.hidden):
                self.operators.linear_backward(*given)

        if db is not None and call.bias is not None:
            db = db.to(call.bias.dtype)
        return Gradients(None if dx is None else dx.to(call.hidden.dtype), dw, db)

    def _full_precision(self, tensor: Tensor) -> AbstractContextManager[object]:
        """On CUDA the products are torch's, whose settings may allow lower precision."""
        return precision.full(tensor.device) if self.on_cuda(tensor) else nullcontext()

    def supports_pairs(self, device: torch.device) -> str | None:
        """On the CPU and on CUDA."""
        return self._library(device)

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
        """See `base.Backend.pair_epilogue`."""
        if index is not None and segment is not None and self.on_cuda(logps):
            index, segment = sorted_by_sequence(index, segment)
        self.operators.pair_epilogue(logps, index, segment, ref, counts, loss_type, beta, smoothing, *out)

    def supports_rows(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """float32 and bfloat16."""
        if dtype not in DTYPES:
            return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        return self._library(device)

    def logits_forward(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See `base.Backend.logits_forward`: the logits are read once."""
        logps = logits.new_empty(logits.shape[0], dtype=torch.float32)
        lse = logits.new_empty(logits.shape[0], dtype=torch.float64)
        self.operators.logits_forward(_rows(logits), targets.contiguous(), temperature, logps, lse)
        return logps, lse

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
        """See `base.Backend.logits_backward`: the logits are read once and their gradient is written once."""
        grad = grad.float().contiguous()
        self.operators.logits_backward(grad, _rows(logits), targets.contiguous(), logps, lse, temperature, out)


def _normalised(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fields of SliceForward, from the kernel's sums over all columns but the target's."""
    # Σ q log q and Σ q² of the softmax q over the rest; 0 (or NaN) if the target is the only column
    has_rest = row["sum"] > 0
    return {
        "mean_log_prob": torch.where(has_rest, row["sum_z"] / row["sum"] - row["sum"].log(), 0 * row["sum"]),
        "sum_sq_probs": torch.where(has_rest, row["sum_sq"] / row["sum"].square(), 0 * row["sum"]),
        "sum_logits": row["all"],
        "max_rest": torch.where(row["sum"].isnan(), torch.nan, row["top"]),
        "target_z": row["target_z"],
    }


def _extras(call: HeadCall, logps: Tensor, row: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The requested extras, from the sums of the whole vocabulary."""
    exact = logps.double()
    answers = {
        "entropy": entropy_of(exact, row["mean_log_prob"]).float(),
        "log_sum_sq_probs": log_sum_sq_of(exact, row["sum_sq_probs"]).float(),
        "mean_logits": (row["sum_logits"] / call.weight.shape[0]).float(),
        "is_top1": row["target_z"] >= row["max_rest"],
    }
    return {name: answers[name] if name in call.outputs else None for name in EXTRAS}


def _inputs(call: HeadCall) -> tuple[object, ...]:
    """The leading arguments of the operators `linear_forward` and `linear_backward`."""
    bias = None if call.bias is None else call.bias.detach().to(torch.float32).contiguous()
    head = call.head
    return (
        _rows(_known(call.hidden)), _rows(call.weight), bias, call.targets.contiguous(), head.logit_scale,
        head.softcap or 0.0, head.temperature, call.dtype == torch.bfloat16,
    )  # fmt: skip


def _known(hidden: Tensor) -> Tensor:
    """`hidden`, in float32 if the kernels do not know its dtype (under autocast); they round it themselves."""
    return hidden if hidden.dtype in DTYPES else hidden.float()


def _rows(matrix: Tensor) -> Tensor:
    """`matrix` itself, or a copy with contiguous rows."""
    matrix = matrix.detach()
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()
