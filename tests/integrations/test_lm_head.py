"""Heads that compute their logits in a way of their own: known, or refused."""

from __future__ import annotations

import pytest
from torch import nn
from torch.nn import functional as F

from sdpo_kernels.integrations.causal_lm import attach_fused_head, check_head
from sdpo_kernels.integrations.lm_head import find_head
from tests.integrations.tiny_models import sequences, tiny_model


class NormHead(nn.Module):
    """Baichuan's: a weight of the right shape, normalized first."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden):
        return F.linear(hidden, F.normalize(self.weight))


class DerivedHead(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden / 2)


class PlainHead(nn.Linear):
    """A class of its own that computes the same, as FSDP2 makes it."""


@pytest.mark.parametrize("kind", ["NormHead", "DerivedHead"])
def test_another_way_to_the_logits_is_refused(kind):
    model = tiny_model("llama")
    weight = model.lm_head.weight
    model.lm_head = NormHead(weight) if kind == "NormHead" else DerivedHead(*reversed(weight.shape), bias=False)
    with pytest.raises(
        ValueError, match=rf"its head was a {kind}, which computes logits in its own way, must be an nn"
    ):
        attach_fused_head(model)


def test_a_subclass_with_linears_own_forward_is_known():
    model = tiny_model("llama")
    model.lm_head.__class__ = PlainHead
    attach_fused_head(model)
    assert check_head(model, sequences(9)[0]) < 1e-5


def test_minicpm_divides_its_hidden_states():
    """As its own code does: lm_head(hidden / (hidden_size / dim_model_base))."""
    model = tiny_model("llama")
    model.config.dim_model_base = model.config.hidden_size // 4
    assert find_head(model).logit_scale == 0.25

    # transformers' MiniCPM3 has the same factor as a number of its config
    model.config.logits_scaling = 4.0
    assert find_head(model).logit_scale == 0.25

    del model.config.logits_scaling
    body = type(model.model)

    class MiniCPM(type(model)):  # type: ignore[misc]
        def forward(self, input_ids=None, **inputs):
            hidden = body.forward(self.model, input_ids=input_ids, **inputs).last_hidden_state
            return type("Out", (), {"logits": self.lm_head(hidden / 4), "aux_loss": None})()

    model.__class__ = MiniCPM
    attach_fused_head(model)
    assert check_head(model, sequences(9)[0]) < 1e-5
    model.config.dim_model_base = None
    with pytest.raises(ValueError, match="differ from its own logits"):
        check_head(model, sequences(9)[0])
