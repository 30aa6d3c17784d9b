"""Models that are cut by FSDP2 before they have weights, so that no rank ever holds a whole one.

    cut = Cut.of(args)                                          # None: models are loaded whole
    loaded = load_cut("models/base", config, precision, cut)    # every rank calls it

1. Build the model on the meta device, with its adapter (`stored.py`).
2. Cut it with accelerate's own function, as Trainer would later: the same groups of layers.
3. Each rank reads its own rows of each weight from the files.
4. Choose the attention on the cut model: its probes run on all ranks alike.

References, evaluations and training then go through the same wrapped model. The most a rank holds meanwhile is its
shard, the weights of one group (a layer) and one piece of a weight.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from sdpo_kernels.integrations.cut_weights import PIECE, call_body_through, own, pieces, reshard, shard_rows
from sdpo_kernels.integrations.lm_head import find_head
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.load import (
    Loaded,
    adapter_of,
    add_adapter,
    choose_attention,
    load_model,
    ready_head,
    release_memory,
    with_adapter,
)
from sdpo_kernels.stepwise.models.precision import Precision, asks_for_fsdp
from sdpo_kernels.stepwise.models.saving import keep_generation_config
from sdpo_kernels.stepwise.models.stored import Stored, stand_ins
from sdpo_kernels.stepwise.settings.run_settings import RunConfig


@dataclass(frozen=True)
class Cut:
    """How the models of a stage are cut: what accelerate will be told when the stage's Trainer is made."""

    args: TrainingArguments

    @classmethod
    def of(cls, args: TrainingArguments) -> Cut | None:
        """None if the stage's models are whole on every rank while they are loaded and scored.

        That is so without FSDP2, and with settings that need a whole model first: `offload_params`,
        `cpu_ram_efficient_loading`, `ignored_modules` and a device mesh of accelerate's.
        """
        if not asks_for_fsdp(args) or ranks.world_size() == 1:
            return None
        cut = cls(args)
        plugin = cut.plugin()
        whole = isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.cpu_ram_efficient_loading
        meshed = getattr(args, "parallelism_config", None) is not None
        return None if plugin.fsdp_version != 2 or whole or plugin.ignored_modules or meshed else cut

    def plugin(self) -> FullyShardedDataParallelPlugin:
        """accelerate's settings, from `fsdp_config` or its launcher."""
        plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
        plugin.mixed_precision_policy = fsdp_policy(self.args)
        return plugin

    def apply(self, model: Any) -> Any:
        """Cut `model`, which may be on the meta device, in place."""
        plugin, precision = self.plugin(), Precision.of(self.args)
        # what the functions below read of an Accelerator, which is made only with the Trainer
        accelerator: Any = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision="no" if precision.dtype is None else str(precision.dtype),
            torch_device_mesh=None,
            parallelism_config=None,
            is_main_process=ranks.is_first(),
            device=precision.device,
        )
        plugin.set_auto_wrap_policy(model)
        shard_head(model, upcast=precision.dtype is not None, compiled=self.args.torch_compile)
        return fsdp2_prepare_model(accelerator, model)


def fsdp_policy(args: TrainingArguments) -> MixedPrecisionPolicy:
    """FSDP2's precision: weights are rounded as they are gathered, gradients are summed in float32.

    accelerate's own policy would also round the model's output, the log-probs, and sum gradients in bfloat16.
    """
    return MixedPrecisionPolicy(Precision.of(args).dtype, torch.float32, cast_forward_inputs=False)


def shard_head(model: Any, *, upcast: bool, compiled: bool) -> None:
    """Shard the head as an FSDP group of its own. The fused head never runs its forward, so it is never gathered.

    This comes before accelerate shards the rest: it would put the head and the last norm into one group, and gather
    both for the norm. Left to accelerate are tied heads, which the embedding gathers at each step anyway, heads with a
    LoRA of their own, and compiled models.
    """
    module = find_head(model).module
    tied = module.weight is getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(module, nn.Linear) or tied or compiled:
        return
    if upcast and module.weight.requires_grad:
        module.float()  # as accelerate does with every trained weight; once the head is sharded it no longer can

    # Not the policy of the other groups: with a reduce_dtype, gradient accumulation would look for gradients of
    # gathered weights, and the head has none.
    fully_shard(module, mp_policy=MixedPrecisionPolicy())


def load_cut(path: str, config: RunConfig, precision: Precision, cut: Cut, *, trains: bool = False) -> Loaded:
    """Like `load_model`, but every rank holds only its shards. Collective.

    With `trains` the run's adapter is put on too, a new one unless `path` has its own: later it could not be cut. A
    new adapter changes no score.
    """
    release_memory()
    adapter = adapter_of(path, config)
    stored = ranks.agree(lambda: Stored.of(path, config, path if adapter is None else config.model))
    keep_generation_config(stored.model)
    ready_head(stored.model, path, config)

    loaded = Loaded(stored.model, packed=False, by_sequence=False)
    new = adapter is None and config.lora is not None and trains
    with stand_ins(stored.model):
        if adapter is not None:
            loaded.model = ranks.agree(lambda: with_adapter(stored.model, adapter))
        elif new and config.lora is not None:
            add_adapter(loaded, config.lora)
    if new:
        _forget_copies(loaded.model)
    if not trains:
        loaded.model.requires_grad_(False)  # or mixed precision would keep float32 copies

    # only an adapter's weights are there already
    own_names = {name for name, weight in loaded.model.named_parameters() if not weight.is_meta}
    root = loaded.model = cut.apply(loaded.model)
    materialise(root, precision.device)
    ranks.agree(lambda: _fill(root, stored, path, own_names))
    call_body_through(root)
    choose_attention(loaded, config, precision)
    _require_same_batches(loaded)
    reshard(root)
    loaded.hashed = partial(_hash, root, stored.dtypes, own_names, new=new)
    return loaded


def _require_same_batches(loaded: Loaded) -> None:
    """UserError if ranks have chosen another attention or other batches: their forwards would wait for each other."""
    model: Any = loaded.model
    found = (model.config._attn_implementation, loaded.packed, loaded.shared)
    for rank, other in enumerate(ranks.exchange(found)):
        if other != found:
            raise UserError(
                f"attn_implementation: {other[0]} was chosen on rank {rank}, and {found[0]} on rank {ranks.rank()}; "
                "set one that all have, or batching: padded"
            )


def _forget_copies(model: nn.Module) -> None:
    """Put PEFT's copies of whole modules (`modules_to_save`) on the meta device: they start with the base's weights."""
    for name, module in model.named_modules():
        if ".modules_to_save." in f"{name}.":
            for key, weight in module._parameters.items():
                if weight is not None:
                    meta = torch.empty_like(weight, device="meta")
                    module._parameters[key] = nn.Parameter(meta, requires_grad=weight.requires_grad)


def load_for(path: str, config: RunConfig, precision: Precision, cut: Cut | None, *, trains: bool = False) -> Loaded:
    """The model in `path`, cut if `cut` says how and other ranks take part, else whole."""
    # DoRA's start is computed from the base's weights
    needs_base = config.lora is not None and config.lora.more.get("use_dora")
    if cut is None or ranks.world_size() == 1 or needs_base or config.quantization is not None:
        return load_model(path, config, precision)
    return load_cut(path, config, precision, cut, trains=trains)


def bare_name(name: str) -> str:
    """The name of a weight in the model itself, without what PEFT adds to it."""
    name = name.removeprefix("base_model.model.")
    for part in (".base_layer", ".original_module", ".modules_to_save.default"):
        name = name.replace(part, "")
    return name


def materialise(model: Any, device: torch.device) -> None:
    """Give a cut model on the meta device memory for its shards, with undefined values; tied weights stay tied."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                places[id(weight)].append((module, name))

    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    for (module, name), *others in places.values():
        for other, other_name in others:
            setattr(other, other_name, getattr(module, name))


def _fill(model: Any, stored: Stored, path: str, adapter: set[str]) -> None:
    """Read this rank's rows of every weight but those of the adapter."""
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            bare = bare_name(name)
            if name in adapter or (bare not in stored.keys and not isinstance(weight, DTensor)):
                continue
            if bare not in stored.keys:
                raise UserError(f"model: {path} cannot be cut by FSDP2: {name} is not in its files")
            _fill_one(weight, stored, bare)


def _fill_one(weight: Tensor, stored: Stored, name: str) -> None:
    local = own(weight)
    if not isinstance(weight, DTensor):
        local.copy_(stored.whole(name))
        return

    first, stop = shard_rows(weight)[dist.get_rank(weight.device_mesh.get_group())]
    if stored.is_converted(name):
        local.copy_(stored.whole(name)[first:stop])
        return
    step = max(1, PIECE // max(1, weight[:1].numel()))
    for begin in range(first, stop, step):
        end = min(begin + step, stop)
        local[begin - first : end - first].copy_(stored.rows(name, begin, end))


def _hash(model: nn.Module, dtypes: dict[str, torch.dtype], adapter: set[str], *, new: bool) -> str:
    """`weights_hash` of the model as `load_model` would load it, without the adapter if it is new. Collective."""
    reshard(model)
    named = dict(model.state_dict())
    if new:
        named = {bare_name(name): value for name, value in named.items() if name not in adapter}

    # mixed precision keeps float32 copies of trained weights
    digest = hashlib.sha256()
    for name, weight in sorted(named.items()):
        dtype = weight.dtype if name in adapter else dtypes.get(bare_name(name), weight.dtype)
        digest.update(f"{name} {dtype} {tuple(weight.shape)};".encode())
        for piece in pieces(weight):
            if ranks.is_first():
                flat: Any = piece.to(dtype).cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(flat.numpy())
    return str(ranks.exchange(digest.hexdigest())[0])
