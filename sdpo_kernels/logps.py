"""The primitive: per-token log-probabilities of a linear head, with a real backward and no [tokens, vocab] tensor.

out = linear_logps(hidden, weight, targets)     # hidden [N, H], weight [V, H], targets [N]
out.logps                                       # [N] float32

1. check the arguments
2. choose a backend
3. find the scored rows
4. decide what the forward keeps for the backward: the op's fake kernel must know its shape
5. call the custom op (logps_op.py), whose backward is a custom op, too
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo_kernels import logps_op
from sdpo_kernels.backends import choose_backend, takes_grad_tol
from sdpo_kernels.backends.base import EXTRAS, STASH_MULTIPLE, Backend, Keep, Request
from sdpo_kernels.head import Head
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows

# read once at import, where torch.compile does not see it; 16 GiB if the system does not tell
HOST_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**34
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LinearLogps(NamedTuple):
    """Vectors [N] in float32 (float64 for float64 inputs), 0 in rows not scored; extras not requested are None."""

    logps: Tensor
    entropy: Tensor | None = None  # −Σ p log p in nats; differentiable
    log_sum_sq_probs: Tensor | None = None  # log Σ p²; carries no gradient
    mean_logits: Tensor | None = None  # mean over the vocabulary of the transformed logits; carries no gradient
    is_top1: Tensor | None = None  # bool: no other logit is above the target's
    ref_logps: Tensor | None = None  # of ref_hidden, if given; carries no gradient


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = (),
    rows: ScoredRows | None = None,
    ref_hidden: Tensor | None = None,
    lora_b: Tensor | None = None,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
    grad_tol: float = 0.0,
    grad_tol_relative: bool = False,
) -> LinearLogps:
    """Log-probability of each target under softmax(z), z = softcap·tanh(scale·(hidden·Wᵀ + bias)/softcap)/temperature.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64.
        weight: [V, H], hidden's dtype. Under autocast both are rounded to the autocast dtype instead, chunk by chunk,
            and the gradient of `weight` still has weight's own dtype, rounded once.
        targets: [N] int64 in [0, V); rows of −100 give log-prob 0 and no gradient.
        bias: [V], weight's dtype or float32.
        temperature, logit_scale, softcap: the head's transform; softcap None leaves the tanh out.
        outputs: extras from "entropy", "log_sum_sq_probs", "mean_logits", "is_top1".
        rows: the scored rows, if known; saves finding them (a host synchronisation on CUDA).
        ref_hidden: [N, H], hidden's dtype: a reference's hidden states that go into the same head (a LoRA model with
            its adapter off). They are scored for the same targets in the same pass over the vocabulary, without
            gradient. With lora_b [N, H + r], 0 in the last r columns for a reference without it.
        lora_b: [V, r], weight's dtype, a LoRA on the head: hidden is then [N, H + r], [x, s·A·x] side by side, and is
            multiplied by [W, B]. Neither W + s·B·A nor, of a frozen W, a [V, H] gradient is ever built. On CUDA r is
            best a multiple of 8 (pad both with zeros).
        backend: "auto" or a backend's name; the environment variable SDPO_BACKEND overrides "auto".
        stash_bytes: memory that the forward may use to save the backward recomputing logits; 0 for none. "auto" is
            min(2·N·V, 4·V·H, an eighth of the device's memory).
        grad_tol: what the backward may leave out, 0 ≤ grad_tol < 1; 0 is exact. Of each row it leaves out tiles of 64
            columns whose probabilities add up to at most grad_tol, so that dL/dz of the row is off by at most
            grad_tol·|g| (L1 norm; g is the gradient of its log-prob). The target's tile is never left out. Backends
            that cannot leave anything out are exact, as is eager unless it is named, and entropy's gradient
            ("What the backward may leave out" in docs/architecture.md).
        grad_tol_relative: whether grad_tol is relative to 1 − p of each row, p its target's probability: dL/dz is then
            off by at most grad_tol·(1 − p)·|g|, half of grad_tol relative to its own L1 norm. Rows whose target is
            nearly certain keep gradients as accurate as the others'; the same grad_tol leaves out less.

    Returns:
        `LinearLogps`. Logits are never rounded below float32; float32 inputs are multiplied without TF32. NaN inputs
        give NaN log-probs and gradients.

    Raises:
        ValueError: naming the argument, what it was and what it should be.

    Example:
        >>> import torch
        >>> from sdpo_kernels import linear_logps
        >>> hidden, weight = torch.zeros(3, 8), torch.zeros(100, 8)
        >>> linear_logps(hidden, weight, torch.tensor([5, -100, 7])).logps
        tensor([-4.6052,  0.0000, -4.6052])
    """
    head = Head(logit_scale, softcap, temperature)
    dtype = check_inputs(hidden, weight, targets, bias, outputs, rows, ref_hidden, lora_b)
    names = tuple(name for name in EXTRAS if name in outputs)
    # by metadata alone, so that a compiled graph chooses once
    chosen = choose_backend(backend, Request(hidden.device, dtype, weight.dtype, head, names))

    if rows is not None:
        index: Tensor | None = rows.index
    elif torch.compiler.is_compiling():
        index = None  # how many rows are scored depends on data, which a compiled graph cannot: left to the op
    else:
        index = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    n_rows = hidden.shape[0] if index is None else index.shape[0]
    head_trains = any(t is not None and t.requires_grad for t in (weight, bias, lora_b))
    check_grad_tol(grad_tol, grad_tol_relative)
    tolerance = float(grad_tol) if takes_grad_tol(backend, chosen, hidden.device) else 0.0
    keep = _keep(chosen, hidden, weight, head_trains, n_rows, names, dtype, stash_bytes, tolerance)

    op = logps_op.linear_logps_finding_op if index is None else logps_op.linear_logps_op
    found = op(
        hidden, weight, targets, bias, index, logit_scale, softcap, temperature, ",".join(names), dtype, chosen.name,
        keep.encode(), None if ref_hidden is None else ref_hidden.detach(), lora_b,
        keep.grad_tol, grad_tol_relative,
    )  # fmt: skip
    out = logps_op.Outputs(*found)
    requested = {name: getattr(out, name) for name in names}
    return LinearLogps(out.logps, **requested, ref_logps=None if ref_hidden is None else out.ref_logps)


def _keep(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    head_trains: bool,
    n_rows: int,
    outputs: tuple[str, ...],
    dtype: torch.dtype,
    stash_bytes: int | str,
    grad_tol: float,
) -> Keep:
    """What the forward keeps for the backward."""
    check_stash_bytes(stash_bytes)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or head_trains):
        return Keep.nothing()
    # the direction is that of the log-prob alone: a gradient of the entropy needs the walk. Which tiles are left out is
    # known when all are summed, too late for a direction: a second walk over the others costs less
    if not head_trains and "entropy" not in outputs and grad_tol == 0:
        return Keep.direction()

    return columns_to_keep(backend, hidden, weight, n_rows, dtype, stash_bytes, grad_tol)


def columns_to_keep(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    n_rows: int,
    dtype: torch.dtype,
    stash_bytes: int | str,
    grad_tol: float = 0.0,
) -> Keep:
    """Whole blocks of columns, as many as fit the budget."""
    n_columns, width = weight.shape
    budget = stash_budget(hidden.device, n_rows, (n_columns, width), stash_bytes)
    per_column = n_rows * backend.stash_dtype(dtype, hidden.device).itemsize
    everything = -(-weight.shape[0] // STASH_MULTIPLE) * STASH_MULTIPLE
    columns = everything if per_column == 0 else budget // per_column
    return Keep.columns(min(columns // STASH_MULTIPLE * STASH_MULTIPLE, everything), grad_tol)


def stash_budget(device: torch.device, n_rows: int, head: tuple[int, int], stash_bytes: int | str) -> int:
    """Bytes of the stash for N scored rows and a head [V, H]; ValueError as in `check_stash_bytes`."""
    check_stash_bytes(stash_bytes)
    if isinstance(stash_bytes, str):
        return automatic_stash_bytes(n_rows, *head, total_memory(device))
    return stash_bytes


def automatic_stash_bytes(n_rows: int, n_columns: int, width: int, memory: int) -> int:
    """What `stash_bytes="auto"` allows for N rows, a head [V, H] and a device with `memory` bytes."""
    return min(2 * n_rows * n_columns, 4 * n_columns * width, memory // 8)


def check_stash_bytes(stash_bytes: int | str) -> None:
    """ValueError if it is neither "auto" nor a number of bytes."""
    if stash_bytes == "auto":
        return
    if not isinstance(stash_bytes, int) or isinstance(stash_bytes, bool) or stash_bytes < 0:
        raise ValueError(f'stash_bytes: was {stash_bytes!r}, must be "auto" or a number of bytes, at least 0')


def check_grad_tol(grad_tol: float, relative: bool) -> None:
    """ValueError unless it is a number from 0 to below 1, and `relative` a bool."""
    if isinstance(grad_tol, bool) or not isinstance(grad_tol, Real) or not 0 <= grad_tol < 1:
        raise ValueError(f"grad_tol: was {grad_tol!r}, must be a number of at least 0 and below 1")
    if not isinstance(relative, bool):
        raise ValueError(f"grad_tol_relative: was {relative!r}, must be True or False")


def total_memory(device: torch.device) -> int:
    """Total memory of `device` in bytes; not the free memory, so that a repeated run gives the same bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return HOST_MEMORY


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    outputs: Sequence[str],
    rows: ScoredRows | None,
    ref_hidden: Tensor | None,
    lora_b: Tensor | None = None,
) -> torch.dtype:
    """Raise ValueError for shapes, dtypes or devices that do not match; return the dtype operands are rounded to."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden: was of shape {list(hidden.shape)}, must be [N, H]")
    n_rows, width = hidden.shape
    if lora_b is not None and weight.dim() == 2:
        width -= _check_lora(lora_b, hidden, weight)
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight: was of shape {list(weight.shape)}, must be [V, {width}], hidden's H")
    if weight.shape[0] == 0:
        raise ValueError("weight: was of shape [0, H], must have at least one row (V >= 1)")

    if targets.shape != (n_rows,) or targets.dtype != torch.int64:
        raise ValueError(f"targets: was {_describe(targets)}, must be int64 of shape [{n_rows}]")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: was of shape {list(bias.shape)}, must be [{weight.shape[0]}], weight's V")
    if rows is not None:
        check_rows(rows, hidden)
    check_outputs(outputs)

    # the reference's rows go through the same products, so they must look the same
    if ref_hidden is not None and (ref_hidden.shape, ref_hidden.dtype) != (hidden.shape, hidden.dtype):
        raise ValueError(f"ref_hidden: was {_describe(ref_hidden)}, must be {_describe(hidden)} as hidden is")
    others = {"ref_hidden": ref_hidden, "weight": weight, "targets": targets, "bias": bias, "lora_b": lora_b}
    others["rows"] = None if rows is None else rows.index
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: was on {tensor.device}, must be on {hidden.device} as hidden is")
    return _check_dtypes(hidden, weight, bias)


def check_rows(rows: ScoredRows, hidden: Tensor) -> None:
    """Its values are checked on the CPU only: on CUDA that would synchronise."""
    if not (rows.index.dim() == 1 and rows.index.dtype == torch.int64):
        raise ValueError(f"rows: its index was {_describe(rows.index)}, must be int64 of shape [N_scored]")
    if not (rows.index.device.type == hidden.device.type == "cpu") or torch.compiler.is_compiling():
        return

    if bool((rows.index[1:] <= rows.index[:-1]).any()):
        raise ValueError("rows: its index was not ascending, must hold each scored row once, in ascending order")
    n_rows = hidden.shape[0]
    outside = (rows.index < 0) | (rows.index >= n_rows)
    if bool(outside.any()):
        wrong = rows.index[outside][0].item()
        raise ValueError(f"rows: its index held {wrong}, must be in [0, {n_rows}), the rows of hidden")


def _check_lora(lora_b: Tensor, hidden: Tensor, weight: Tensor) -> int:
    """The number of hidden's columns that belong to it."""
    rows = weight.shape[:1]
    if lora_b.dim() != 2 or lora_b.shape[:1] != rows or not 0 < lora_b.shape[1] <= hidden.shape[1]:
        raise ValueError(f"lora_b: was of shape {list(lora_b.shape)}, must be [{rows[0]}, r], weight's V and 0 < r < H")
    if lora_b.dtype != weight.dtype:
        raise ValueError(f"lora_b: was of dtype {lora_b.dtype}, must be {weight.dtype} as weight is")
    return lora_b.shape[1]


def check_outputs(outputs: Sequence[str]) -> None:
    """ValueError unless `outputs` is a sequence of names from EXTRAS."""
    if isinstance(outputs, str) or not set(outputs) <= set(EXTRAS):
        raise ValueError(f"outputs: was {outputs!r}, must be a sequence of names from {EXTRAS}")


def _check_dtypes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden: was of dtype {hidden.dtype}, must be one of {', '.join(map(str, DTYPES))}")
    # autocast rounds both operands; without it they must have one dtype, as in torch's own products
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(kind)
        if weight.dtype not in DTYPES:
            raise ValueError(f"weight: was of dtype {weight.dtype}, must be one of {', '.join(map(str, DTYPES))}")
    else:
        dtype = hidden.dtype
        if weight.dtype != dtype:
            raise ValueError(f"weight: was of dtype {weight.dtype}, must be {dtype} as hidden is (or use autocast)")
    if bias is not None and bias.dtype not in (weight.dtype, torch.float32):
        raise ValueError(f"bias: was of dtype {bias.dtype}, must be {weight.dtype} as weight is, or torch.float32")
    return dtype


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
