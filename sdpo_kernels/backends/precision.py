"""Matrix products that are summed and returned in float32, whatever the session's settings are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_lock = threading.Lock()
_inside: dict[str, int] = {}  # how many calls need full precision now; the settings are process-wide
_before: dict[str, tuple[str, bool, bool]] = {}  # the settings that the first of them found


@contextmanager
def full(device: torch.device) -> Iterator[None]:
    """No autocast, TF32, bf16 shortcuts or bf16 split-K sums inside; the session's settings are restored afterwards.

    Calls may overlap, as in autograd's threads for several devices: the last one to leave restores the settings.
    """
    # only the first call saves and changes the settings, and only the last one restores them
    kind = "cuda" if device.type == "cuda" else "cpu"
    with _lock:
        _inside[kind] = _inside.get(kind, 0) + 1
        if _inside[kind] == 1:
            _begin(kind)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside[kind] -= 1
            if _inside[kind] == 0:
                _end(kind)


def _setting(kind: str) -> Any:
    backends: Any = torch.backends  # its stubs lack mkldnn.matmul
    return backends.cuda.matmul if kind == "cuda" else backends.mkldnn.matmul


def _begin(kind: str) -> None:
    setting, cuda = _setting(kind), torch.backends.cuda.matmul
    # torch 2.10 has one flag for reduced sums; later versions have a second one that allows split-K at all
    split_k = getattr(cuda, "allow_bf16_reduced_precision_reduction_split_k", True)

    _before[kind] = (setting.fp32_precision, cuda.allow_bf16_reduced_precision_reduction, split_k)

    # "none": nothing is set, which is full precision, too; leaving it alone keeps it inherited
    if setting.fp32_precision not in ("ieee", "none"):
        setting.fp32_precision = "ieee"
    if kind == "cuda":
        cuda.allow_bf16_reduced_precision_reduction = False if split_k else (False, False)


def _end(kind: str) -> None:
    setting, cuda = _setting(kind), torch.backends.cuda.matmul
    fp32, reduced, split_k = _before.pop(kind)

    if setting.fp32_precision != fp32:
        setting.fp32_precision = "none"  # if it was inherited, it must be inherited again
        if setting.fp32_precision != fp32:
            setting.fp32_precision = fp32
    if kind == "cuda":
        cuda.allow_bf16_reduced_precision_reduction = reduced if split_k else (reduced, False)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 for float64): operands bfloat16 or float32."""
    if a.dtype != torch.bfloat16:
        return torch.mm(a, b)
    if a.is_cuda and torch.cuda.get_device_capability(a.device)[0] >= 8:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, summed in float32 and rounded once to out's dtype."""
    if a.dtype == out.dtype and (a.is_cuda or a.dtype != torch.bfloat16):
        torch.mm(a, b, out=out)
    else:
        out.copy_(matmul(a, b))


def vector_matmul(v: Tensor, m: Tensor) -> Tensor:
    """v @ m in float32, `v` [N] float32, `m` [N, C] bfloat16 or float32."""
    if m.dtype != torch.bfloat16:
        return torch.mv(m.t(), v)

    # three bfloat16 numbers hold all 24 bits of a float32 one
    parts, rest = [], v
    for _ in range(3):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return matmul(torch.stack(parts), m).sum(0)
