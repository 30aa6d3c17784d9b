"""Safetensors files of weights that FSDP2 has cut, written a piece at a time: no rank ever holds a whole weight.

    save_pieces(weights_of(model), Path("run/stage-1-easy"))      # every rank calls it, rank 0 writes

The files are named, split and indexed as those of `save_pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from sdpo_kernels.integrations.cut_weights import pieces, reshard
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.weights import INDEX, SINGLE

LARGEST_FILE = 50 * 10**9  # bytes, as in transformers
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def weights_of(model: Any) -> dict[str, Tensor]:
    """The entries of a cut model's state dict, tied ones once, with shards as they are."""
    reshard(model)
    weights: dict[str, Tensor] = dict(model.named_parameters())  # of tied ones the first name
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights |= {name: value for name, value in model.state_dict().items() if name not in every}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return {name: value for name, value in weights.items() if name not in ignored}


def whole_trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights of a cut model, whole, in CPU memory on rank 0; {} elsewhere. For adapters. Collective."""
    reshard(model)
    found = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        parts = [piece.cpu() for piece in pieces(weight) if ranks.is_first()]
        if ranks.is_first():
            found[name] = torch.cat(parts) if weight.dim() else parts[0]
    return found


Parts = Callable[[str, Tensor], Iterable[Tensor]]  # a weight's values in order, as `pieces` gives them


def _shards(name: str, weight: Tensor) -> Iterable[Tensor]:
    return pieces(weight)


def save_pieces(
    weights: Mapping[str, Tensor], folder: Path, largest: int = LARGEST_FILE, parts_of: Parts = _shards
) -> None:
    """Write a model's weights into `folder`, in one file or in several with an index. Collective.

    `weights` may be without values if `parts_of` has them. UserError on all ranks if rank 0 cannot write.
    """
    parts = _split(weights, largest)
    places: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = SINGLE if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_pieces({name: weights[name] for name in names}, folder / file, parts_of)
        places |= dict.fromkeys(names, file)
    if len(parts) > 1:
        ranks.agree(lambda: _write_index(weights, places, folder))


def _write_index(weights: Mapping[str, Tensor], places: dict[str, str], folder: Path) -> None:
    if not ranks.is_first():
        return
    totals = {
        "total_parameters": sum(weight.numel() for weight in weights.values()),
        "total_size": sum(map(_bytes, weights.values())),
    }
    index = {"metadata": totals, "weight_map": places}
    try:
        (folder / SINGLE).unlink(missing_ok=True)
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder / INDEX}: {error.strerror or error}") from error


def write_pieces(weights: Mapping[str, Tensor], path: Path, parts_of: Parts = _shards) -> None:
    """Write `weights` into one safetensors file. Collective; UserError on all ranks if rank 0 cannot write."""
    # by the size of their elements, so that each tensor's place is a multiple of it
    ordered = sorted(weights.items(), key=lambda item: (-item[1].element_size(), item[0]))
    error: OSError | None = None
    stream: BinaryIO | None = None
    try:
        if ranks.is_first():
            stream = path.open("wb")
            stream.write(_header(ordered))
    except OSError as failure:
        error = failure

    # whatever happens to rank 0's disk, the others wait for it at each piece
    for name, weight in ordered:
        for piece in parts_of(name, weight):
            if stream is None or error is not None:
                continue
            try:
                flat: Any = piece.cpu().contiguous().reshape(-1).view(torch.uint8)
                stream.write(memoryview(flat.numpy()))
            except OSError as failure:
                error = failure
    ranks.agree(lambda: _close(stream, error, path))


def _close(stream: BinaryIO | None, error: OSError | None, path: Path) -> None:
    try:
        if stream is not None:
            stream.close()
    except OSError as failure:
        error = error or failure
    if error is not None:
        raise UserError(f"cannot write {path}: {error.strerror or error}")


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    """The header of a safetensors file: its length n as eight little-endian bytes, then n bytes of JSON."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, weight in ordered:
        end = begin + _bytes(weight)
        header[name] = {"dtype": _DTYPES[weight.dtype], "shape": list(weight.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _split(weights: Mapping[str, Tensor], largest: int) -> list[list[str]]:
    """Names of the weights in each file: in order, as many as fit."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if parts[-1] and size + _bytes(weight) > largest:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += _bytes(weight)
    return parts


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()
