"""The attention that a model is switched to for packed rows; alone in its process and last, since on CUDA it compiles
attention kernels that others wrote."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.common import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_on_a_device(dtype):
    pytest.importorskip("transformers")
    from sdpo_kernels.integrations.causal_lm import attach_fused_head, check_head
    from sdpo_kernels.integrations.packed_attention import use_packed_attention
    from tests.integrations.tiny_models import tiny_model

    model = attach_fused_head(tiny_model("llama").to(DEVICE, dtype))
    assert use_packed_attention(model) is None
    assert check_head(model, torch.arange(3, 40, device=DEVICE)) < 1
