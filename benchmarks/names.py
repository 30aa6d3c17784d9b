"""What tables and pictures call the cases of `rivals.py` and `mismatch.py`."""

from __future__ import annotations

NAMES = {
    "gemms": "bare GEMMs (floor)",
    "gemms_fp32": "bare GEMMs in float32 (floor)",
    "naive": "naive PyTorch",
    "naive_fp32": "naive PyTorch, float32 head",
    "naive_compiled": "naive PyTorch, torch.compile",
    "linear_cross_entropy": "F.linear_cross_entropy",
    "linear_cross_entropy_chunked": "F.linear_cross_entropy, chunked",
    "trl_fused": "TRL",
    "trl_fused_scored": "TRL, scored rows alone",
    "trl_fused_metrics": "TRL with its metrics",
    "trl_patched": "TRL, patched by us",
    "trl_patched_metrics": "TRL with its metrics, patched by us",
    "liger_dpo": "Liger DPO, compiled",
    "liger_dpo_eager": "Liger DPO, eager",
    "liger_scaled": "Liger scaled cross-entropy",
    "liger_sm90": "Liger CuTe kernel",
    "liger_tp": "Liger CuTe library, tensor parallel",
    "cce": "Apple CCE",
    "quack": "QuACK",
    "ours": "ours",
    "ours_without_stash": "ours, no stash",
    "ours_eager": "ours in plain torch",
    "ours_native": "ours, CUDA kernels",
    "ours_native_without_stash": "ours, CUDA kernels, no stash",
    "ours_persistent": "ours, persistent kernel",
}


def name(case: str) -> str:
    """What a reader knows the case by."""
    return NAMES.get(case, case)
