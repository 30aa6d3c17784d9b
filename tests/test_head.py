"""The head's options: the transform, its slope, and errors."""

from __future__ import annotations

import math

import pytest
import torch

from sdpo_kernels.head import Head, product_dtype
from tests.reference import error, logits_of

HEADS = [
    Head(),
    Head(logit_scale=0.0625),
    Head(logit_scale=-2.0, temperature=0.7),
    Head(softcap=3.0),
    Head(logit_scale=0.5, softcap=30.0, temperature=1.7),
]


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_transform_and_slope_agree_with_float64_autograd(head):
    a = torch.linspace(-40, 40, 161)
    exact = a.double().requires_grad_()
    options = {"temperature": head.temperature, "logit_scale": head.logit_scale, "softcap": head.softcap}
    truth = logits_of(exact.unsqueeze(1), torch.ones(1, 1, dtype=torch.float64), **options).squeeze(1)
    truth.sum().backward()
    z = head.logits_(a.clone())
    slope = head.times_slope_(torch.ones_like(a), z.clone())
    assert error(z, truth.detach()) <= 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    # 1 − tanh² is read back from the rounded z, so it is off by roundings of 1, not of itself
    assert error(slope, exact.grad) <= 8 * torch.finfo(torch.float32).eps * abs(head.logit_scale / head.temperature)


def test_both_work_in_place():
    head = Head(softcap=3.0, temperature=2.0)
    a, grad = torch.randn(5), torch.randn(5)
    assert head.logits_(a).data_ptr() == a.data_ptr()
    assert head.times_slope_(grad, a).data_ptr() == grad.data_ptr()


def test_a_saturated_softcap_has_slope_0_and_nan_stays_nan():
    head = Head(softcap=5.0)
    z = head.logits_(torch.tensor([1e9, -1e9, torch.inf, torch.nan]))
    assert z[:3].tolist() == [5.0, -5.0, 5.0]
    slope = head.times_slope_(torch.ones(4), z)
    assert slope[:3].tolist() == [0.0, 0.0, 0.0]
    assert slope[3].isnan()


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("temperature", 0.0, "above 0"),
        ("temperature", -1.0, "above 0"),
        ("temperature", math.inf, "finite"),
        ("temperature", math.nan, "finite"),
        ("temperature", "hot", "finite"),
        ("logit_scale", 0.0, "other than 0"),
        ("logit_scale", math.inf, "finite"),
        ("logit_scale", None, "finite"),
        ("softcap", 0.0, "above 0, or None"),
        ("softcap", -30.0, "above 0"),
        ("softcap", math.nan, "finite"),
    ],
)
def test_errors_name_the_option_its_value_and_what_it_should_be(option, value, wanted):
    with pytest.raises(ValueError, match=f"^{option}: was {value!r}, must be .*{wanted}"):
        Head(**{option: value})


def test_product_dtype():
    assert product_dtype(torch.float64) == torch.float64
    assert {product_dtype(d) for d in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}
