"""The fused head's settings that every adapter's `patch` takes, checked when it is called: models come later."""

from __future__ import annotations

from typing import Any

from sdpo_kernels.backends import get_backend
from sdpo_kernels.logps import check_grad_tol, check_stash_bytes


def checked_settings(backend: str, stash_bytes: int | str, grad_tol: float, grad_tol_relative: bool) -> dict[str, Any]:
    """The settings as keywords of `attach_fused_head`.

    Raises:
        ValueError: an unknown backend, stash_bytes that is neither "auto" nor at least 0, a grad_tol outside [0, 1), or
            a grad_tol_relative that is no bool.
    """
    if backend != "auto":
        get_backend(backend)
    check_stash_bytes(stash_bytes)
    check_grad_tol(grad_tol, grad_tol_relative)
    return {
        "backend": backend,
        "stash_bytes": stash_bytes,
        "grad_tol": grad_tol,
        "grad_tol_relative": grad_tol_relative,
    }
