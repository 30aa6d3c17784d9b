"""A head that DeepSpeed ZeRO-3 has partitioned, with stand-ins for its hooks; the real ones: test_deepspeed.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdpo_kernels.integrations.causal_lm import attach_fused_head
from sdpo_kernels.integrations.lm_head import find_head
from tests.integrations.tiny_models import tiny_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TARGETS = torch.tensor([[-100, 4, 1, 5, -100, 2, 6, -100]])


class Partitioned:
    """Leaves a module's weight empty except in its forward and from the start of its backward on, as ZeRO-3 does."""

    def __init__(self, module: Any) -> None:
        self.weight, self.whole = module.weight, module.weight.data
        self.weight.ds_shape = self.whole.shape
        module.ds_id = 0
        self.release()
        module.register_forward_pre_hook(lambda *_: self.gather())
        module.register_forward_hook(self.after_forward)

    def gather(self) -> None:
        self.weight.data = self.whole

    def release(self) -> None:
        self.weight.data = self.whole.new_empty(0)

    def after_forward(self, _module: nn.Module, _args: Any, out: Any) -> None:
        self.release()
        out.logps.register_hook(lambda gradient: self.gather())


def trained(model: Any) -> tuple[Tensor, list[Tensor]]:
    logps = model(input_ids=IDS, logp_targets=TARGETS).logps
    logps.sum().backward()
    return logps.detach(), [weight.grad for weight in model.parameters()]


def test_it_is_gathered_for_its_forward_and_again_for_its_backward():
    model, other = (attach_fused_head(tiny_model("llama")) for _ in range(2))
    other.load_state_dict(model.state_dict())
    expected, gradients = trained(other)

    weight = Partitioned(model.lm_head)
    logps = model(input_ids=IDS, logp_targets=TARGETS).logps
    assert weight.weight.numel() == 0
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(logps, expected)
    logps.sum().backward()
    assert all(torch.equal(weight.grad, other) for weight, other in zip(model.parameters(), gradients, strict=True))


def test_an_error_inside_leaves_the_head_its_own_forward():
    model = attach_fused_head(tiny_model("llama"))
    Partitioned(model.lm_head)
    with pytest.raises(ValueError, match=r"^outputs"):
        model(input_ids=IDS, logp_targets=TARGETS, logp_outputs=("logits",))
    assert "forward" not in vars(model.lm_head)


def test_without_the_engine_s_hooks_it_is_refused():
    model = tiny_model("llama")
    Partitioned(model.lm_head)
    del model.lm_head.ds_id
    with pytest.raises(ValueError, match="DeepSpeed ZeRO-3 has partitioned"):
        find_head(model)
