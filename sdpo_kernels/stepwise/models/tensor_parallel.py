"""Tensor parallelism by the plan that transformers has for a model: each rank holds a part of every layer.

    model = AutoModelForCausalLM.from_pretrained(path, **distributed())

Trainer trains such a model but cannot save its optimizer; `save_shards` and `load_shards` do that, a file a rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError


def distributed() -> dict[str, Any]:
    """Options of `from_pretrained` that shard the model over the run's ranks; {} for a whole one.

    UserError if the installed transformers cannot.
    """
    size = ranks.tp_size()
    if size == 1:
        return {}

    # earlier ones load such a model, but their Trainer would wrap it in DDP
    if not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
        raise UserError(f"tp_size: was {size}, must be 1 with this version of transformers (tested with 5.23)")

    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=size)}


def require_divisible(size: int, model_config: Any) -> None:
    """UserError unless each of `size` ranks gets whole heads of the model's attention."""
    text = model_config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None) or size
        if heads % size:
            raise UserError(f"tp_size: was {size}, must divide the model's {name} ({heads})")


def is_tensor_parallel(model: Any) -> bool:
    """Whether transformers has sharded the model over several ranks as it loaded it."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks, which all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: Any) -> dict[str, Tensor]:
    """The whole weights and buffers in CPU memory on rank 0, {} elsewhere; a weight at a time, on all ranks.

    The model's config no longer says then that it is sharded: rank 0 alone saves it as a whole one.
    """
    weights: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # a tied head is one tensor under two names, and is saved as such
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            found = whole(tensor.detach())
            seen[id(tensor)] = found.cpu() if ranks.is_first() else found.new_empty(0)
        weights[name] = seen[id(tensor)]
    model.config.distributed_config = None
    return weights if ranks.is_first() else {}


def save_shards(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Save this rank's part of the weights and of the optimizer's state."""
    state = optimizer.state_dict()
    like = [weight for group in optimizer.param_groups for weight in group["params"]]
    state["state"] = {
        index: {name: _part(like[index], value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    parts = {
        "weights": {name: _local(weight.detach()) for name, weight in model.named_parameters()},
        "optimizer": state,
        "scheduler": scheduler.state_dict(),
    }
    torch.save(parts, _file(folder))


def load_shards(folder: Path, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Load what `save_shards` saved with as many ranks."""
    parts = torch.load(_file(folder), map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _local(weight).copy_(parts["weights"][name])

    # the optimizer's averages are sharded as the weights they belong to
    like = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, entry in parts["optimizer"]["state"].items():
        for name, value in entry.items():
            entry[name] = _as(like[index], value)
    optimizer.load_state_dict(parts["optimizer"])
    scheduler.load_state_dict(parts["scheduler"])


def _file(folder: Path) -> Path:
    return folder / f"shard_{ranks.rank()}_of_{ranks.world_size()}.pt"


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _part(weight: Any, value: Any) -> Any:
    """This rank's part of an optimizer's state of `weight`."""
    if isinstance(value, DTensor) and (value.shape, value.placements) != (weight.shape, weight.placements):
        raise UserError(
            "trainer.optim: its state is not shaped as the weights, so it cannot be saved with tp_size; use adamw_torch"
        )
    return _local(value)


def _as(weight: Tensor, value: Any) -> Any:
    """A part of an optimizer's state as a DTensor like its weight; a number of steps stays as it is."""
    if not isinstance(weight, DTensor) or not isinstance(value, Tensor) or value.shape != weight.to_local().shape:
        return value
    return DTensor.from_local(
        value.to(weight.device), weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )
