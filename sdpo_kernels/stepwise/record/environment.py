"""The machine and versions that a run's last bits depend on: recorded when it starts, compared when it resumes."""

from __future__ import annotations

import os
from importlib.metadata import version

import torch
import transformers

from sdpo_kernels.backends.describe import describe_auto
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.record.manifest import Manifest, Record
from sdpo_kernels.stepwise.settings.run_settings import RunConfig


def run_backend(config: RunConfig) -> str:
    """The backend that computes the run's log-probs, in words."""
    # without mixed precision the operands have the dtype of the weights
    trainer = config.trainer
    dtype = torch.bfloat16 if trainer.get("bf16") else torch.float16 if trainer.get("fp16") else None
    return describe_auto(torch.device(_device(config)), dtype or getattr(torch, config.dtype))


def _device(config: RunConfig) -> str:
    return "cuda" if torch.cuda.is_available() and not config.trainer.get("use_cpu") else "cpu"


def run_environment(config: RunConfig) -> Record:
    """What the bits of a run depend on, besides its config and data."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({} if config.quantization is None else {"bitsandbytes": version("bitsandbytes")}),
        "threads": torch.get_num_threads(),
        "device": _device(config),
        "backend": run_backend(config),
        "seed": int(config.trainer["seed"]),
        "world_size": ranks.world_size(),
        "host_cores": os.cpu_count(),
    }


def environment_warning(manifest: Manifest, now: Record) -> str | None:
    """The warning for a run that resumes in another environment; None if it is the same."""
    # manifests of older versions have neither
    before = {"world_size": 1, "backend": now["backend"]} | manifest.data["environment"]
    changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    if not changed:
        return None
    return (
        f"this machine differs from the one the run was started on ({', '.join(changed)}): "
        "the run resumes, but its last bits may differ from those of a run that was never stopped"
    )
