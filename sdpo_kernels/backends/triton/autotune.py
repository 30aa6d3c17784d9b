"""`SDPO_AUTOTUNE=1`: time the tiles that fit at the first call of a shape, and keep the fastest for this process.

Without it the hand-picked tile of `tiles.py` is taken, always: a run repeated is the same run, bit for bit, which a
tile chosen by the clock cannot promise. Not for calls that a CUDA graph captures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from sdpo_kernels.backends.triton.tiles import Tile

_FASTEST: dict[tuple[object, ...], Tile] = {}


def wanted() -> bool:
    """Whether the person asked for it."""
    return os.environ.get("SDPO_AUTOTUNE") == "1"


def fastest(
    key: tuple[object, ...], tiles: Sequence[Tile], run: Callable[[Tile], None], measure: Callable[..., float]
) -> Tile:
    """The tile of `tiles` with which `run` takes least time; timed once for each `key`.

    `measure(call)` gives a time (triton.testing.do_bench does); a tile that cannot run (too much shared memory) is left
    out. RuntimeError where none can.
    """
    if key not in _FASTEST:
        times: list[tuple[float, int]] = []
        problems: list[str] = []
        for place, tile in enumerate(tiles):
            try:
                times.append((measure(lambda tile=tile: run(tile)), place))
            except Exception as problem:  # triton's own OutOfResources, or the driver's refusal of a launch
                problems.append(f"{tile}: {problem}")
        if not times:
            raise RuntimeError(f"SDPO_AUTOTUNE: no tile could be run: {'; '.join(problems)}")
        _FASTEST[key] = tiles[min(times)[1]]
    return _FASTEST[key]
