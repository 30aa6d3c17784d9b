"""One hand-picked tile of the logits kernel for each architecture, operand and epilogue; timed alternatives on request.

Picked by compiling: the largest that keeps everything in registers with Triton 3.6 and later
(tests/backends/test_triton_compiles.py). Softcap's tanh and the extras need registers of their own, so their tiles are
smaller. float32 products run on the ordinary cores, and descriptors only cost them registers.

With `SDPO_AUTOTUNE=1` the first call of a shape times the tiles that fit and keeps the fastest for this process. It is
off by default: a repeated run must give the same bits, which a tile chosen by timing cannot promise. Do not use it for
calls that a CUDA graph captures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a tile, row tiles that share columns, warps, pipeline stages.

    `descriptors` asks for tensor descriptors, `pieces` of columns (1, 2, 4 or 8) go through the epilogue one by one.
    """

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int
    descriptors: bool = False
    pieces: int = 1


FLOAT32 = {8: Tile(64, 64, 32, 8, 4, 3, pieces=2), 9: Tile(64, 64, 32, 8, 4, 3)}
FLOAT32_HEAVY = {8: replace(FLOAT32[8], warps=8, pieces=4)}  # with extras
PLAIN = {  # bfloat16, by major architecture
    8: Tile(128, 128, 32, 8, 4, 4),
    9: Tile(128, 256, 64, 8, 8, 3, descriptors=True),
    10: Tile(128, 128, 64, 8, 8, 3, descriptors=True),
    12: Tile(128, 128, 32, 8, 8, 3, descriptors=True),
}
HEAVY = {  # bfloat16 with softcap or extras
    8: Tile(64, 128, 32, 8, 8, 4),
    9: Tile(128, 256, 64, 8, 8, 3, descriptors=True, pieces=8),
    10: Tile(128, 64, 64, 8, 8, 3, descriptors=True),
    12: Tile(64, 128, 32, 8, 8, 3, descriptors=True),
}
HEAVIEST = HEAVY | {  # bfloat16 with softcap and extras
    9: replace(HEAVY[9], columns=128, pieces=4),
    10: replace(HEAVY[10], columns=32),
    12: replace(HEAVY[12], columns=64, warps=4),
}
OTHERS = [  # SDPO_AUTOTUNE=1 times these and the hand-picked tile, with descriptors if that one has them
    Tile(128, 128, 64, 8, 4, 4),
    Tile(128, 128, 64, 8, 8, 4),
    Tile(64, 256, 64, 8, 8, 3),
    Tile(128, 256, 64, 8, 8, 4),
    Tile(128, 64, 64, 8, 4, 4),
]
HOPPER = (9, 0)  # compute capability
PERSISTENT_ROWS, PERSISTENT_COLUMNS = 128, 192  # the tile of persistent_kernel.py, on Hopper alone
PERSISTENT_CLUSTER = 2  # blocks, one below the other, that share each tile of w
PERSISTENT_GROUP = 8
INTERPRETED = Tile(16, 32, 16, 2, 1, 1)  # small, so that small tests have many tiles

_FASTEST: dict[tuple[object, ...], Tile] = {}


def tiles_of(architecture: int, bf16: bool, capped: bool, extras: bool) -> Tile:
    """The tile for a major architecture; an unknown one gets the tile of the newest known architecture before it."""
    if not bf16:
        known = FLOAT32_HEAVY if extras else FLOAT32
    else:
        known = HEAVIEST if capped and extras else HEAVY if capped or extras else PLAIN
    return known[max((major for major in known if major <= architecture), default=8)]


def tile_for(device: torch.device, dtype: torch.dtype, capped: bool, extras: bool) -> Tile:
    """The tile for operands of `dtype` on `device`; on the CPU the interpreter's."""
    if device.type != "cuda":
        return INTERPRETED
    return tiles_of(torch.cuda.get_device_capability(device)[0], dtype == torch.bfloat16, capped, extras)


def candidates(picked: Tile) -> list[Tile]:
    """The hand-picked tile first, then others of the same kind."""
    return [picked, *(replace(tile, descriptors=picked.descriptors) for tile in OTHERS)]


def is_autotuned() -> bool:
    """Whether the user asked for timed tiles."""
    return os.environ.get("SDPO_AUTOTUNE") == "1"


def fastest(
    key: tuple[object, ...], tiles: Sequence[Tile], run: Callable[[Tile], None], measure: Callable[..., float]
) -> Tile:
    """The tile of `tiles` with which `run` takes the least time; timed once for each `key`.

    `measure(call)` returns a time, as triton.testing.do_bench does. Tiles that cannot run (too much shared memory) are
    skipped; RuntimeError if none can.
    """
    if key in _FASTEST:
        return _FASTEST[key]

    times: list[tuple[float, int]] = []
    problems: list[str] = []
    for place, tile in enumerate(tiles):
        try:
            times.append((measure(lambda tile=tile: run(tile)), place))
        except Exception as problem:  # triton's own OutOfResources, or a launch that the driver refuses
            problems.append(f"{tile}: {problem}")

    if not times:
        raise RuntimeError(f"SDPO_AUTOTUNE: no tile could be run: {'; '.join(problems)}")
    _, place = min(times)
    _FASTEST[key] = tiles[place]
    return _FASTEST[key]
