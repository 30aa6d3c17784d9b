"""Both trainings: the denoiser on circles and squares, then Diffusion-DPO on pairs of the two.

pretrain(model, settings, on_step=print)
reference = copy.deepcopy(model)
losses = prefer(model, reference, settings)          # the first is ln 2: the model is still its own reference
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from examples.diffusion.denoiser import Denoiser, cosine_alphas_cumprod
from examples.diffusion.shapes import mixed_shapes, shape_pairs
from sdpo_kernels import diffusion_dpo, paired_noise, sample_mse

OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class Settings:
    """Sizes and learning rates."""

    steps: int  # of pretraining
    dpo_steps: int
    samples: int  # from each model
    seed: int = 7
    batch: int = 64
    rate: float = 3e-3
    pairs: int = 32  # per DPO batch
    dpo_rate: float = 3e-5  # chosen with beta and dpo_steps on seed 0, which no published figure uses
    beta: float = 2000.0


def pretrain(model: Denoiser, settings: Settings, on_step: OnStep = lambda step, loss: None) -> list[float]:
    """Train `model` in place to predict the noise in images of both shapes; returns the loss of each step."""
    generator = torch.Generator().manual_seed(settings.seed)
    alphas = cosine_alphas_cumprod()
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, settings.steps, pct_start=0.05)

    losses = []
    for step in range(1, settings.steps + 1):
        # add noise to fresh drawings, at a random timestep each
        images = mixed_shapes(settings.batch, generator)
        timesteps = torch.randint(len(alphas), (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        kept = alphas[timesteps][:, None, None, None]
        loss = sample_mse(model(kept.sqrt() * images + (1 - kept).sqrt() * noise, timesteps), noise).mean()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

        losses.append(loss.item())
        on_step(step, losses[-1])
    return losses


def prefer(
    model: Denoiser, reference: Denoiser, settings: Settings, on_step: OnStep = lambda step, loss: None
) -> list[float]:
    """Train `model` in place by Diffusion-DPO against the frozen `reference`; returns the loss of each step."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    alphas = cosine_alphas_cumprod()
    optimizer = torch.optim.AdamW(model.parameters(), settings.dpo_rate, weight_decay=0.0)

    losses = []
    for step in range(1, settings.dpo_steps + 1):
        # both images of a pair get the same noise and timestep
        noisy, timesteps, noise = paired_noise(shape_pairs(settings.pairs, generator), alphas, generator)
        with torch.no_grad():
            ref_mse = sample_mse(reference(noisy, timesteps), noise)
        out = diffusion_dpo(model(noisy, timesteps), noise, ref_mse=ref_mse, beta=settings.beta)

        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()

        losses.append(out.loss.item())
        on_step(step, losses[-1])
    return losses
