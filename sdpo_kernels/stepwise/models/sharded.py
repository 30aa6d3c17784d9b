"""A model's weights on several ranks: a whole copy on each (DDP, ZeRO-2) or a shard on each (FSDP2, ZeRO-3).

Checks on the weights (finite, equal on all ranks), gathering them for saving, the setups that are refused, and how
FSDP2 is configured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from sdpo_kernels.integrations.cut_weights import is_cut
from sdpo_kernels.integrations.cut_weights import own as shard
from sdpo_kernels.integrations.lm_head import unwrap
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.cut import fsdp_policy, shard_head
from sdpo_kernels.stepwise.models.cut_saving import whole_trained
from sdpo_kernels.stepwise.models.precision import asks_for_deepspeed, asks_for_fsdp
from sdpo_kernels.stepwise.models.quantized import quantized_layers
from sdpo_kernels.stepwise.models.tensor_parallel import whole_weights
from sdpo_kernels.stepwise.models.zero import check_zero, optimizer_weights, partition, require_its_checkpoint


def own(weight: Tensor) -> Tensor:
    """The part of a weight that this rank holds."""
    part = partition(weight)
    return shard(weight) if part is None else part


def _is_shard(weight: Tensor) -> bool:
    return isinstance(weight, DTensor) or partition(weight) is not None


def not_finite(model: Any) -> list[str]:
    """Names of the parameters with NaN or infinite values in this rank's part."""
    return [name for name, weight in model.named_parameters() if not bool(torch.isfinite(own(weight)).all())]


def require_same(model: Any) -> None:
    """RuntimeError if weights that each rank holds whole are no longer the same on all ranks."""
    if ranks.world_size() == 1 or is_cut(model):
        return
    trained = [weight.detach() for weight in model.parameters() if weight.requires_grad and not _is_shard(weight)]
    sums = [float(weight.double().sum()) for weight in trained]
    if any(others != sums for others in ranks.exchange(sums)):
        raise RuntimeError("weights differ between ranks after training: gradients were not averaged over all of them")


def gathered(trainer: Any) -> dict[str, Tensor] | None:
    """The weights that are saved whole, in CPU memory on rank 0 (empty elsewhere); None: those of the model itself.

    Of a cut model these are an adapter's; other weights are written in pieces (`in_pieces`). Weights that transformers
    converts, as it does with the experts of a mixture, have to be converted back as a whole.
    """
    if trainer.is_deepspeed_enabled:
        model = trainer.accelerator.unwrap_model(trainer.model)
        adapter_only = hasattr(model, "get_base_model")  # it is saved in float32, whatever the base has
        return optimizer_weights(model, None if adapter_only else trainer.loaded_dtype, trained_only=adapter_only)
    if trainer.tensor_parallel:
        return whole_weights(trainer.accelerator.unwrap_model(trainer.model))
    if not trainer.is_fsdp_enabled:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    if in_pieces(model):
        return {}
    if is_cut(model) and hasattr(model, "peft_config"):
        return whole_trained(model)
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def in_pieces(model: Any) -> bool:
    """Whether a model's weights are written a piece at a time."""
    return is_cut(model) and not hasattr(model, "peft_config") and not getattr(model, "_weight_conversions", None)


def check_way(trainer: Any) -> None:
    """ValueError for distributed setups that would not train as asked, or whose references cannot be scored."""
    if asks_for_fsdp(trainer.args) and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp: needs several GPUs; without them accelerate silently trains plain DDP")
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("fsdp_config.version: was 1, must be 2")
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if getattr(plugin, "activation_checkpointing_offload", False):
        raise ValueError("fsdp: activation_checkpointing_offload: was true (by accelerate's launcher), must be false")
    kind = (trainer.args.fsdp_config or {}).get("state_dict_type", "SHARDED_STATE_DICT")
    if trainer.is_fsdp_enabled and kind != "SHARDED_STATE_DICT":
        raise ValueError(
            f"fsdp_config.state_dict_type: was {kind}, must be SHARDED_STATE_DICT or left out: each rank saves its own "
            "shards"
        )

    # accelerate's launcher can ask for it too, past the settings
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and any(quantized_layers(trainer.model)):
        raise ValueError(
            "fsdp or deepspeed: quantised weights are not sharded; with quantization use plain DDP, a whole base on "
            "each process"
        )

    check_zero(trainer)
    if trainer.following is None:
        return
    if trainer.is_deepspeed_enabled:
        raise ValueError("deepspeed: reference: ema averages weights that DeepSpeed keeps; use it with DDP or FSDP2")
    if trainer.is_fsdp_enabled and not is_cut(trainer.model):
        raise ValueError(
            "fsdp: reference: ema needs a model that is cut when it is loaded, which offload_params, "
            "cpu_ram_efficient_loading, ignored_modules, a device mesh and lora.use_dora prevent"
        )


def checkpoint_layers(model: Any) -> None:
    """Let the model's layers be computed again in the backward, as fsdp_config's activation_checkpointing asks.

    accelerate would wrap them, which renames their weights: PEFT finds none of an adapter then, and saves none.
    ValueError if the model cannot.
    """
    base: Any = unwrap(model)
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def check_checkpoint(checkpoint: Path, args: TrainingArguments) -> None:
    """UserError, which says what to do, for a checkpoint that a stage with these arguments cannot resume from."""
    if asks_for_deepspeed(args):
        require_its_checkpoint(checkpoint)
        return

    shards = checkpoint / f"{FSDP_MODEL_NAME}_0"
    if asks_for_fsdp(args) and not (shards / ".metadata").exists():
        raise UserError(
            f"trainer.fsdp: {checkpoint} has no {shards.name}: an earlier version or a run without FSDP2 saved it, not "
            "shard by shard; finish the stage as it was started, or delete this checkpoint to train the stage anew"
        )
    if shards.exists() and not asks_for_fsdp(args):
        raise UserError(f"trainer.fsdp: {checkpoint} was saved with FSDP2, must be resumed with it")


def prepare_fsdp(trainer: Any) -> None:
    """Configure FSDP2 as `cut` does, if the model is not cut yet, and let every rank save its own shards."""
    if not trainer.is_fsdp_enabled:
        return

    plugin = trainer.accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the default, whole state dicts
    plugin.set_state_dict_type("SHARDED_STATE_DICT")
    if plugin.activation_checkpointing:
        checkpoint_layers(trainer.model)
        plugin.activation_checkpointing = False
    if is_cut(trainer.model):
        # done already: accelerate would look for the layers under the names that they had before
        plugin.auto_wrap_policy = None
        return

    plugin.mixed_precision_policy = fsdp_policy(trainer.args)
    whole = isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.cpu_ram_efficient_loading
    if not (whole or plugin.ignored_modules or trainer.accelerator.torch_device_mesh is not None):
        upcast = trainer.accelerator.mixed_precision != "no"
        shard_head(trainer.model, upcast=upcast, compiled=trainer.args.torch_compile)
