"""As in vLLM 0.33.0; with $STUB_VLLM_DOES "old" without patterns, as in 0.10."""

import os
from dataclasses import dataclass, field


@dataclass
class PEFTHelper:
    r: int
    lora_alpha: int
    if os.environ.get("STUB_VLLM_DOES") != "old":
        rank_pattern: dict = field(default_factory=dict)
        alpha_pattern: dict = field(default_factory=dict)
