"""As in vLLM 0.33.0, where it is a msgspec.Struct with these fields first."""

from dataclasses import dataclass


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
