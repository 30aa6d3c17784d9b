"""A trained model's weights as they lie with several processes: whole in each, or a shard in each (FSDP2).

What is asked of them (finite, equal, gathered for saving), which ways of sharing a model are refused, and how FSDP2 is
told to cut it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sdpo_kernels.integrations.lm_head import find_head
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.data.batches import collate_packed
from sdpo_kernels.stepwise.models.precision import Precision, asks_for_fsdp


def own(weight: Tensor) -> Tensor:
    """What of a weight this process holds."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold shards of the model."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def not_finite(model: Any) -> list[str]:
    """Names of the parameters that are NaN or infinite somewhere in this process."""
    return [name for name, weight in model.named_parameters() if not bool(torch.isfinite(own(weight)).all())]


def require_same(model: Any) -> None:
    """RuntimeError where processes that each hold the whole model have drifted apart: gradients were not shared."""
    if ranks.world_size() == 1 or is_sharded(model):
        return
    sums = [float(weight.detach().double().sum()) for weight in model.parameters() if weight.requires_grad]
    if any(others != sums for others in ranks.exchange(sums)):
        raise RuntimeError("the processes' weights differ after training: gradients were not averaged over all of them")


def gathered(trainer: Any) -> dict[str, Tensor] | None:
    """Whole weights of a sharded model in the first process's memory (CPU), nothing in others; None: not sharded."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def check_way(trainer: Any) -> None:
    """ValueError for ways of sharing a model that would not train what was asked for, or cannot be scored."""
    if asks_for_fsdp(trainer.args) and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp: needs several GPUs; accelerate would train plain DDP here without a word")
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("fsdp_config.version: was 1, must be 2")
    if trainer.is_fsdp_enabled and trainer.data_collator is not collate_packed:
        raise ValueError("fsdp: needs batching: packed; padded batches would take other numbers of forwards a process")
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise ValueError("deepspeed: ZeRO-3 cuts the model before its references are scored; use fsdp, or ZeRO-2")
    if trainer.following is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("fsdp or deepspeed: reference: ema averages whole weights; use plain DDP with it")


def prepare_fsdp(trainer: Any) -> None:
    """Have FSDP2 round weights and nothing else, as `Precision` has it, and leave the head in its shards.

    accelerate's own policy would also round the model's output, the log-probs, and sum gradients in bfloat16.
    """
    if not trainer.is_fsdp_enabled:
        return
    policy = MixedPrecisionPolicy(Precision.of(trainer.args).dtype, torch.float32, cast_forward_inputs=False)
    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    _cut_head(trainer)


def _cut_head(trainer: Any) -> None:
    """Give the head a group of its own, whose forward never runs: so it is never gathered whole.

    Before accelerate cuts the rest, which would put the head and the last norm into one group and gather both for the
    norm. Left to that are tied heads, which the embedding gathers at each step anyway, those with a LoRA of their own,
    and all where settings (offloading, loading by one process, modules left out, meshes, torch.compile) want it so.
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
        module.float()  # what accelerate does with every weight that trains; later it could not
    # Not the policy of the others: with a reduce_dtype, accumulation would look for gradients of gathered weights.
    fully_shard(module, mp_policy=MixedPrecisionPolicy())
