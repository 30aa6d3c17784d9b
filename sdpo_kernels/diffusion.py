"""Diffusion-DPO (arXiv 2311.12908): the pair loss on minus the denoising error, with its per-sample mean squared error.

    noisy, t, noise = paired_noise(images, alphas_cumprod, generator)          # preferred images first, then the others
    with torch.no_grad():
        ref_mse = sample_mse(reference(noisy, t), noise)
    diffusion_dpo(denoiser(noisy, t), noise, ref_mse=ref_mse).loss.backward()

In the evidence bound of a diffusion model, minus the denoising error takes the place of a language model's log-prob;
the rest is DPO. Every batch holds the preferred samples first, then the others in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdpo_kernels.losses import PairLogps, pair_loss

PIECE = {"cpu": 2**17}  # elements at a time: half a MiB of float32 stays in the second-level cache
PIECE_ELSEWHERE = 2**24  # on GPUs, where a launch costs more than the memory


class PairedNoise(NamedTuple):
    """Returned by `paired_noise` for B pairs; both samples of a pair share the timestep and the noise."""

    noisy: Tensor  # [2B, ...], x0's dtype
    timesteps: Tensor  # [2B] int64 in [0, T)
    noise: Tensor  # [2B, ...], x0's dtype: the target of a denoiser that predicts ε


class DiffusionDPOOutput(NamedTuple):
    """`loss` carries the gradient; the rest is detached, [B] float32 (float64 for float64 predictions)."""

    loss: Tensor  # scalar, mean over pairs
    chosen_mse: Tensor  # m_w, of the preferred samples
    rejected_mse: Tensor  # m_l
    ref_chosen_mse: Tensor  # r_w, r_l: the reference's
    ref_rejected_mse: Tensor
    chosen_rewards: Tensor  # −(β/2) · (m_w − r_w)
    rejected_rewards: Tensor
    margins: Tensor  # z = chosen_rewards − rejected_rewards
    accuracy: Tensor  # 1 where the chosen reward is above the rejected one, else 0


def diffusion_dpo(
    prediction: Tensor,
    target: Tensor,
    *,
    ref_prediction: Tensor | None = None,
    ref_mse: Tensor | None = None,
    beta: float = 5000.0,
) -> DiffusionDPOOutput:
    """−log σ(z), z = −(β/2)·[(m_w − m_l) − (r_w − r_l)] (arXiv 2311.12908, eq. 14, T·ω(λ) and 1/M taken into β).

    m and r are mean squared errors of policy and reference over all elements of a sample, as in the paper's published
    code. dL/dm_w = (β/2)·σ(−z), dL/dm_l = −(β/2)·σ(−z).

    Args:
        prediction: [2B, ...] the denoiser's output, preferred samples first; floating. Only this gets a gradient.
        target: [2B, ...] what it should have predicted (the noise ε, or v); same noise and timestep within a pair.
        ref_prediction: [2B, ...] the reference's output for the same inputs; or
        ref_mse: [2B] `sample_mse(ref_prediction, target)`, computed before.
        beta: above 0. 5000 is the paper's value for Stable Diffusion's latents.

    Raises:
        ValueError: naming the argument, what it was and what it should be.

    Example:
        >>> import torch
        >>> from sdpo_kernels import diffusion_dpo
        >>> prediction, noise = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
        >>> diffusion_dpo(prediction, noise, ref_mse=torch.ones(2)).loss
        tensor(0.6931)
    """
    if not (isinstance(beta, (int, float)) and 0 < beta < math.inf):
        raise ValueError(f"beta: was {beta!r}, must be a finite number above 0")
    _check_pairs("prediction", prediction)

    # in PairLogps the errors take the place of log-probs; the loss negates them
    mse = sample_mse(prediction, target)
    chosen, rejected = mse.chunk(2)
    ref_chosen, ref_rejected = _reference_mse(prediction, target, ref_prediction, ref_mse).to(mse).chunk(2)
    counts = torch.ones_like(chosen)  # an error has no tokens
    pair = PairLogps(chosen, rejected, ref_chosen, ref_rejected, counts, counts)

    chosen_rewards = -(beta / 2) * (chosen.detach() - ref_chosen)
    rejected_rewards = -(beta / 2) * (rejected.detach() - ref_rejected)
    return DiffusionDPOOutput(
        loss=pair_loss("diffusion_dpo", pair, beta).mean(),
        chosen_mse=chosen.detach(),
        rejected_mse=rejected.detach(),
        ref_chosen_mse=ref_chosen,
        ref_rejected_mse=ref_rejected,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        margins=chosen_rewards - rejected_rewards,
        accuracy=(chosen_rewards > rejected_rewards).to(mse.dtype),
    )


def paired_noise(x0: Tensor, alphas_cumprod: Tensor, generator: torch.Generator | None = None) -> PairedNoise:
    """x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε (DDPM, arXiv 2006.11239, eq. 4) with one t and one ε per pair.

    Args:
        x0: [2B, ...] clean samples, preferred ones first; floating.
        alphas_cumprod: [T] ᾱ, floating, each in [0, 1] (not checked: that would synchronise); t is drawn uniformly
            from [0, T).
        generator: on x0's device; None: torch's default one.

    Raises:
        ValueError: naming the argument, what it was and what it should be.

    Example:
        >>> import torch
        >>> from sdpo_kernels import paired_noise
        >>> drawn = paired_noise(torch.zeros(4, 1, 8, 8), torch.linspace(0.99, 0.01, 100))
        >>> torch.equal(drawn.noise[:2], drawn.noise[2:]), torch.equal(drawn.timesteps[:2], drawn.timesteps[2:])
        (True, True)
    """
    _check_pairs("x0", x0)
    if alphas_cumprod.dim() != 1 or not alphas_cumprod.is_floating_point() or alphas_cumprod.shape[0] == 0:
        raise ValueError(
            f"alphas_cumprod: was {alphas_cumprod.dtype} of shape {list(alphas_cumprod.shape)}, "
            "must be floating [T], T >= 1"
        )

    # drawn for half the batch and repeated: both samples of a pair share them
    half = (x0.shape[0] // 2, *x0.shape[1:])
    timesteps = torch.randint(alphas_cumprod.shape[0], half[:1], generator=generator, device=x0.device).repeat(2)
    noise = torch.randn(half, generator=generator, device=x0.device, dtype=x0.dtype)
    noise = torch.cat([noise, noise])
    kept = alphas_cumprod.to(x0.device)[timesteps].reshape(-1, *[1] * (x0.dim() - 1))
    return PairedNoise(kept.sqrt().to(x0) * x0 + (1 - kept).sqrt().to(x0) * noise, timesteps, noise)


def sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of (prediction − target)² over all but the first dimension, without a float32 copy of either.

    Squares are float32, their sum is float64, whatever the inputs' dtypes. The gradient is 2·(prediction − target)/M·g,
    rounded once to prediction's dtype. Both are computed on a small piece at a time, for any strides. Only `prediction`
    gets a gradient, and there is no second derivative.

    Args:
        prediction, target: [N, ...] of one shape with at least two dimensions, M >= 1 elements per sample; floating;
            their dtypes may differ. N may be 0.

    Returns:
        [N] float32 (float64 if prediction or target is).

    Raises:
        ValueError: naming the argument, what it was and what it should be; also if target requires a gradient.

    Example:
        >>> import torch
        >>> from sdpo_kernels import sample_mse
        >>> sample_mse(torch.full((2, 3, 4, 4), 3.0, dtype=torch.bfloat16), torch.ones(2, 3, 4, 4))
        tensor([4., 4.])
    """
    if prediction.dim() < 2 or not prediction.is_floating_point() or prediction.shape[1:].numel() == 0:
        raise ValueError(
            f"prediction: was {prediction.dtype} of shape {list(prediction.shape)}, "
            "must be floating [N, ...] with elements in every sample"
        )
    if target.shape != prediction.shape or not target.is_floating_point():
        raise ValueError(
            f"target: was {target.dtype} of shape {list(target.shape)}, "
            f"must be floating of shape {list(prediction.shape)} as prediction is"
        )
    if target.device != prediction.device:
        raise ValueError(f"target: was on {target.device}, must be on {prediction.device} as prediction is")
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError("target: required a gradient, must not: it would get none; give target.detach()")
    return _sample_mse(prediction, target)


@torch.library.custom_op("sdpo_kernels::sample_mse", mutates_args=())
def _sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """[N]."""
    sums = prediction.new_zeros(prediction.shape[0], dtype=torch.float64)
    for piece in _pieces(prediction.shape, PIECE.get(prediction.device.type, PIECE_ELSEWHERE)):
        squares = _difference(prediction, target, piece).square_()
        sums[piece[0]] += squares.flatten(1).sum(1, dtype=torch.float64)
    return (sums / prediction.shape[1:].numel()).to(_result_dtype(prediction, target))


@_sample_mse.register_fake
def _(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction.new_empty(prediction.shape[0], dtype=_result_dtype(prediction, target))


@torch.library.custom_op("sdpo_kernels::sample_mse_backward", mutates_args=())
def _gradient(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """dL/dprediction [N, ...] in prediction's dtype."""
    out = torch.empty_like(prediction)
    slopes = 2 * grad / prediction.shape[1:].numel()
    slopes = slopes.reshape(-1, *[1] * (prediction.dim() - 1))
    for piece in _pieces(prediction.shape, PIECE.get(prediction.device.type, PIECE_ELSEWHERE)):
        out[piece] = _difference(prediction, target, piece).mul_(slopes[piece[0]])
    return out


@_gradient.register_fake
def _(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    return torch.empty_like(prediction)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _gradient(grad, *ctx.saved_tensors), None


_sample_mse.register_autograd(_backward, setup_context=_setup_context)


def _pieces(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Slices of the leading dimensions that split `shape` into pieces of at most `limit` elements, each index once."""
    inner = math.prod(shape[1:])
    if inner <= limit:
        step = limit // inner
        yield from ((slice(start, start + step),) for start in range(0, shape[0], step))
    else:
        for index in range(shape[0]):
            yield from ((slice(index, index + 1), *rest) for rest in _pieces(shape[1:], limit))


def _difference(prediction: Tensor, target: Tensor, piece: tuple[slice, ...]) -> Tensor:
    """prediction − target of one piece, as a new tensor of the result's dtype."""
    dtype = _result_dtype(prediction, target)
    return prediction[piece].to(dtype, copy=True).sub_(target[piece])


def _result_dtype(prediction: Tensor, target: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (prediction.dtype, target.dtype) else torch.float32


def _reference_mse(prediction: Tensor, target: Tensor, ref_prediction: Tensor | None, ref_mse: Tensor | None) -> Tensor:
    """[2B], without gradient."""
    if (ref_prediction is None) == (ref_mse is None):
        was = "None" if ref_mse is None else "given together with ref_prediction"
        raise ValueError(f"ref_mse: was {was}, must be given, or else ref_prediction: one of the two")
    if ref_prediction is not None:
        if ref_prediction.shape != prediction.shape:
            raise ValueError(
                f"ref_prediction: was of shape {list(ref_prediction.shape)}, "
                f"must be {list(prediction.shape)} as prediction is"
            )
        return sample_mse(ref_prediction.detach(), target)
    assert ref_mse is not None
    if ref_mse.shape != prediction.shape[:1] or not ref_mse.is_floating_point():
        raise ValueError(
            f"ref_mse: was {ref_mse.dtype} of shape {list(ref_mse.shape)}, must be floating [{prediction.shape[0]}]"
        )
    return ref_mse.detach()


def _check_pairs(name: str, batch: Tensor) -> None:
    if batch.dim() < 2 or batch.shape[0] < 2 or batch.shape[0] % 2 or not batch.is_floating_point():
        raise ValueError(
            f"{name}: was {batch.dtype} of shape {list(batch.shape)}, must be floating [2B, ...], preferred half first"
        )
