"""ExPO: weights further along the way that alignment took them, θ ← θ1 + α(θ1 − θ0). No training, no GPU.

    extrapolate(Path("sft"), Path("runs/quick/stage-3-hard"), Path("expo"), alpha=0.3)

Source: "Weak-to-Strong Extrapolation Expedites Alignment", arXiv 2404.16792 (θ0 the SFT model, θ1 the aligned one).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import empty_folder, publish_folder, read_json, remove_folder, replace_file
from sdpo_kernels.stepwise.models.load import ADAPTER
from sdpo_kernels.stepwise.post.match import match_tensors
from sdpo_kernels.stepwise.post.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, PIECE, Weights, rewrite
from sdpo_kernels.stepwise.record.model_cards import expo_card

_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}  # config, generation, tokenizer, code of the model
_NOT_COPIED = {"stage.json", "expo.json", "trainer_state.json"}
_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# with these ways to start an adapter the base is changed too: the base without it is not where training began
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def extrapolate(start: Path, aligned: Path, output: Path, alpha: float, notes: Sequence[str] = ()) -> None:
    """Write the model θ1 + α(θ1 − θ0) to the folder `output`, which appears in one rename.

    `start` (θ0) and `aligned` (θ1) are local folders with safetensors; θ0 may be sharded otherwise and have another
    dtype. Arithmetic is float32 (float64 where a tensor is), the result has θ1's dtypes, files and index; one tensor
    is in memory at a time. With α = 0 the weights are θ1's bytes. Integer tensors must be equal, and are kept.

    Where `aligned` is a LoRA adapter of `start`, the result is the adapter with its product scaled by 1 + α. Where it
    is a full model that keeps its adapter of `start` in adapter/, as a stage of a LoRA run does, the result keeps both.

    `notes` are lines of Markdown for the model card. UserError: α below 0, an `output` that holds something, folders
    whose tensors do not match, weights that overflow.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise UserError(f"alpha: was {alpha:g}, must be a number from 0 up")
    before, after = Weights(start), Weights(aligned)
    if before.is_adapter:
        raise UserError(f"{start}: is a LoRA adapter; merge it into its base first, and give the merged folder")
    output = output.absolute()
    require_free(output)
    staging = output.with_name(f".{output.name}.expo")
    try:
        empty_folder(staging)
        if after.is_adapter:
            _require_base(aligned, start)
            _scale_adapter(after, staging, alpha)
        else:
            _extrapolate_model(before, after, staging, alpha)
        replace_file(staging / "README.md", expo_card(start, aligned, alpha, notes, after.is_adapter).encode())
        publish_folder(staging, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from error
    finally:
        remove_folder(staging)


def require_free(output: Path) -> None:
    """UserError where `output` is a file, or a folder that holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already; give a new or an empty folder")


def _extrapolate_model(before: Weights, after: Weights, output: Path, alpha: float) -> None:
    names = match_tensors(before, after)
    _copy_files(after.folder, output)

    def change(name: str, tensor: Tensor) -> Tensor:
        if alpha == 0 or not tensor.is_floating_point():
            return tensor
        return extrapolated(before.tensor(names[name]), tensor, alpha, name)

    for file in after.files:
        rewrite(after.folder / file, output / file, change)
    adapter = after.folder / ADAPTER
    if (adapter / ADAPTER_CONFIG).is_file() and _is_base(adapter, before.folder):
        (output / ADAPTER).mkdir()
        _scale_adapter(Weights(adapter), output / ADAPTER, alpha)


def extrapolated(before: Tensor, after: Tensor, alpha: float, name: str) -> Tensor:
    """θ1 + α(θ1 − θ0) of two tensors of one shape, in θ1's dtype. UserError where it is not finite."""
    exact = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    result = torch.empty_like(after, memory_format=torch.contiguous_format)
    parts = (tensor.reshape(-1).split(PIECE) for tensor in (before, after, result))
    for old, new, out in zip(*parts, strict=True):  # in pieces: float32 twins of a whole embedding would be large
        old, new = old.to(exact), new.to(exact)
        out.copy_(torch.add(new, new - old, alpha=alpha))
        _require_finite(out, alpha, name)
    return result


def _scale_adapter(adapter: Weights, output: Path, alpha: float) -> None:
    """The adapter with B·A times 1 + α: B alone is scaled, in float32. UserError for what is no low-rank product."""
    others = [name for name in adapter.shapes if not any(part in _LORA for part in name.split("."))]
    if others:
        raise UserError(
            f"{adapter.folder}: holds {', '.join(others[:3])}{' …' if len(others) > 3 else ''} beside LoRA's A and B, "
            "which cannot be scaled; merge the adapter into its base, and give the merged folder"
        )
    config = read_json(adapter.folder / ADAPTER_CONFIG)
    kind, begun = config.get("peft_type"), str(config.get("init_lora_weights")).lower()
    if kind != "LORA" or begun.startswith(_CHANGES_BASE):
        raise UserError(
            f"{adapter.folder}: is an adapter of type {kind}, init_lora_weights {begun}; only LoRA whose base is as it "
            "was can be scaled; merge the adapter into its base, and give the merged folder"
        )
    _copy_files(adapter.folder, output)
    rewrite(adapter.folder / ADAPTER_WEIGHTS, output / ADAPTER_WEIGHTS, partial(_scaled, alpha=alpha))


def _scaled(name: str, tensor: Tensor, *, alpha: float) -> Tensor:
    if alpha == 0 or not any(part in ("lora_B", "lora_embedding_B") for part in name.split(".")):
        return tensor
    exact = torch.promote_types(tensor.dtype, torch.float32)
    result = (tensor.to(exact) * (1 + alpha)).to(tensor.dtype)
    _require_finite(result, alpha, name)
    return result


def _require_finite(tensor: Tensor, alpha: float, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{name}: is not finite with alpha {alpha:g}; a smaller alpha, or another dtype than {kind}")


def _is_base(adapter: Path, start: Path) -> bool:
    """Whether the adapter says that it was trained on the model in the folder `start`."""
    base = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    return os.path.realpath(base) == os.path.realpath(start)


def _require_base(adapter: Path, start: Path) -> None:
    """UserError where an adapter's base is another folder than `start`; a hub name cannot be compared."""
    base = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    if os.path.isdir(base) and not _is_base(adapter, start):
        raise UserError(f"{adapter}: is an adapter of {base}, not of {start}; give that, or merge the adapter first")


def _copy_files(source: Path, target: Path) -> None:
    """Everything small that belongs to the model, and the index of its shards; no weights, no record of a run."""
    for path in sorted(source.iterdir()):
        is_index = path.name.endswith(".index.json") and path.name != INDEX
        wanted = path.suffix in _COPIED or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and wanted and not is_index and path.name not in _NOT_COPIED:
            shutil.copyfile(path, target / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
