"""A model's weights on several ranks: a whole copy on each (DDP, ZeRO-2) or a shard on each (FSDP2, ZeRO-3).

Checks on the weights (finite, equal on all ranks), gathering them for saving, the setups that are refused, and how
FSDP2 is configured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sdpo_kernels.integrations.lm_head import find_head
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.data.batches import PACKED_COLLATORS
from sdpo_kernels.stepwise.models.precision import Precision, asks_for_fsdp
from sdpo_kernels.stepwise.models.quantized import quantized_layers
from sdpo_kernels.stepwise.models.tensor_parallel import whole_weights
from sdpo_kernels.stepwise.models.zero import check_zero, optimizer_weights, partition


def own(weight: Tensor) -> Tensor:
    """The part of a weight that this rank holds."""
    if (part := partition(weight)) is not None:
        return part
    return weight.to_local() if isinstance(weight, DTensor) else weight


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds only shards of the model."""
    return any(_is_shard(weight) for weight in model.parameters())


def _is_shard(weight: Tensor) -> bool:
    return isinstance(weight, DTensor) or partition(weight) is not None


def not_finite(model: Any) -> list[str]:
    """Names of the parameters with NaN or infinite values in this rank's part."""
    return [name for name, weight in model.named_parameters() if not bool(torch.isfinite(own(weight)).all())]


def require_same(model: Any) -> None:
    """RuntimeError if weights that each rank holds whole are no longer the same on all ranks."""
    if ranks.world_size() == 1:
        return
    trained = [weight.detach() for weight in model.parameters() if weight.requires_grad and not _is_shard(weight)]
    sums = [float(weight.double().sum()) for weight in trained]
    if any(others != sums for others in ranks.exchange(sums)):
        raise RuntimeError("weights differ between ranks after training: gradients were not averaged over all of them")


def gathered(trainer: Any) -> dict[str, Tensor] | None:
    """The whole weights of a model whose own are shards or rounded, in CPU memory on rank 0 (empty elsewhere).

    None if the model's own weights can be saved as they are.
    """
    if trainer.is_deepspeed_enabled:
        model = trainer.accelerator.unwrap_model(trainer.model)
        adapter_only = hasattr(model, "get_base_model")  # it is saved in float32, whatever the base has
        return optimizer_weights(model, None if adapter_only else trainer.loaded_dtype, trained_only=adapter_only)
    if trainer.tensor_parallel:
        return whole_weights(trainer.accelerator.unwrap_model(trainer.model))
    if not trainer.is_fsdp_enabled:
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def check_way(trainer: Any) -> None:
    """ValueError for distributed setups that would not train as asked, or whose references cannot be scored."""
    if asks_for_fsdp(trainer.args) and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp: needs several GPUs; without them accelerate silently trains plain DDP")
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("fsdp_config.version: was 1, must be 2")

    # each forward gathers shards from all ranks: one more on one rank would wait for ever
    if trainer.is_fsdp_enabled and trainer.data_collator not in PACKED_COLLATORS:
        raise ValueError(
            "fsdp: needs batching: packed; with padded batches ranks run unequal numbers of forward passes"
        )

    # accelerate's launcher can ask for it too, past the settings
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and any(quantized_layers(trainer.model)):
        raise ValueError(
            "fsdp or deepspeed: quantised weights are not sharded; with quantization use plain DDP, a whole base on "
            "each process"
        )

    check_zero(trainer)
    if trainer.following is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("fsdp or deepspeed: reference: ema averages whole weights; use it with plain DDP")


def prepare_fsdp(trainer: Any) -> None:
    """Configure FSDP2: round weights and nothing else, as `Precision` does, and never gather the head."""
    if not trainer.is_fsdp_enabled:
        return

    # accelerate's own policy would also round the model's output, the log-probs, and sum gradients in bfloat16
    policy = MixedPrecisionPolicy(Precision.of(trainer.args).dtype, torch.float32, cast_forward_inputs=False)
    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    _shard_head(trainer)


def _shard_head(trainer: Any) -> None:
    """Shard the head as an FSDP group of its own. The fused head never runs its forward, so it is never gathered.

    This comes before accelerate shards the rest: it would put the head and the last norm into one group, and gather
    both for the norm. Left to accelerate are

    1. tied heads, which the embedding gathers at each step anyway, and heads with a LoRA of their own;
    2. setups this does not cover: CPU offloading, loading on one rank, ignored modules, device meshes, torch.compile.
    """
    plugin, model = trainer.accelerator.state.fsdp_plugin, trainer.model
    module = find_head(model).module
    if not isinstance(module, nn.Linear) or module.weight is getattr(model.get_input_embeddings(), "weight", None):
        return

    if isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.cpu_ram_efficient_loading or plugin.ignored_modules:
        return
    if trainer.accelerator.torch_device_mesh is not None or trainer.args.torch_compile:
        return

    if trainer.accelerator.mixed_precision != "no" and module.weight.requires_grad:
        module.float()  # as accelerate does with every trained weight; once the head is sharded it no longer can

    # Not the policy of the other groups: with a reduce_dtype, gradient accumulation would look for gradients of
    # gathered weights, and the head has none.
    fully_shard(module, mp_policy=MixedPrecisionPolicy())
