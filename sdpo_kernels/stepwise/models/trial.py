"""What training would need later, tried before it starts: loading, adapters, saving, Trainer's own parts, disk space.

    warnings = try_run(config, tokenizer)

The model is on the meta device, so its weights are not read; `sdpo check` and the start of `sdpo train` both do this.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging as transformers_logging

from sdpo_kernels.integrations.lm_head import find_head
from sdpo_kernels.integrations.router_loss import find_router_loss
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.disk import Space, check_space
from sdpo_kernels.stepwise.models.load import Loaded, add_adapter, load_error, pretrained
from sdpo_kernels.stepwise.models.quantized import check_adapted, check_quantization, quantization_warnings
from sdpo_kernels.stepwise.models.saving import copy_beside, keep_generation_config
from sdpo_kernels.stepwise.models.tensor_parallel import require_divisible
from sdpo_kernels.stepwise.record.model_cards import expo_card, model_card
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments


def try_run(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, model_config: Any, *, elsewhere: bool = False
) -> list[str]:
    """Try what a run does after its data is read, without weights; returns warnings.

    With `elsewhere` the run is planned for another machine: a local model may lack its weights, and a disk that is too
    small is a warning.

    1. Look for the library that `quantization` needs; a model that is stored quantised is refused.
    2. Build the model on the meta device, unquantised; its head must be one the fused kernels can use, and so must its
       router.
    3. Save its config, generation config, tokenizer, model card and the files beside it into a temporary folder.
    4. Add the adapter, if the run has one.
    5. For every stage make TrainingArguments, the integrations of report_to, the optimizer's class, the scheduler.
    6. Compare the estimated size of checkpoints and stages with the free disk space.

    UserError for whatever would stop the run at one of these.
    """
    check_quantization(config, model_config)
    require_divisible(config.tp_size, model_config)
    warnings = []
    has_files = not elsewhere or any(Path(config.model).glob("*.safetensors*"))
    if Path(config.model).is_dir() and not has_files:
        warnings.append(f"model: {config.model} has no weights; its config alone was checked")
    model = _on_meta(config, model_config, compares=has_files)
    try:
        find_head(model)
        find_router_loss(model)
    except ValueError as error:
        raise UserError(f"model: {config.model} cannot be trained: {error}") from error

    kept = keep_generation_config(model)
    if kept is not None:
        warnings.append(f"model: its generation config is saved unchanged, despite {kept}")
    warnings += quantization_warnings(config, model)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _try_saving(config, model, tokenizer, folder)
        loaded = Loaded(model, packed=False, by_sequence=False)
        if config.lora is not None:
            add_adapter(loaded, config.lora)
        if config.quantization is not None:
            check_adapted(loaded.model)

        spaces = []
        for stage in config.stages:
            args = training_arguments(config, stage, folder, folder)
            _try_trainer(f"stage {stage.name}: trainer", args, loaded.model)
            spaces.append(Space.of(config, loaded.model, args))

    largest = max(spaces, key=lambda space: space.checkpoint)
    try:
        warning = check_space(largest, Path(config.output_dir), config.tiers or len(config.stages))
    except UserError as error:
        if not elsewhere:
            raise
        warning = str(error)
    return warnings if warning is None else [*warnings, warning]


def _on_meta(config: RunConfig, model_config: Any, *, compares: bool = True) -> Any:
    """The run's model without weights. Of a local model the names and shapes of its weights are compared, too."""
    with _quiet():
        if compares and Path(config.model).is_dir():
            return pretrained(config.model, config, device_map="meta")

        # a hub model's weights are downloaded when training starts, and compared then
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(
                    model_config, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
                )
        except (ValueError, KeyError, ImportError) as error:
            raise UserError(f"model: {config.model} cannot be loaded: {load_error(error, config.model)}") from error


def _try_saving(config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write everything but weights; UserError, which names the file, if something cannot be saved."""
    record: dict[str, Any] = defaultdict(float) | {"name": "", "index": 1, "loss": "", "reference": "", "eval": None}
    model_folder = Path(config.model)
    steps: dict[str, Callable[[], Any]] = {
        "config.json": lambda: model.config.save_pretrained(folder),
        "generation_config.json": lambda: model.generation_config.save_pretrained(folder),
        "tokenizer_config.json, tokenizer.json or its templates": lambda: tokenizer.save_pretrained(folder),
        "files beside the model (templates, processors, code)": lambda: copy_beside(
            config.model, folder, code=config.trust_remote_code
        ),
        "model card": lambda: model_card(config, record).encode(),
        "model card of post.expo": lambda: expo_card(model_folder, model_folder, 0.5, (), is_adapter=False).encode(),
    }
    if not model.can_generate():
        del steps["generation_config.json"]

    for file, save in steps.items():
        try:
            save()
        except Exception as error:  # whatever the libraries raise, it would stop the run after training
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"model: {config.model}: {file} cannot be saved, which a finished stage needs: {reason}; correct it "
                "in the model's folder"
            ) from error


def _try_trainer(what: str, args: TrainingArguments, model: Any) -> None:
    """Make those parts of Trainer that need a library or settings of their own; UserError, for `what`, if one fails."""
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        raise UserError(f"{what}.report_to: {_first_line(error)}") from error

    # the name of the scheduler decides which of its options it needs
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
            num_warmup_steps=0,
            num_training_steps=100,
            scheduler_specific_kwargs=cast(Any, args.lr_scheduler_kwargs),
        )
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise UserError(f"{what}: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' report on loading, and its progress bar, silenced: errors are reported as errors."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
