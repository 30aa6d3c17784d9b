"""Which backend `auto` takes, in words: for `sdpo check`, the first line of a run, its manifest and `sdpo info`."""

from __future__ import annotations

from importlib.metadata import version

import torch

from sdpo_kernels.backends import Backend, Request, auto_choice
from sdpo_kernels.head import Head

CHIPS = {"avx512bf16": "AVX-512-BF16", "avx512": "AVX-512", "avx2": "AVX2", "base": "base instructions"}


def chip() -> str:
    """The instructions that the native CPU kernels use on this machine; RuntimeError if their library is not loaded."""
    return CHIPS[torch.ops.sdpo_native.cpu_chip()]


def describe_auto(device: torch.device, dtype: torch.dtype) -> str:
    """What `auto` takes for products of `dtype` on `device`: "native, AVX-512-BF16", or "eager" with the reason.

    A backend that would raise gives "none" and its error. SDPO_BACKEND counts, as in a call.
    """
    try:
        backend, skipped = auto_choice(Request(device, dtype, dtype, Head(), ()))
    except (ValueError, RuntimeError) as error:
        return f"none: {str(error).removeprefix('backend: ')}"
    reasons = "".join(f"; {name} skipped: {reason}" for name, reason in skipped)
    return f"{backend.name}{_detail(backend, device)}{reasons}"


def _detail(backend: Backend, device: torch.device) -> str:
    if backend.name == "native":
        return ", CUDA kernels" if device.type == "cuda" else f", {chip()}"
    return f" {version('triton')}" if backend.name == "triton" else ""
