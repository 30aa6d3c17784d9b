"""Settings that contradict tensor parallelism (`tp_size`)."""

from __future__ import annotations

from typing import Any


def parallel_mistakes(config: Any) -> list[tuple[str, str]]:
    """(setting, mistake) of what a model that is divided over processes cannot do."""
    settings = [("trainer", config.trainer), *((f"stages.{i}.trainer", s.trainer) for i, s in enumerate(config.stages))]
    mistakes = []
    if config.grad_tol and (config.tp_size > 1 or any(trainer.get("fsdp") for _, trainer in settings)):
        text = f"was {config.grad_tol}, must be 0 with tp_size or trainer.fsdp: a divided head leaves nothing out"
        mistakes.append(("grad_tol", text))
    if config.tp_size == 1:
        return mistakes

    why = f"with tp_size: {config.tp_size}, must be"
    if config.lora is not None:
        mistakes.append(
            ("lora", f"was set {why} left out: PEFT's adapters are not sharded with the layers they change")
        )
    if config.reference == "ema":
        mistakes.append(("reference", f"was 'ema' {why} another: the moving average is of whole weights"))
    if config.samples:
        mistakes.append(("samples", f"was {config.samples} {why} 0: one process generates, and the model is on all"))

    for section, trainer in settings:
        for name in ("fsdp", "deepspeed", "torch_compile"):
            if trainer.get(name):
                mistakes.append((f"{section}.{name}", f"was set {why} left out"))
    return mistakes
