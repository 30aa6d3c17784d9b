"""ExPO: extrapolate the weights beyond an aligned model, θ ← θ1 + α(θ1 − θ0). No training, no GPU.

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
from sdpo_kernels.stepwise.models.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, PIECE, Weights, rewrite
from sdpo_kernels.stepwise.post.match import match_tensors
from sdpo_kernels.stepwise.record.model_cards import expo_card

_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}  # config, generation, tokenizer, code of the model
_NOT_COPIED = {"stage.json", "expo.json", "trainer_state.json"}
_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# these initialisations of an adapter change the base too, so the base alone is not where training started
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def extrapolate(start: Path, aligned: Path, output: Path, alpha: float, notes: Sequence[str] = ()) -> None:
    """Write the model θ1 + α(θ1 − θ0), `aligned + alpha * (aligned - start)`, to the folder `output`.

    `start` (θ0) and `aligned` (θ1) are local folders with safetensors; they may differ in sharding and in dtype.

    1. Read the headers of both folders.
    2. Extrapolate into a staging folder next to `output`, one tensor in memory at a time. Arithmetic is float32
       (float64 if a tensor is float64); dtypes, files and index are those of θ1. With α = 0 the weights are θ1's bytes.
       Integer tensors must be equal, and are kept.
    3. If `aligned` is a LoRA adapter of `start`, scale its product B·A by 1 + α instead. If it is a full model with
       its adapter of `start` in adapter/, like a stage of a LoRA run, do both.
    4. Write the model card; `notes` are lines of Markdown for it.
    5. Publish the folder in one rename.

    UserError: α below 0, an `output` that is not empty, folders whose tensors do not match, weights that overflow.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise UserError(f"alpha: was {alpha:g}, must be a finite number of at least 0")

    before, after = Weights(start), Weights(aligned)
    if before.is_adapter:
        raise UserError(f"{start}: is a LoRA adapter; merge it into its base first and give the merged folder")

    output = output.absolute()
    require_free(output)

    # next to the output, so that the rename stays on one disk
    staging = output.with_name(f".{output.name}.expo")

    try:
        empty_folder(staging)
        if after.is_adapter:
            _require_base(aligned, start)
            _scale_adapter(after, staging, alpha)
        else:
            _refuse_quantised(aligned, start)
            _extrapolate_model(before, after, staging, alpha)
        replace_file(staging / "README.md", expo_card(start, aligned, alpha, notes, after.is_adapter).encode())
        publish_folder(staging, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from error
    finally:
        remove_folder(staging)


def _refuse_quantised(aligned: Path, start: Path) -> None:
    """UserError for merged weights of a run with `quantization`: most of what they differ by is the base's rounding."""
    run = aligned.absolute().parent
    manifest = run / "manifest.json"
    config = read_json(manifest).get("config", {}) if manifest.is_file() and (aligned / ADAPTER).is_dir() else {}

    # two stages of the run have the same base
    if config.get("quantization") and start.absolute().parent != run:
        raise UserError(
            f"{aligned}: was trained on a base that was quantised, so most of what its weights differ by from those of "
            f"{start} is that rounding; give {aligned / ADAPTER}"
        )


def require_free(output: Path) -> None:
    """Raise UserError if `output` is a file or a folder that is not empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: already exists; give a new or an empty folder")


def _extrapolate_model(before: Weights, after: Weights, output: Path, alpha: float) -> None:
    names = match_tensors(before, after)
    _copy_files(after.folder, output)

    # α = 0 returns the tensor itself: computing θ1 + 0·(θ1 − θ0) would turn −0 into 0
    def change(name: str, tensor: Tensor) -> Tensor:
        if alpha == 0 or not tensor.is_floating_point():
            return tensor
        return extrapolated(before.tensor(names[name]), tensor, alpha, name)

    for file in after.files:
        rewrite(after.folder / file, output / file, change)

    # a later LoRA stage may continue with the adapter, which must match the new weights
    adapter = after.folder / ADAPTER
    if (adapter / ADAPTER_CONFIG).is_file() and _is_base(adapter, before.folder):
        (output / ADAPTER).mkdir()
        _scale_adapter(Weights(adapter), output / ADAPTER, alpha)


def extrapolated(before: Tensor, after: Tensor, alpha: float, name: str) -> Tensor:
    """θ1 + α(θ1 − θ0) of two tensors of one shape, in θ1's dtype. UserError if the result is not finite."""
    exact = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    result = torch.empty_like(after, memory_format=torch.contiguous_format)

    # piece by piece: float32 copies of a whole embedding would be large
    parts = (tensor.reshape(-1).split(PIECE) for tensor in (before, after, result))
    for old, new, out in zip(*parts, strict=True):
        old, new = old.to(exact), new.to(exact)
        out.copy_(torch.add(new, new - old, alpha=alpha))
        _require_finite(out, alpha, name)
    return result


def _scale_adapter(adapter: Weights, output: Path, alpha: float) -> None:
    """Scale the adapter's product B·A by 1 + α: only B, in float32. UserError if the adapter is more than B·A."""
    # magnitude vectors and fully trained modules do not scale like B·A
    others = [name for name in adapter.shapes if not any(part in _LORA for part in name.split("."))]
    if others:
        raise UserError(
            f"{adapter.folder}: contains {', '.join(others[:3])}{' …' if len(others) > 3 else ''} besides LoRA's A and "
            "B, which cannot be scaled; merge the adapter into its base and give the merged folder"
        )

    config = read_json(adapter.folder / ADAPTER_CONFIG)
    kind, initialisation = config.get("peft_type"), str(config.get("init_lora_weights")).lower()
    if kind != "LORA" or initialisation.startswith(_CHANGES_BASE):
        raise UserError(
            f"{adapter.folder}: is an adapter of type {kind}, init_lora_weights {initialisation}; only LoRA that "
            "leaves its base unchanged can be scaled; merge the adapter into its base and give the merged folder"
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
        raise UserError(f"{name}: is not finite with alpha {alpha:g}; use a smaller alpha or another dtype than {kind}")


def _is_base(adapter: Path, start: Path) -> bool:
    """Whether the adapter's config names the folder `start` as its base."""
    base = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    return os.path.realpath(base) == os.path.realpath(start)


def _require_base(adapter: Path, start: Path) -> None:
    """Raise UserError if an adapter's base is another folder than `start`; a hub name cannot be compared."""
    base = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    if os.path.isdir(base) and not _is_base(adapter, start):
        raise UserError(f"{adapter}: is an adapter of {base}, not of {start}; give that, or merge the adapter first")


def _copy_files(source: Path, target: Path) -> None:
    """Copy the model's small files and the index of its shards; no weights, and no record of a run."""
    for path in sorted(source.iterdir()):
        is_index = path.name.endswith(".index.json") and path.name != INDEX
        wanted = path.suffix in _COPIED or path.name.startswith(("LICENSE", "NOTICE"))
        if path.is_file() and wanted and not is_index and path.name not in _NOT_COPIED:
            shutil.copyfile(path, target / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)
