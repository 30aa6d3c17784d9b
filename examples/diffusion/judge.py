"""The judge: which shape an image shows, by comparison with circles and squares of every position and size.

    verdict = judge(images)                        # images [N, 1, 16, 16] in [-1, 1]
    verdict.circle, verdict.valid                  # bool [N] each

It knows neither the denoiser nor its training. It judges more than 99 % of real drawings correctly, which run.py
measures in every run. An image counts as a valid shape if its cosine similarity with the best template (black is 0, so
brightness does not matter) is at least `LIKE`; a square's similarity with its best circle is about 0.95.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from examples.diffusion.shapes import KINDS, SIDE, SIZES, Kind, draw_specs, radius, render

LIKE = 0.96
STEP = 0.25  # pixels between the positions of templates; twice that between their sizes


class Verdict(NamedTuple):
    """The judge's verdict on N images."""

    circle: Tensor  # bool [N]: a circle fits better than a square
    valid: Tensor  # bool [N]: one of the two fits well
    places: Tensor  # [N, 2] centre of the best template, in pixels


def judge(images: Tensor) -> Verdict:
    """Verdicts on images [N, 1, 16, 16] in [−1, 1]; values outside are clipped."""
    greys = (images.clamp(-1, 1) + 1).flatten(1)
    greys = greys / greys.norm(dim=1, keepdim=True).clamp(min=1e-6)
    masks, specs = templates()
    likeness = greys @ masks.T  # [N, kinds · templates of a kind]
    best, place = likeness.max(1)
    n_each = len(specs)
    return Verdict(place < n_each, best >= LIKE, specs[place % n_each, :2])


@lru_cache(maxsize=1)
def templates() -> tuple[Tensor, Tensor]:
    """Masks of unit norm [2·S, 256], circles first, and the specs [S, 4] that both kinds share."""
    sizes = torch.arange(SIZES[0], SIZES[1] + STEP, 2 * STEP)
    places = torch.arange(radius(sizes[0]).item(), SIDE - radius(sizes[0]).item() + STEP / 2, STEP)
    specs = torch.stack(torch.meshgrid(places, places, sizes, torch.ones(1), indexing="ij"), -1).reshape(-1, 4)

    # like the drawings, templates lie entirely inside the image
    edge = radius(specs[:, 2:3])
    specs = specs[((specs[:, :2] >= edge) & (specs[:, :2] <= SIDE - edge)).all(1)]

    masks = torch.cat([render(kind, specs).flatten(1) + 1 for kind in KINDS])
    return masks / masks.norm(dim=1, keepdim=True), specs


def accuracy_on_drawings(count: int, seed: int) -> float:
    """The share of real drawings, `count` of each kind, that are judged valid and of their kind."""
    specs = draw_specs(count, torch.Generator().manual_seed(seed))
    return sum(_right(kind, specs) for kind in KINDS) / len(KINDS)


def _right(kind: Kind, specs: Tensor) -> float:
    verdict = judge(render(kind, specs))
    return (verdict.valid & (verdict.circle == (kind == "circle"))).double().mean().item()
