"""The denoiser: a UNet with 0.2 million parameters that predicts the noise in a 16 × 16 image, and its sampler.

    model = build_denoiser(seed=0)
    noise = model(noisy, timesteps)                # [N, 1, 16, 16], [N] int64 -> [N, 1, 16, 16]
    images = sample(model, 400, seed=1)            # [400, 1, 16, 16], about in [-1, 1]

DDPM (arXiv 2006.11239) with the cosine schedule (arXiv 2102.09672, eq. 17), sampled by DDIM (arXiv 2010.02502) in
`SAMPLE_STEPS` steps without added noise: with the same seed, all models start from the same noise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.diffusion.shapes import SIDE

STEPS = 200  # T, in training
SAMPLE_STEPS = 20
WIDTHS = (40, 64)  # channels at 8 × 8 and at 4 × 4
TIME_FEATURES = 32


def cosine_alphas_cumprod(steps: int = STEPS) -> Tensor:
    """ᾱ [T] float32, falling from about 1 to 0.0015 (clipped there, so that the predicted x0 stays finite)."""
    u = (torch.arange(steps) + 1) / steps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2).clamp(0.0015, 0.9999)


class Block(nn.Module):
    """A residual block: two convolutions, with the timestep's features added between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, width), nn.GroupNorm(8, width)])
        self.convolutions = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])
        self.time = nn.Linear(TIME_FEATURES, width)
        nn.init.zeros_(self.convolutions[1].weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [N, width, ·, ·], time [N, TIME_FEATURES] -> x's shape."""
        inner = self.convolutions[0](F.silu(self.norms[0](x))) + self.time(time)[:, :, None, None]
        return x + self.convolutions[1](F.silu(self.norms[1](inner)))


class Denoiser(nn.Module):
    """A UNet of two levels; the upper one has 2 × 2 pixels as four channels, which saves most of the time."""

    def __init__(self) -> None:
        super().__init__()
        top, low = WIDTHS
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, TIME_FEATURES), nn.SiLU())
        self.enter = nn.Conv2d(4, top, 3, padding=1)
        self.before, self.after = Block(top), Block(top)
        self.down, self.up = nn.Conv2d(top, low, 2, stride=2), nn.ConvTranspose2d(low, top, 2, stride=2)
        self.middle = nn.ModuleList([Block(low), Block(low)])
        self.leave = nn.Conv2d(top, 4, 3, padding=1)

    def forward(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Predict the noise [N, 1, 16, 16] in `noisy`, of the same shape, at `timesteps` [N]."""
        time = self.time(time_features(timesteps))
        top = self.before(self.enter(F.pixel_unshuffle(noisy, 2)), time)
        low = self.down(top)
        for block in self.middle:
            low = block(low, time)
        return F.pixel_shuffle(self.leave(F.silu(self.after(top + self.up(low), time))), 2)


def time_features(timesteps: Tensor) -> Tensor:
    """Sines and cosines of t/T [N, TIME_FEATURES]."""
    frequencies = math.pi * 1.5 ** torch.arange(TIME_FEATURES // 2)
    angles = timesteps[:, None] / STEPS * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def build_denoiser(seed: int) -> Denoiser:
    """A denoiser with random weights; a seed always gives the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Denoiser()


@torch.no_grad()
def sample(model: Denoiser, count: int, seed: int, batch: int = 100) -> Tensor:
    """Sample `count` images [count, 1, 16, 16] by DDIM."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    return torch.cat([denoise(model, part) for part in noise.split(batch)])


def denoise(model: Denoiser, x: Tensor) -> Tensor:
    """Turn noise `x` [N, 1, 16, 16] into images; each step predicts x0, clips it, and goes to the next timestep."""
    alphas = cosine_alphas_cumprod()
    timesteps = torch.linspace(STEPS - 1, 0, SAMPLE_STEPS).round().long()

    for now, then in zip(timesteps, [*timesteps[1:], None], strict=True):
        predicted = model(x, now.expand(len(x)))
        x0 = ((x - (1 - alphas[now]).sqrt() * predicted) / alphas[now].sqrt()).clamp(-1, 1)
        if then is None:
            return x0

        # the noise that belongs to the clipped x0, not the predicted one
        noise = (x - alphas[now].sqrt() * x0) / (1 - alphas[now]).sqrt()
        x = alphas[then].sqrt() * x0 + (1 - alphas[then]).sqrt() * noise

    raise AssertionError("unreachable: the last timestep has returned")
