"""A model on the meta device, and where each of its weights is in the files of its checkpoint.

    stored = Stored.of("models/base", config)          # reads headers only
    stored.model                                       # names, shapes and dtypes are right, weights have no memory
    stored.rows("model.norm.weight", 0, 8)             # these rows, on the CPU; nothing else is read

transformers decides how the names in the files become the model's. It also converts some weights, such as the experts
of a mixture, which are separate in the files: of those the whole weight is read each time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.model_names import load_failure
from sdpo_kernels.stepwise.models.load import LOADING_ERRORS, checked, failed, model_options
from sdpo_kernels.stepwise.models.weights import PIECE, Weights
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

_FILES = ("model.safetensors", "model-*.safetensors", "*.json")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A model without weights, and how to read them."""

    model: Any  # on the meta device, with its buffers on the CPU
    weights: Weights
    keys: dict[str, list[tuple[str, str | None]]]  # by the model's name: names in the files, patterns of a conversion
    dtypes: dict[str, torch.dtype]  # by the model's name: what transformers would load it as

    @classmethod
    def of(cls, path: str, config: RunConfig, source: str) -> Stored:
        """The model in `source`, a folder or hub name; UserError, which names `path`, as for any other loading."""
        weights = Weights(_folder(source))

        # stand-ins for the weights, with which transformers does all its checks
        shapes = weights.shapes.items()
        state = {
            name: torch.empty(shape, dtype=_DTYPES.get(weights.dtypes[name], torch.float32), device="meta")
            for name, shape in shapes
        }
        model = _on_meta(path, config, source, state, weights)
        fill_buffers(model)
        named = model.state_dict()
        return cls(model, weights, _keys(model, list(state), named), {n: t.dtype for n, t in named.items()})

    @property
    def converts(self) -> bool:
        """Whether transformers changes names or weights of this checkpoint when it loads it."""
        return bool(getattr(self.model, "_weight_conversions", None))

    def is_converted(self, name: str) -> bool:
        """Whether transformers puts the weight `name` together from others in the files."""
        return self.keys[name][0][1] is not None

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows [first, stop) of the weight `name`, on the CPU, in the dtype of `dtypes`."""
        if self.is_converted(name):
            return self.whole(name)[first:stop]
        return self.weights.rows(self.keys[name][0][0], first, stop).to(self.dtypes[name])

    def whole(self, name: str) -> Tensor:
        """The weight `name`, on the CPU, in the dtype of `dtypes`."""
        tensor = self._converted(name) if self.is_converted(name) else self.weights.tensor(self.keys[name][0][0])
        return tensor.to(self.dtypes[name])

    def _converted(self, name: str) -> Tensor:
        """A weight that transformers puts together from one or several in the files."""
        pattern = self.keys[name][0][1]
        entries = [c for c in self.model._weight_conversions if isinstance(c, WeightConverter)]
        converter: Any = copy.deepcopy(next(entry for entry in entries if pattern in entry.source_patterns))
        for key, source in self.keys[name]:
            converter.add_tensor(name, key, source, self.weights.tensor(key))
        made = converter.convert(name, model=self.model, config=self.model.config)
        value = made[name]
        return value[0] if isinstance(value, list) else value


def _on_meta(path: str, config: RunConfig, source: str, state: dict[str, Tensor], weights: Weights) -> Any:
    """The model as transformers would load it with the weights `state`, on the meta device."""
    options = model_options(config)
    trusted = {"trust_remote_code": options.pop("trust_remote_code")}
    try:
        model_config = AutoConfig.from_pretrained(source, **trusted)
        with torch.device("meta"):
            kind: Any = AutoModelForCausalLM.from_config(model_config, **trusted)
        _drop_copies(kind, state, weights)
        options |= {"device_map": "meta", "state_dict": state, "output_loading_info": True}
        model = checked(path, source, *type(kind).from_pretrained(None, config=model_config, **options))
    except LOADING_ERRORS as error:
        raise failed(path, source, error) from error

    model.config.name_or_path = source
    with suppress(OSError, ValueError):  # a model without one has the default
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model


def _drop_copies(model: Any, state: dict[str, Tensor], weights: Weights) -> None:
    """Remove tied weights that the files have twice; transformers ties them only if both are equal."""
    for copied, name in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if copied in state and name in state and _equal(weights, copied, name):
            del state[copied]


def _equal(weights: Weights, a: str, b: str) -> bool:
    shape = weights.shapes[a]
    if shape != weights.shapes[b]:
        return False
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    starts = range(0, shape[0], step)
    return all(weights.rows(a, i, i + step).equal(weights.rows(b, i, i + step)) for i in starts)


def fill_buffers(model: Any) -> None:
    """Give the buffers that no file has, such as rotary frequencies, their values on the CPU, as transformers does.

    `model` is on the meta device, where initialising weights does nothing.
    """
    for module in model.modules():
        absent = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in absent:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if absent:
            module._is_hf_initialized = False  # what transformers goes by
    model.initialize_weights()


@contextmanager
def stand_ins(model: Any) -> Iterator[None]:
    """Within the block a model on the meta device seems to be on the CPU: PEFT makes an adapter where its base is.

    Each weight is one number, seen in the weight's shape.
    """
    before: list[tuple[Any, str, Any]] = [
        (m, name, w) for m in model.modules() for name, w in m._parameters.items() if w is not None
    ]
    made = {id(w): nn.Parameter(torch.zeros(1, dtype=w.dtype).expand(w.shape)) for _, _, w in before}
    for module, name, weight in before:
        module._parameters[name] = made[id(weight)]
    try:
        yield
    finally:
        for module, name, weight in before:
            module._parameters[name] = weight.requires_grad_(made[id(weight)].requires_grad)


def _keys(model: Any, names: list[str], state: dict[str, Tensor]) -> dict[str, list[tuple[str, str | None]]]:
    """Where each entry of the model's state dict is in the files; tied weights share an entry."""
    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix

    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            found.setdefault(target, []).append((name, pattern))

    # the files have one of a group of tied weights
    same: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in found:
            same.setdefault(id(weight), name)
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name not in found and id(weight) in same:
            found[name] = found[same[id(weight)]]
    return found


def _folder(source: str) -> Path:
    """The folder of a model; a hub model is downloaded, unless it is in the local cache."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(f"model: {load_failure(source, 'model', error)}") from error
