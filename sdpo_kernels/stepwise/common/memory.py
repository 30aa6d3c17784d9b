"""Peak memory of this process: on the GPU, or resident."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_bytes() -> int:
    """Peak memory: allocated on the GPU since the last reset or, without CUDA, resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def reset_peak_memory() -> None:
    """Reset the peak of the GPU; the peak of resident memory cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
