"""The cases of `mismatch.py`, and what its tables call them; without torch, for `page.py`."""

from __future__ import annotations

from typing import Any

# a name, the case of rivals.py, the dtype of its operands
CASES = {
    "naive bf16": ("naive", "bfloat16"),
    "naive fp32": ("naive", "float32"),
    "trl": ("trl_fused_scored", "bfloat16"),
    "liger": ("liger_dpo_eager", "bfloat16"),
    "liger scaled": ("liger_scaled", "bfloat16"),
    "torch": ("linear_cross_entropy", "bfloat16"),
    "ours": ("ours", "bfloat16"),
    "ours without stash": ("ours_without_stash", "bfloat16"),
}
ABOUT = {
    "naive bf16": "logits in bf16",
    "naive fp32": "operands and logits in float32",
    "trl": "its fused head",
    "liger": "its fused DPO loss",
    "liger scaled": "its scaled cross-entropy",
    "torch": "F.linear_cross_entropy",
    "ours": "fused_linear_dpo",
    "ours without stash": "the same, stash_bytes=0",
}


def point_of(result: dict[str, Any]) -> str:
    """The peak in words, with the model's name where there is one."""
    return f"{result['real']} ({result['peak']:.0f})" if "real" in result else str(result["peak"])
