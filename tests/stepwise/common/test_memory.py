"""Peak memory of the process."""

import torch

from sdpo_kernels.stepwise.common.memory import peak_memory_bytes


def test_peak_memory_is_in_bytes():
    before = peak_memory_bytes()
    block = torch.ones(16_000_000)  # 64 MB, touched
    assert 1e7 < before <= peak_memory_bytes() < 1e12
    assert float(block[-1]) == 1
