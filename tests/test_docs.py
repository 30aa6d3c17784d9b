"""Every example in a docstring of the kernels runs and gives the output it shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import sdpo_kernels
from sdpo_kernels import backends

KERNELS = ["diffusion", "dpo", "head", "logits", "logps", "logps_op", "losses", "rows", "token_weights"]
MODULES = [
    "sdpo_kernels",
    *(f"sdpo_kernels.{name}" for name in KERNELS),
    *(f"sdpo_kernels.backends.{module.name}" for module in pkgutil.iter_modules(backends.__path__)),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0  # doctest prints the actual output


@pytest.mark.parametrize(
    "name",
    [
        "linear_logps", "logits_logps", "fused_linear_dpo", "FusedLinearDPOLoss", "sample_mse", "diffusion_dpo",
        "paired_noise",
    ],
)  # fmt: skip
def test_every_entry_point_shows_its_use(name):
    examples = doctest.DocTestFinder(recurse=False).find(getattr(sdpo_kernels, name))
    assert any(test.examples for test in examples)


@pytest.mark.parametrize("name", sorted(set(sdpo_kernels.__all__) - {"__version__"}))
def test_every_public_name_is_documented(name):
    assert (getattr(sdpo_kernels, name).__doc__ or "").strip()
