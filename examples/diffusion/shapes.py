"""The images: one filled circle or square on black, of random position, size and brightness, 16 × 16 in grey.

    specs = draw_specs(64, generator)                        # [64, 4]: x, y, size, brightness
    circles = render("circle", specs)                        # [64, 1, 16, 16] in [-1, 1]
    pairs = shape_pairs(32, generator)                       # 32 circles, then 32 squares of the same specs

The size is the square root of the area, so a circle and a square of the same size are equally bright in total, and a
preference between them is about the shape alone. Edges are smooth: over one pixel, grey fades to black.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["circle", "square"]
KINDS: tuple[Kind, Kind] = ("circle", "square")
PREFERRED: Kind = "circle"
SIDE = 16  # pixels
SIZES = (6.0, 9.5)  # pixels
BRIGHTNESS = (0.5, 1.0)  # black is 0


def draw_specs(count: int, generator: torch.Generator) -> Tensor:
    """[count, 4] float32: centre x and y, size (pixels; both shapes lie entirely inside), brightness."""
    x, y, size, brightness = torch.rand(4, count, generator=generator)
    size = SIZES[0] + size * (SIZES[1] - SIZES[0])
    place = radius(size) + torch.stack([x, y]) * (SIDE - 2 * radius(size))
    return torch.stack([*place, size, BRIGHTNESS[0] + brightness * (BRIGHTNESS[1] - BRIGHTNESS[0])], 1)


def radius(size: Tensor) -> Tensor:
    """The radius of a circle of area size², `size**2`; larger than size / 2, half the square's side."""
    return size / math.sqrt(math.pi)


def render(kind: Kind, specs: Tensor) -> Tensor:
    """Images [N, 1, 16, 16] float32 in [−1, 1] (black is −1), one per row of `specs` [N, 4]."""
    pixel = torch.arange(SIDE) + 0.5
    x, y, size, brightness = specs[:, :, None, None].unbind(1)
    dx, dy = (pixel[None, None, :] - x).abs(), (pixel[None, :, None] - y).abs()

    # signed distance to the border, above 0 inside
    distance = radius(size) - torch.hypot(dx, dy) if kind == "circle" else size / 2 - torch.maximum(dx, dy)
    inside = (distance + 0.5).clamp(0, 1)
    return (2 * brightness * inside - 1)[:, None]


def mixed_shapes(count: int, generator: torch.Generator) -> Tensor:
    """[count, 1, 16, 16]: half circles, half squares."""
    specs = draw_specs(count, generator)
    half = count // 2
    return torch.cat([render("circle", specs[:half]), render("square", specs[half:])])


def shape_pairs(count: int, generator: torch.Generator) -> Tensor:
    """[2·count, 1, 16, 16]: the preferred kind first, then the other with the same position, size and brightness."""
    specs = draw_specs(count, generator)
    other = next(kind for kind in KINDS if kind != PREFERRED)
    return torch.cat([render(PREFERRED, specs), render(other, specs)])
