"""Matrix products that are summed and returned in float32, whatever the session's settings are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALVES = ("bf16", "fp16")

_lock = threading.Lock()
_inside = 0  # how many calls need full precision now; the settings are process-wide
_before: _Settings | None = None  # the settings that the first of them found


class _Settings(NamedTuple):
    cuda: str  # of float32 matmul there
    cpu: str
    both: str | None  # an older setting of both; None: not used, the newer ones are
    halves: tuple[tuple[bool, bool], ...]  # of each of HALVES: CUDA may sum its products in it, and in parts
    fp16_sums: bool  # CUDA may sum products of float16 in float16 throughout


@contextmanager
def full(device: torch.device) -> Iterator[None]:
    """No autocast, TF32, or sums in bf16 or fp16 inside; the session's settings are restored afterwards.

    Calls may overlap, as in autograd's threads for several devices: the last one to leave restores the settings.
    """
    global _inside
    # only the first call saves and changes the settings, and only the last one restores them
    with _lock:
        if _inside == 0:
            _begin()
        _inside += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _end()


def _matmuls() -> tuple[Any, Any]:
    backends: Any = torch.backends  # its stubs lack mkldnn.matmul
    return backends.cuda.matmul, backends.mkldnn.matmul


def _begin() -> None:
    global _before
    cuda, cpu = _matmuls()
    _before = _Settings(
        cuda.fp32_precision, cpu.fp32_precision, _older_setting(), tuple(_reduced(half) for half in HALVES),
        cuda.allow_fp16_accumulation,
    )  # fmt: skip
    try:
        # where the older setting says otherwise than the newer ones, TunableOp raises
        if _before.both not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")

        # "none": nothing is set, which is full precision, too; leaving it alone keeps it inherited
        for matmul in (cuda, cpu):
            if matmul.fp32_precision not in ("ieee", "none"):
                matmul.fp32_precision = "ieee"
        for half, (_, split_k) in zip(HALVES, _before.halves, strict=True):
            _reduce(half, False, split_k)
        if _before.fp16_sums:
            cuda.allow_fp16_accumulation = False
    except BaseException:
        _end()
        raise


def _reduced(half: str) -> tuple[bool, bool]:
    """Whether products of `half` may be summed in it, and whether in parts (split-K)."""
    cuda, _ = _matmuls()
    name = f"allow_{half}_reduced_precision_reduction"
    # torch 2.10 has the first flag alone
    return getattr(cuda, name), getattr(cuda, f"{name}_split_k", True)


def _reduce(half: str, reduced: bool, split_k: bool) -> None:
    if _reduced(half) != (reduced, split_k):
        cuda, _ = _matmuls()
        setattr(cuda, f"allow_{half}_reduced_precision_reduction", reduced if split_k else (reduced, False))


def _older_setting() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer settings say otherwise
        return None


def _end() -> None:
    global _before
    before, _before = _before, None
    assert before is not None
    if before.both not in (None, "highest"):
        torch.set_float32_matmul_precision(before.both)

    # the older setting has changed these, too
    cuda, cpu = _matmuls()
    for matmul, precision in ((cuda, before.cuda), (cpu, before.cpu)):
        if matmul.fp32_precision != precision:
            matmul.fp32_precision = "none"  # if it was inherited, it must be inherited again
            if matmul.fp32_precision != precision:
                matmul.fp32_precision = precision
    for half, setting in zip(HALVES, before.halves, strict=True):
        _reduce(half, *setting)
    if cuda.allow_fp16_accumulation != before.fp16_sums:
        cuda.allow_fp16_accumulation = before.fp16_sums


def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` multiplies bfloat16 or float16 operands as they are and sums the products in float32."""
    if dtype not in (torch.bfloat16, torch.float16) or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 for float64): operands of one dtype."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(a, b)
    if multiplies(a.device, a.dtype):
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
