"""Whether the weights of a finished stage are still there, without loading them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def weights_problem(folder: Path) -> str | None:
    """What is wrong with the weights in `folder`: a missing or incomplete file; None if all are there."""
    if not folder.is_dir():
        return "the folder is missing"

    # large models are saved in several files, which an index lists
    names = [WEIGHTS]
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return f"{INDEX} cannot be read: {error}"

    for name in names:
        if not (folder / name).exists():
            return f"{name} is missing"
        try:
            with safe_open(str(folder / name), framework="pt"):  # reads the header and compares the file's size
                pass
        except (SafetensorError, OSError) as error:
            return f"{name} is not complete: {error}"
    return None
