"""The images: one filled circle or square on black, of random place, size and brightness, 16 × 16 greys.

    specs = draw_specs(64, generator)                        # [64, 4]: x, y, half width, brightness
    circles = render("circle", specs)                        # [64, 1, 16, 16] in [-1, 1]
    pairs = shape_pairs(32, generator)                       # 32 circles, then 32 squares of the same specs

Edges are smooth over one pixel: a pixel's grey falls from the brightness to black with its distance to the border.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["circle", "square"]
KINDS: tuple[Kind, Kind] = ("circle", "square")
PREFERRED: Kind = "circle"
SIDE = 16  # pixels
HALF_WIDTHS = (3.5, 5.5)  # pixels
BRIGHTNESS = (0.5, 1.0)  # black is 0


def draw_specs(count: int, generator: torch.Generator) -> Tensor:
    """[count, 4] float32: centre x and y, half width (pixels; the shape lies wholly inside), brightness."""
    x, y, width, brightness = torch.rand(4, count, generator=generator)
    half = HALF_WIDTHS[0] + width * (HALF_WIDTHS[1] - HALF_WIDTHS[0])
    place = half + torch.stack([x, y]) * (SIDE - 2 * half)
    return torch.stack([*place, half, BRIGHTNESS[0] + brightness * (BRIGHTNESS[1] - BRIGHTNESS[0])], 1)


def render(kind: Kind, specs: Tensor) -> Tensor:
    """[N, 1, 16, 16] float32 in [−1, 1] (black is −1), one image a row of `specs` [N, 4]."""
    pixel = torch.arange(SIDE) + 0.5
    x, y, half, brightness = specs[:, :, None, None].unbind(1)
    dx, dy = (pixel[None, None, :] - x).abs(), (pixel[None, :, None] - y).abs()
    distance = torch.hypot(dx, dy) if kind == "circle" else torch.maximum(dx, dy)
    inside = (half - distance + 0.5).clamp(0, 1)
    return (2 * brightness * inside - 1)[:, None]


def mixed_shapes(count: int, generator: torch.Generator) -> Tensor:
    """[count, 1, 16, 16]: half circles, half squares."""
    specs = draw_specs(count, generator)
    half = count // 2
    return torch.cat([render("circle", specs[:half]), render("square", specs[half:])])


def shape_pairs(count: int, generator: torch.Generator) -> Tensor:
    """[2·count, 1, 16, 16]: the preferred kind first, then the other of the same place, size and brightness."""
    specs = draw_specs(count, generator)
    other = next(kind for kind in KINDS if kind != PREFERRED)
    return torch.cat([render(PREFERRED, specs), render(other, specs)])
