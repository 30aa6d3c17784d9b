"""What a model's forward keeps for its backward, found by running it on fake tensors: they have sizes, but no memory.

    with fake():
        model = AutoModelForCausalLM.from_config(config)
        found = trace(model, batch, autocast=torch.bfloat16, device="cuda")
    found.layers, found.outside       # bytes that each decoder layer keeps, and what lies around the layers

autograd says which tensors it keeps, so this holds for every model that transformers can build, whatever its layers
compute. The heaviest layer then runs alone, forward and backward, which shows what a layer takes while it works.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from sdpo_kernels.integrations.attention_by_sequence import PACKED
from sdpo_kernels.integrations.lm_head import find_head, hidden_of
from sdpo_kernels.stepwise.memory.batch import Group, MicroBatch
from sdpo_kernels.stepwise.memory.live import LiveBytes, storage_of

FUSED = "sdpo_plan"  # the attention of a plan for a GPU


@dataclass
class Layer:
    """One decoder layer, in bytes."""

    kept: int = 0  # for its backward, without weights
    copies: int = 0  # of its weights, rounded by autocast and kept for its backward
    cached: int = 0  # of these, copies of trained weights, which autocast holds to the end of the forward
    entering: int = 0  # the hidden states that enter it: what gradient checkpointing keeps


@dataclass
class Activations:
    """What one micro-batch takes, in bytes."""

    layers: list[Layer] = field(default_factory=list)
    outside: Layer = field(default_factory=Layer)  # embedding, positions, last norm
    forward_work: int = 0  # the most that the heaviest layer has at once without gradient
    forward_fixed: int = 0  # of that, what does not grow with the tokens: an expert's weights with their adapter's
    backward_work: int = 0  # the same in its forward and backward, with what it keeps and its weights' gradients
    heaviest: int = 0  # its number
    hidden_dtype: torch.dtype = torch.float32  # of the hidden states that enter the head


class _GroupedProducts(TorchDispatchMode):
    """The sizes of a mixture of experts' products: torch's own fake kernel accepts bfloat16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Sizes of grouped products, everything else as it is."""
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        a, b = args[:2]
        groups = args[2:3] if a.dim() == b.dim() == 2 else ()
        return a.new_empty([len(offsets) for offsets in groups] + [a.shape[-2], b.shape[-1]])


@contextmanager
def fake() -> Iterator[None]:
    """Tensors made inside have sizes and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), _GroupedProducts():
        yield


def trace(model: Any, batch: MicroBatch, autocast: torch.dtype | None, device: str) -> Activations:
    """Run the body of a fake `model` on `batch`; `autocast` is the dtype of mixed precision, None: the weights' own.

    On a "cuda" `device` the attention is a fused one, which keeps queries, keys, values, its output and a number a row;
    on "cpu" it is the package's own. Raises whatever the model's code raises.
    """
    body = find_head(model).body
    model.set_attn_implementation(PACKED if device == "cpu" and batch.packed else FUSED)
    layers = outermost_layers(body)
    found = Activations([Layer() for _ in layers])

    for group in batch.groups:
        with _Recorder(model, layers, found) as recorder, torch.autocast("cpu", autocast, autocast is not None):
            hidden = hidden_of(body(**_inputs(group), use_cache=False))
        found.hidden_dtype = hidden.dtype
        found.heaviest = max(range(len(layers)), key=lambda i: found.layers[i].kept)
        _work(layers[found.heaviest], recorder.calls[found.heaviest], autocast, found)
        if device != "cpu":
            _fixed(layers[found.heaviest], recorder.calls[found.heaviest], autocast, found, group.length)
    return found


def outermost_layers(body: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that gradient checkpointing and FSDP treat as units; ValueError if there are none."""
    named = [(name, m) for name, m in body.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    names = [name for name, _ in named]
    found = [layer for name, layer in named if not any(name.startswith(f"{other}.") for other in names)]
    if not found:
        raise ValueError(f"model: was a {type(body).__name__} without layers that transformers can checkpoint")
    return found


class _Recorder(TorchDispatchMode):
    """Within it, a forward's tensors that autograd keeps are added to the layer that runs, each once."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], found: Activations) -> None:
        super().__init__()
        self.found, self.running = found, found.outside
        self.weights = {storage_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.trained = {storage_of(weight) for weight in model.parameters() if weight.requires_grad}
        self.copies: dict[int, tuple[Tensor, bool]] = {}  # of a weight, and whether that is trained
        self.seen: dict[int, Tensor] = {}  # held, so that no address is used again
        self.calls: dict[int, tuple[Any, Any]] = {}
        self.layers = layers

    def __enter__(self) -> Any:
        """Install the hooks."""
        self.hooks = [
            hook
            for number, layer in enumerate(self.layers)
            for hook in (
                layer.register_forward_pre_hook(self._entering(number), with_kwargs=True),
                layer.register_forward_hook(self._left),
            )
        ]
        self.saving = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.saving.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Remove them."""
        super().__exit__(*error)
        self.saving.__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the copies of weights in another dtype."""
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and storage_of(args[0]) in self.weights:
            self.copies[storage_of(out)] = (out, storage_of(args[0]) in self.trained)
        return out

    def _entering(self, number: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls[number] = (args, kwargs)
            hidden, *others = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            for tensor in others:  # positions and masks, which all layers get
                self._keep(tensor)
            self.running = self.found.layers[number]
            self.running.entering += hidden.untyped_storage().nbytes()

        return hook

    def _left(self, *_: Any) -> None:
        self.running = self.found.outside

    def _keep(self, tensor: Tensor) -> Tensor:
        key = storage_of(tensor)
        if key in self.weights or key in self.seen:
            return tensor
        self.seen[key] = tensor
        size = tensor.untyped_storage().nbytes()
        if key in self.copies:
            self.running.copies += size
            self.running.cached += size if self.copies[key][1] else 0
        else:
            self.running.kept += size
        return tensor


def _work(layer: nn.Module, call: tuple[Any, Any], autocast: torch.dtype | None, found: Activations) -> None:
    """Run one layer alone, as training and scoring do, and note the most there was at once."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach(), call)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    _copy_pieces(call, (args, kwargs))

    existing = [*tensors, *layer.parameters(), *layer.buffers()]
    copies = found.layers[found.heaviest].copies
    found.forward_work = max(found.forward_work, _forward_peak(layer, (args, kwargs), autocast) - copies)

    tensors[0].requires_grad_()
    with LiveBytes(existing) as live:
        with torch.autocast("cpu", autocast, autocast is not None):
            out = layer(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.ones_like(out))
    found.backward_work = max(found.backward_work, live.peak)
    layer.zero_grad()


def _forward_peak(layer: nn.Module, call: tuple[Any, Any], autocast: torch.dtype | None) -> int:
    """The most that a layer has at once in a forward without gradient, besides its weights and what enters it."""
    args, kwargs = call
    existing = [
        *(leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)),
        *layer.parameters(),
        *layer.buffers(),
    ]
    mixed = torch.autocast("cpu", autocast, autocast is not None)
    with torch.no_grad(), LiveBytes(existing) as live, mixed:
        layer(*args, **kwargs)
    return live.peak


def _fixed(
    layer: nn.Module, call: tuple[Any, Any], autocast: torch.dtype | None, found: Activations, tokens: int
) -> None:
    """Run the layer with half of the tokens in a row: what is not halved does not depend on them."""

    def half(tensor: Tensor) -> Tensor:
        along = next((d for d, size in enumerate(tensor.shape) if size == tokens), None)
        return tensor.detach() if along is None else tensor.detach().narrow(along, 0, tokens // 2)

    if tokens > 1:
        peak = _forward_peak(layer, tree_map_only(Tensor, half, call), autocast)
        peak -= found.layers[found.heaviest].copies
        found.forward_fixed = max(0, 2 * peak - found.forward_work)


def _copy_pieces(from_call: Any, to_call: Any) -> None:
    """The pieces of a packed row are noted on its position ids (`attention_by_sequence.py`)."""
    for tensor, other in zip(tree_leaves(from_call), tree_leaves(to_call), strict=True):
        if hasattr(tensor, "_sdpo_pieces"):
            other._sdpo_pieces = tensor._sdpo_pieces


def _inputs(group: Group) -> dict[str, Tensor]:
    """Fake ids of a batch; of a packed row with the pieces that the attention would read from its positions."""
    ids = torch.zeros(group.sequences, group.length, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    if group.pieces:
        positions._sdpo_pieces = (positions._version, list(group.pieces))  # type: ignore[attr-defined]
    return {"input_ids": ids, "position_ids": positions}


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """torch's fused attention over the whole row: windows, softcaps and ends of sequences change no size."""
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, _fused_attention)
AttentionMaskInterface.register(FUSED, lambda *args, **kwargs: None)
