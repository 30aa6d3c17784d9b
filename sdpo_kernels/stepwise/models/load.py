"""Loading the one resident model: fused head attached, dropout off, attention that keeps packed pairs apart."""

from __future__ import annotations

import gc
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sdpo_kernels.integrations.causal_lm import attach_fused_head, disable_dropout
from sdpo_kernels.integrations.packed_attention import use_packed_attention
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.settings.run_settings import LoraSettings, RunConfig

logger = logging.getLogger(__name__)

ADAPTER = "adapter"  # in a stage's folder: the LoRA adapter as trained, next to the merged weights


@dataclass
class Loaded:
    """A model ready to score or to train, and how to batch its pairs."""

    model: nn.Module
    packed: bool  # False: padded batches
    by_sequence: bool  # a sequence's score is the same to the bit whatever else is in the batch


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the run's model; UserError if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = _first_line(error)
        if Path(config.model).is_dir() and not (Path(config.model) / "tokenizer_config.json").exists():
            reason = "the folder has no tokenizer_config.json"
        raise UserError(f"model: no tokenizer can be loaded from {config.model}: {reason}") from error


def load_model(path: str, config: RunConfig, precision: Precision) -> Loaded:
    """Load `path` (a folder or hub name) in the run's dtype onto its device, ready to score and to train.

    1. Free the memory of models dropped before: a model is part of reference cycles.
    2. Load the weights. For a stage folder of a LoRA run these are the run's base and that stage's adapter.
    3. Switch dropout off and attach the fused head.
    4. Unless batches are padded, choose an attention that keeps packed pairs apart, and test it in the precision of
       scoring and training. A model that has none gets padded batches, with a warning.
    5. Put the adapter on.

    UserError if the model cannot be loaded or has no head the package can use. On several ranks each loads it whole.
    """
    model, adapter = _pretrained(path, config, precision.device)

    # Dropout off, so that the policy in training mode gives the log-probs its reference was scored with.
    disable_dropout(model)
    try:
        attach_fused_head(model)
    except ValueError as error:
        raise UserError(f"model: {path} cannot be trained: {error}") from error

    packed = config.batching == "packed"
    if packed:
        with precision.computing(model):
            reason = use_packed_attention(model)
        if reason is not None:
            logger.warning("batches are padded, in groups of similar length, instead of packed: %s", reason)
            packed = False

    # only the package's own attention computes each sequence by itself
    by_sequence = packed and model.config._attn_implementation == "sdpo_packed"
    return Loaded(model if adapter is None else _with_adapter(model, adapter), packed, by_sequence)


def load_generator(path: str, config: RunConfig, device: torch.device) -> Any:
    """The model in `path` for `generate`: with its own head, attention and cache, in eval mode."""
    model, adapter = _pretrained(path, config, device)
    model.config.use_cache = True
    return (model if adapter is None else _with_adapter(model, adapter)).eval()


def _pretrained(path: str, config: RunConfig, device: torch.device) -> tuple[Any, Path | None]:
    """The bare model and the folder of the adapter that belongs on it, if any."""
    release_memory()

    # The merged weights of a stage are not used: rounded to a bfloat16 base, what the stage has learned at a small
    # learning rate would be lost.
    adapter: Path | None = Path(path) / ADAPTER
    if config.lora is None or path == config.model or not (Path(path) / ADAPTER).is_dir():
        adapter = None

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path if adapter is None else config.model,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model: {path} cannot be loaded: {_first_line(error)}") from error
    return model.to(device), adapter


def _with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model: the adapter {adapter} cannot be loaded: {_first_line(error)}") from error


def weights_hash(model: nn.Module) -> str:
    """sha256 of every parameter and buffer, including names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def release_memory() -> None:
    """Free the memory of dropped models, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def add_adapter(loaded: Loaded, lora: LoraSettings) -> None:
    """Add a new LoRA adapter, which alone is trained; an adapter the model was loaded with is trained further."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(loaded.model, PeftModel):
        return

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works as well as an int
        lora_dropout=0.0,  # off, like the model's own (load_model)
        target_modules=targets,
    )
    try:
        loaded.model = get_peft_model(loaded.model, settings)
    except ValueError as error:
        raise UserError(f"lora: {_first_line(error)}") from error


def merge_adapter(adapter: Path, config: RunConfig) -> nn.Module:
    """The run's base model with a LoRA adapter merged into it, in float32 on the CPU."""
    from peft import PeftModel

    base: Any = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=torch.float32, use_safetensors=True, trust_remote_code=config.trust_remote_code
    )
    merged: Any = PeftModel.from_pretrained(base, str(adapter))
    return merged.merge_and_unload()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
