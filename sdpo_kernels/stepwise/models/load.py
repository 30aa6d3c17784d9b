"""Loading the one resident model: fused head attached, dropout off, attention that keeps packed pairs apart."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.pytorch_utils import Conv1D

from sdpo_kernels.backends.grad_tol import TILE
from sdpo_kernels.integrations.causal_lm import attach_fused_head, disable_dropout
from sdpo_kernels.integrations.packed_attention import use_packed_attention, use_shared_prefixes
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.model_names import load_failure
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.models.quantized import compute_alike, loading_options
from sdpo_kernels.stepwise.models.saving import is_tied, keep_generation_config, say_untied, says_tied
from sdpo_kernels.stepwise.models.tensor_parallel import distributed, whole
from sdpo_kernels.stepwise.models.weights import ADAPTER
from sdpo_kernels.stepwise.settings.lora import LoraSettings
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A model ready to score or to train, and how to batch its pairs."""

    model: nn.Module
    packed: bool  # False: padded batches
    by_sequence: bool  # a pair's score is the same to the bit whatever else is in the batch
    shared: bool = False  # packed, and what both answers of a pair begin with goes through the model once
    hashed: Callable[[], str] | None = None  # `weights_hash` of a cut model

    def hash(self) -> str:
        """The hash of its weights as they were loaded."""
        return weights_hash(self.model) if self.hashed is None else self.hashed()


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the run's model; UserError if it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = load_failure(config.model, "tokenizer", error)
        if Path(config.model).is_dir() and not (Path(config.model) / "tokenizer_config.json").exists():
            reason = f"no tokenizer can be loaded from {config.model}: the folder has no tokenizer_config.json"
        raise UserError(f"model: {reason}") from error


def load_model(path: str, config: RunConfig, precision: Precision) -> Loaded:
    """Load `path` (a folder or hub name) in the run's dtype onto its device, ready to score and to train.

    1. Free the memory of models dropped before: a model is part of reference cycles.
    2. Load the weights, quantised if the run says so. For a stage folder of a LoRA run these are the run's base and
       that stage's adapter.
    3. Switch dropout off and attach the fused head.
    4. Unless batches are padded, choose an attention that keeps packed pairs apart, and test it in the precision of
       scoring and training. A model that has none gets padded batches, with a warning.
    5. See whether that attention lets two answers share their prompt.
    6. Put the adapter on.

    UserError if the model cannot be loaded or has no head the package can use. On several ranks each loads it whole.
    """
    model, adapter = _pretrained(path, config, precision.device)
    ready_head(model, path, config)
    loaded = Loaded(model, packed=False, by_sequence=False)
    choose_attention(loaded, config, precision)
    if adapter is not None:
        loaded.model = with_adapter(model, adapter)
    return loaded


def ready_head(model: Any, path: str, config: RunConfig) -> None:
    """Switch dropout off and attach the fused head; UserError if the model has none that can be used."""
    # Dropout off, so that the policy in training mode gives the log-probs its reference was scored with.
    disable_dropout(model)
    try:
        attach_fused_head(model, grad_tol=config.grad_tol, grad_tol_relative=config.grad_tol_relative)
    except ValueError as error:
        raise UserError(f"model: {path} cannot be trained: {error}") from error

    if config.grad_tol and (columns := model.config.get_text_config().vocab_size) <= TILE:
        text = "grad_tol: %g changes nothing: it leaves out blocks of %d vocabulary entries, and the vocabulary has %d"
        logger.warning(text, config.grad_tol, TILE, columns)


def choose_attention(loaded: Loaded, config: RunConfig, precision: Precision) -> None:
    """Choose how the model's pairs are batched, by what its attention can do. Of a cut model every rank calls it."""
    model: Any = loaded.model
    if config.batching == "packed":
        with precision.computing(model):
            reason = use_packed_attention(model, only=config.attn_implementation)
        if reason is not None:
            logger.warning("batches are padded, in groups of similar length, instead of packed: %s", reason)
        loaded.packed = reason is None

    if loaded.packed and config.prefix_sharing == "auto":
        with precision.computing(model):
            reason = use_shared_prefixes(model, only=config.attn_implementation)
        if reason is not None:
            logger.warning("prompts go through the model twice, once for each answer: %s", reason)
        loaded.shared = reason is None

    # only the package's own attention computes each sequence by itself, and on CUDA not even that: kernels and products
    # are chosen by the size of the batch
    own = model.config._attn_implementation == "sdpo_packed"
    loaded.by_sequence = loaded.packed and own and model.device.type == "cpu"


def load_generator(path: str, config: RunConfig, device: torch.device) -> Any:
    """The model in `path` for `generate`: with its own head, attention and cache, in eval mode."""
    model, adapter = _pretrained(path, config, device)
    model.config.use_cache = True
    return (model if adapter is None else with_adapter(model, adapter)).eval()


def _pretrained(path: str, config: RunConfig, device: torch.device) -> tuple[Any, Path | None]:
    """The bare model and the folder of the adapter that belongs on it, if any."""
    release_memory()

    adapter = adapter_of(path, config)
    options = loading_options(config, device) | distributed()
    model = pretrained(path, config, path if adapter is None else config.model, **options)
    keep_generation_config(model)
    if config.quantization is None:
        return model.to(device), adapter
    compute_alike(model)
    return model, adapter


def adapter_of(path: str, config: RunConfig) -> Path | None:
    """The folder of the adapter that the model in `path` is the run's base with; None if it has weights of its own."""
    # The merged weights of a stage are not used: rounded to a bfloat16 base, what the stage has learned at a small
    # learning rate would be lost.
    folder = Path(path) / ADAPTER
    return None if config.lora is None or path == config.model or not folder.is_dir() else folder


def pretrained(path: str, config: RunConfig, source: str | None = None, **options: Any) -> Any:
    """The causal language model in `source` (by default `path`), in the run's dtype; `options` are transformers' own.

    UserError, which names `path`: it cannot be loaded, or weights of the model are missing in it. transformers would
    give those random values.
    """
    source = source or path
    options = model_options(config) | options

    # with ZeRO-3 transformers would partition the model as it loads; its references are scored first
    unset_hf_deepspeed_config()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **options
        )
    except LOADING_ERRORS as error:
        raise failed(path, source, error) from error
    return checked(path, source, *loaded)


LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def model_options(config: RunConfig) -> dict[str, Any]:
    """How transformers loads the run's models."""
    options = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return options


def failed(path: str, source: str, error: BaseException) -> UserError:
    """What the user is told about one of LOADING_ERRORS."""
    if isinstance(error, OSError) and not os.path.isdir(source):
        return UserError(f"model: {load_failure(source, 'model', error)}")
    return UserError(f"model: {path} cannot be loaded: {load_error(error, source)}")


def checked(path: str, source: str, model: Any, found: dict[str, Any]) -> Any:
    """The model that transformers has loaded, with what it `found`; UserError if weights are missing."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"model: {path} cannot be loaded: {len(missing)} of the weights of a {type(model).__name__} are missing in "
            f"it, first {missing[0]}; is it another kind of model ({_architectures(source)})?"
        )

    # transformers ties nothing if the weights have a head of their own, whatever the config says; other software may
    if says_tied(model.config) and not is_tied(model):
        say_untied(model.config)
    return model


def load_error(error: BaseException, source: str) -> str:
    """Why a model cannot be loaded, in one line."""
    text = _first_line(error)
    if text.startswith("Unrecognized configuration class"):
        return f"transformers has no causal language model class for {_architectures(source)}"
    return text


def _architectures(source: str) -> str:
    """The architectures that the model's config names; its type if it names none."""
    found = PretrainedConfig.get_config_dict(source)[0]
    return ", ".join(found.get("architectures") or [str(found.get("model_type"))])


def with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    """The model with the adapter in a folder on it, ready to be trained further."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model: the adapter {adapter} cannot be loaded: {_first_line(error)}") from error


def weights_hash(model: nn.Module) -> str:
    """sha256 of every parameter and buffer, including names, dtypes and shapes; of a sharded model on all ranks."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat: Any = whole(tensor).detach().cpu().contiguous().reshape(-1)
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

    _require_targets(loaded.model, lora)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    try:
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works as well as an int
            lora_dropout=0.0,  # off, like the model's own (load_model)
            target_modules=targets,
            **lora.more,
        )
        loaded.model = get_peft_model(loaded.model, settings)
    except (ValueError, TypeError, NotImplementedError, KeyError) as error:
        raise UserError(f"lora: {' '.join(str(error).split())} ({_targets(loaded.model)})") from error


def _require_targets(model: nn.Module, lora: LoraSettings) -> None:
    """UserError for a name in `target_modules` that no module has; PEFT ignores it if another name has one."""
    if isinstance(lora.target_modules, str):
        return
    names = [f".{name}" for name, _ in model.named_modules()]
    for target in lora.target_modules:
        if not any(name.endswith(f".{target}") for name in names):
            raise UserError(f"lora.target_modules: no module of this model is named {target!r} ({_targets(model)})")


def _targets(model: nn.Module) -> str:
    """The names of the model's modules that can have an adapter."""
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))
    }
    return f"it has {', '.join(sorted(names))}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
