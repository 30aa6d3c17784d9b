"""Safetensors weights of a folder, sharded or not, read and rewritten one tensor at a time.

    weights = Weights(Path("runs/quick/stage-1-easy"))
    weights.shapes["model.norm.weight"], weights.tensor("model.norm.weight")

Pickle files are never opened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter"  # in a stage's folder: the LoRA adapter as trained
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PIECE = 1 << 22  # elements that are computed or written at a time

Change = Callable[[str, Tensor], Tensor]  # (name, tensor) -> a tensor of the same shape and dtype


class Weights:
    """The weights in `folder`: a model's, or a LoRA adapter's if the folder contains an adapter_config.json.

    `files` are the file names; `shapes` and `dtypes` (safetensors' names: F32, BF16, I64 …) are by tensor name. At most
    one file is open at a time. UserError: no such folder, no safetensors in it, missing or broken files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(
                f"{folder}: is not a folder; only local folders are read; download a hub model first "
                "(`hf download NAME --local-dir FOLDER`)"
            )

        self.is_adapter = (folder / ADAPTER_CONFIG).is_file()
        self.files = [ADAPTER_WEIGHTS] if self.is_adapter else _model_files(folder)

        # headers only: no tensor is read yet
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, str] = {}
        self._open: tuple[str, Any] = ("", None)
        for file in self.files:
            self._read_header(file)

    def _read_header(self, file: str) -> None:
        tensors = _opened(self.folder / file)
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            if name in self._file_of:
                raise UserError(f"{self.folder}: {name} is in both {self._file_of[name]} and {file}")
            described = tensors.get_slice(name)
            self.shapes[name], self.dtypes[name] = tuple(described.get_shape()), str(described.get_dtype())
            self._file_of[name] = file

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU."""
        file = self._file_of[name]
        if self._open[0] != file:
            self._open = ("", None)  # close the file before opening the next
            self._open = (file, _opened(self.folder / file))
        return self._open[1].get_tensor(name)

    def ties_head(self) -> bool:
        """Whether the output head is the input embedding, by config.json; transformers' default is yes."""
        path = self.folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", True)))


def rewrite(source: Path, target: Path, change: Change) -> None:
    """Copy a safetensors file and apply `change` to each tensor; the header with names, dtypes and offsets is kept.

    One tensor and its changed version are in memory at a time. OSError if `target` cannot be written.
    """
    tensors = _opened(source)
    with target.open("wb") as stream:
        stream.write(_header(source))
        for name in tensors.offset_keys():
            # tensors follow the header in the order of their offsets
            old = tensors.get_tensor(name)
            new = change(name, old)
            if (new.shape, new.dtype) != (old.shape, old.dtype):
                raise ValueError(f"{name}: {old.dtype}{tuple(old.shape)} became {new.dtype}{tuple(new.shape)}")

            for piece in new.contiguous().reshape(-1).split(PIECE):
                stream.write(memoryview(piece.view(torch.uint8).numpy()))


def _header(path: Path) -> bytes:
    """The header of a safetensors file: its length n as eight little-endian bytes, then n bytes of JSON."""
    with path.open("rb") as stream:
        size = stream.read(8)
        return size + stream.read(int.from_bytes(size, "little"))


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error


def _model_files(folder: Path) -> list[str]:
    """Names of the files with a model's weights: the single file if it exists, else those in the index."""
    if (folder / SINGLE).is_file():
        return [SINGLE]

    # the common mistakes: a run's folder in place of a stage's, or a model saved as pickle
    index = folder / INDEX
    if not index.is_file():
        stages = sorted(path.parent.name for path in folder.glob(f"stage-*/{SINGLE}"))
        if stages:
            raise UserError(f"{folder}: is a run's folder; give one of the models in it: {', '.join(stages)}")
        if (folder / ADAPTER / ADAPTER_CONFIG).is_file():
            raise UserError(f"{folder}: has no full weights, but an adapter; give {folder / ADAPTER}")
        raise UserError(f"{folder}: contains neither {SINGLE} nor {INDEX}; other formats, such as pickle, are not read")

    # names with a path are refused: the index must not reach outside its folder
    found = read_json(index)
    named = found.get("weight_map") if isinstance(found, dict) else None
    files = sorted(set(named.values())) if isinstance(named, dict) and named else []
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise UserError(f"{index}: must contain a weight_map from tensors to files in that folder")

    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]}, which {INDEX} names, is missing")
    return files
