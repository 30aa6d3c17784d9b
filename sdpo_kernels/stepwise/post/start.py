"""What a run asks for after its last stage, and whether it can be done: looked at before any training."""

from __future__ import annotations

from pathlib import Path

from sdpo_kernels.stepwise.config import RunConfig
from sdpo_kernels.stepwise.errors import UserError
from sdpo_kernels.stepwise.post.settings import ExpoSettings
from sdpo_kernels.stepwise.post.weights import Weights


def expo_settings(config: RunConfig) -> ExpoSettings | None:
    """What the run asks for; None for nothing."""
    return None if config.post is None else config.post.expo


def check_start(config: RunConfig) -> None:
    """UserError, before any training, where M_0 cannot be extrapolated from: a hub name, no safetensors, an adapter."""
    settings = expo_settings(config)
    if settings is None or (settings.start == "previous" and (config.tiers or len(config.stages)) > 1):
        return
    try:
        weights = Weights(Path(config.model))
    except UserError as error:
        raise UserError(f"post.expo: it reads the model's own files: {error}") from error
    if weights.is_adapter:
        raise UserError(f"post.expo: {config.model} is a LoRA adapter; merge it into its base first")
