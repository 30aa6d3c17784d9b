"""docs/integrations.md: its code is Python, its names exist, and the recipes tried here work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).resolve().parents[2] / "docs/integrations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def block(word):
    (found,) = [text for text in BLOCKS if word in text]
    return found


@pytest.mark.parametrize("text", BLOCKS)
def test_code_blocks_are_python_and_their_names_exist(text):
    compile(text, "page", "exec")
    for line in re.findall(r"^ *(from sdpo_kernels.*|import sdpo_kernels.*)$", text, re.M):
        exec(line)


def test_log_probs_from_logits():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 9, generator=generator), torch.randint(9, (2, 5), generator=generator)
    labels[:, :2] = -100
    names = {"all_logits": logits, "labels": labels}
    exec(block("all_logps"), names)
    right = logits[:, 1:-1].log_softmax(-1).gather(-1, labels[:, 2:, None]).sum((1, 2))
    assert torch.allclose(names["all_logps"], right, atol=1e-5)
    assert names["all_logps"].shape == (2,)
