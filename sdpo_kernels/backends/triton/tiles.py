"""One hand-picked tile of the logits kernel for each architecture and operand size; `SDPO_AUTOTUNE=1` times others."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a tile, row tiles that share columns, warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


TILES = {  # (major architecture, bytes of an operand)
    (8, 2): Tile(128, 128, 32, 8, 4, 4),
    (9, 2): Tile(128, 256, 64, 8, 8, 3),
    (10, 2): Tile(128, 128, 64, 8, 8, 3),
    (12, 2): Tile(128, 128, 32, 8, 8, 3),
    (8, 4): Tile(64, 64, 32, 8, 4, 3),
    (9, 4): Tile(64, 128, 32, 8, 8, 3),
    (10, 4): Tile(64, 128, 32, 8, 8, 3),
    (12, 4): Tile(64, 64, 32, 8, 4, 3),
}
INTERPRETED = Tile(16, 32, 16, 2, 1, 1)  # small, so that small tests have many tiles


def tile_for(device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile for operands of `dtype` on `device`; on the CPU the interpreter's."""
    if device.type != "cuda":
        return INTERPRETED
    major = torch.cuda.get_device_capability(device)[0]
    return TILES[(major if (major, dtype.itemsize) in TILES else 8, dtype.itemsize)]
