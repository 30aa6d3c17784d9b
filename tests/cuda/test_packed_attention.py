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


# every head with keys of its own; two that share keys, and windows; a softcap, too
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {"num_key_value_heads": 4}), ("mistral", {}), ("gemma2", {})]
)
def test_shared_prompts_on_a_device(family, settings, autocast):
    """FlashAttention serves branches, and FlexAttention with a softcap: the values and gradients of two sequences."""
    pytest.importorskip("transformers")
    from sdpo_kernels.integrations.attention_by_sequence import PACKED
    from sdpo_kernels.integrations.causal_lm import attach_fused_head
    from sdpo_kernels.integrations.packed_attention import use_packed_attention, use_shared_prefixes
    from tests.integrations.test_shared_prefix import packed_logps, shared_logps
    from tests.integrations.tiny_models import tiny_model

    dtype = torch.float32 if autocast else torch.bfloat16
    model = attach_fused_head(tiny_model(family, head_dim=64, **settings).to(DEVICE, dtype)).eval()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        assert use_packed_attention(model) is None
        reason = use_shared_prefixes(model)
        assert reason is None, reason
        assert model.config._attn_implementation == PACKED
        logps, unshared = shared_logps(model), packed_logps(model)

    torch.testing.assert_close(logps, unshared, rtol=2e-2, atol=2e-2)
    weights = torch.linspace(-1, 1, len(logps), device=DEVICE)
    gradients = [
        torch.autograd.grad((one * weights).sum(), model.model.embed_tokens.weight)[0] for one in (logps, unshared)
    ]
    error = float((gradients[0] - gradients[1]).float().norm() / gradients[1].float().norm())
    assert error < 0.05
