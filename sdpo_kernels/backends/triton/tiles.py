"""One hand-picked tile of the logits kernel for each architecture, operand and epilogue.

Picked by compiling: the largest that keeps everything in registers (tests/backends/test_triton_compiles.py). Softcap's
tanh and the extras need registers of their own, so their tiles are smaller. float32 products run on the ordinary cores,
and descriptors only cost them registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a tile, row tiles that share columns, warps, pipeline stages, tensor descriptors."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int
    descriptors: bool = False


FLOAT32 = Tile(64, 64, 32, 8, 4, 3)
PLAIN = {  # bfloat16, by major architecture
    8: Tile(128, 128, 32, 8, 4, 4),
    9: Tile(128, 256, 64, 8, 8, 3, descriptors=True),
    10: Tile(128, 128, 64, 8, 8, 3, descriptors=True),
    12: Tile(128, 128, 32, 8, 8, 3, descriptors=True),
}
HEAVY = {  # bfloat16 with softcap or extras
    8: Tile(64, 128, 32, 8, 8, 4),
    9: Tile(128, 64, 64, 8, 8, 3, descriptors=True),
    10: Tile(128, 64, 64, 8, 8, 3, descriptors=True),
    12: Tile(64, 128, 32, 8, 8, 3, descriptors=True),
}
OTHERS = [  # what SDPO_AUTOTUNE=1 times beside the picked one, with descriptors where that has them
    Tile(128, 128, 64, 8, 4, 4),
    Tile(128, 128, 64, 8, 8, 4),
    Tile(64, 256, 64, 8, 8, 3),
    Tile(128, 256, 64, 8, 8, 4),
    Tile(128, 64, 64, 8, 4, 4),
]
INTERPRETED = Tile(16, 32, 16, 2, 1, 1)  # small, so that small tests have many tiles


def tiles_of(architecture: int, bf16: bool, heavy: bool) -> Tile:
    """The tile for a major architecture; one that is not known gets that of the newest before it."""
    if not bf16:
        return FLOAT32
    known = HEAVY if heavy else PLAIN
    return known[max((major for major in known if major <= architecture), default=8)]


def tile_for(device: torch.device, dtype: torch.dtype, heavy: bool) -> Tile:
    """The tile for operands of `dtype` on `device`; on the CPU the interpreter's."""
    if device.type != "cuda":
        return INTERPRETED
    return tiles_of(torch.cuda.get_device_capability(device)[0], dtype == torch.bfloat16, heavy)


def candidates(picked: Tile) -> list[Tile]:
    """The picked tile first, then others of the same kind."""
    return [picked, *(replace(tile, descriptors=picked.descriptors) for tile in OTHERS)]
