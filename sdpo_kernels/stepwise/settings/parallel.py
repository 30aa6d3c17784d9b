"""Settings that contradict tensor parallelism (`tp_size`)."""

from __future__ import annotations

from typing import Any


def parallel_mistakes(config: Any) -> list[tuple[str, str]]:
    """(setting, mistake) of what a tensor-parallel model cannot do; none with tp_size 1."""
    if config.tp_size == 1:
        return []
    why = f"with tp_size: {config.tp_size}, must be"
    mistakes = []
    if config.lora is not None:
        mistakes.append(
            ("lora", f"was set {why} left out: PEFT's adapters are not sharded with the layers they change")
        )
    if config.reference == "ema":
        mistakes.append(("reference", f"was 'ema' {why} another: the moving average is of whole weights"))
    if config.samples:
        mistakes.append(("samples", f"was {config.samples} {why} 0: one process generates, and the model is on all"))

    settings = [("trainer", config.trainer), *((f"stages.{i}.trainer", s.trainer) for i, s in enumerate(config.stages))]
    for section, trainer in settings:
        for name in ("fsdp", "deepspeed", "torch_compile"):
            if trainer.get(name):
                mistakes.append((f"{section}.{name}", f"was set {why} left out"))
    return mistakes
