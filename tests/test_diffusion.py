"""Diffusion-DPO: per-sample MSE and pair loss against float64, strides, memory, compile, paired noise, the example."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.diffusion import shapes
from examples.diffusion.denoiser import sample
from examples.diffusion.judge import judge
from examples.diffusion.results import clear_win, findings
from examples.diffusion.run import train
from examples.diffusion.train import Settings
from sdpo_kernels import diffusion, diffusion_dpo, paired_noise, sample_mse
from sdpo_kernels.stepwise.common.progress import Reporter
from tests.reference import allocations

ROOT = Path(__file__).resolve().parents[1]
EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mse_and_gradient(prediction, target, grad):
    """Our values, and our gradient of `prediction` for the incoming gradient `grad`."""
    leaf = prediction.detach().requires_grad_()
    mse = sample_mse(leaf, target)
    return mse.detach(), torch.autograd.grad(mse, leaf, grad.to(mse.dtype))[0]


def check_mse(prediction, target, seed=0):
    """Values and gradients within a few roundings of float64's."""
    grad = normal(len(prediction), seed=seed + 9)
    mse, found = mse_and_gradient(prediction, target, grad)
    inner = tuple(range(1, prediction.dim()))
    difference = prediction.double() - target.double()
    truth = difference.square().mean(inner)
    slopes = 2 * difference * grad.reshape(-1, *[1] * len(inner)) / difference[0].numel()
    wide = torch.float64 in (prediction.dtype, target.dtype)
    assert mse.dtype == (torch.float64 if wide else torch.float32)
    assert mse.shape == prediction.shape[:1]
    eps = torch.finfo(mse.dtype).eps
    assert ((mse - truth).abs() <= 4 * eps * truth).all()
    assert found.dtype == prediction.dtype
    rounding = torch.finfo(prediction.dtype)
    assert ((found - slopes).abs() <= (rounding.eps + 4 * eps) * slopes.abs() + rounding.smallest_normal).all()


@given(
    st.integers(1, 5), SHAPES, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(1, 40), st.integers(0, 99)
)
def test_mse_against_float64(n, shape, dtype, target_dtype, piece, seed):
    prediction, target = normal(n, *shape, seed=seed).to(dtype), normal(n, *shape, seed=seed + 1).to(target_dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(diffusion.PIECE, "cpu", piece)
        check_mse(prediction, target, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mse_of_many_pieces(dtype):
    assert diffusion.PIECE["cpu"] < 3 * 300 * 301
    check_mse(normal(2, 3, 300, 301).to(dtype), normal(2, 3, 300, 301, seed=1).to(dtype))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 30))
def test_pieces_cover_each_element_once(shape, limit):
    if 0 in shape[1:]:  # sample_mse rejects empty samples
        shape[1:] = [max(1, size) for size in shape[1:]]
    seen = torch.zeros(shape)
    for piece in diffusion._pieces(shape, limit):
        assert seen[piece].numel() <= limit
        seen[piece] += 1
    assert (seen == 1).all()


VIEWS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("of_target", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_mse_of_any_strides(view, of_target):
    prediction, target = normal(4, 3, 5, 7).float(), normal(4, 3, 5, 7, seed=1).float()
    turned = VIEWS[view](target if of_target else prediction)
    check_mse(prediction, turned) if of_target else check_mse(turned, target)
    torch.library.opcheck(
        diffusion._sample_mse, ((prediction, turned) if of_target else (turned.requires_grad_(), target))
    )


def test_mse_of_no_samples():
    mse, gradient = mse_and_gradient(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4), torch.zeros(0))
    assert mse.shape == (0,)
    assert gradient.shape == (0, 3, 4)


def test_mse_and_loss_gradcheck():
    prediction, target = normal(4, 2, 3).requires_grad_(), normal(4, 2, 3, seed=1)
    assert torch.autograd.gradcheck(lambda p: sample_mse(p, target), prediction)
    reference = normal(4, 2, 3, seed=2)
    assert torch.autograd.gradcheck(
        lambda p: diffusion_dpo(p, target, ref_prediction=reference, beta=3.0).loss, prediction
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    prediction, target = normal(3, 2, 5).to(dtype), normal(3, 2, 5, seed=1).to(dtype)
    torch.library.opcheck(diffusion._sample_mse, (prediction.clone().requires_grad_(), target))
    grad = torch.ones(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(diffusion._gradient, (grad, prediction, target))


def test_compile_without_a_graph_break():
    torch._dynamo.reset()
    leaf, target, reference = (normal(4, 2, 6, seed=seed).bfloat16() for seed in range(3))
    leaf.requires_grad_()

    def function(leaf):
        return diffusion_dpo(leaf * 2, target, ref_prediction=reference, beta=50.0).loss

    found, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf), function(leaf)
    torch.testing.assert_close(found, expected, rtol=4 * EPS, atol=0.0)
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=0.0)


def test_no_float32_copy_in_forward_and_backward(tmp_path):
    prediction, target = (normal(4, 4, 256, 256, seed=seed).bfloat16() for seed in range(2))
    whole = 2 * prediction.numel()  # bytes in bfloat16

    def peak(mse) -> int:
        leaf = prediction.clone().requires_grad_()
        with allocations(tmp_path / "trace.json") as found:
            mse(leaf, target).sum().backward()
        return found["peak"] - whole  # without the gradient itself

    ours = peak(sample_mse)
    naive = peak(lambda p, t: (p.float() - t.float()).square().mean((1, 2, 3)))
    assert ours < 6 * 4 * diffusion.PIECE["cpu"]  # a few pieces: it does not grow with the batch
    assert naive > 4 * whole
    assert ours < naive / 3


def written_out(prediction, target, reference, beta):
    """The mean loss, as in the paper, in float64."""
    m, r = ((p - target).square().flatten(1).mean(1) for p in (prediction, reference))
    (m_w, m_l), (r_w, r_l) = m.chunk(2), r.chunk(2)
    z = -(beta / 2) * ((m_w - m_l) - (r_w - r_l))
    return -z.sigmoid().log().mean(), z


@given(st.integers(1, 4), SHAPES, st.floats(0.01, 20.0), st.integers(0, 99), st.booleans())
def test_loss_and_gradients_in_float64(n_pairs, shape, beta, seed, given_mse):
    target, reference = normal(2 * n_pairs, *shape, seed=seed), normal(2 * n_pairs, *shape, seed=seed + 1)
    leaf = (reference + 0.3 * normal(2 * n_pairs, *shape, seed=seed + 2)).requires_grad_()
    truth, z = written_out(leaf, target, reference, beta)
    chosen = {"ref_mse": sample_mse(reference, target)} if given_mse else {"ref_prediction": reference}
    out = diffusion_dpo(leaf, target, **chosen, beta=beta)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(out.loss, truth, **close)
    torch.testing.assert_close(out.margins, z.detach(), **close)
    torch.testing.assert_close(out.chosen_rewards - out.rejected_rewards, z.detach(), **close)
    assert torch.equal(out.accuracy, (out.chosen_rewards > out.rejected_rewards).double())
    assert not any(field.requires_grad for field in out[1:])
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss in (out.loss, truth)), **close)


def test_slopes_are_half_beta_times_sigma():
    """The coefficients of the methods table: dL/dm_w = +(β/2)·σ(−z), dL/dm_l = −(β/2)·σ(−z)."""
    beta, target = 7.0, torch.zeros(2, 1, dtype=torch.float64)
    leaf = torch.tensor([[0.5], [0.9]], dtype=torch.float64, requires_grad=True)  # m = leaf², dm/dleaf = 2 leaf
    ref_mse = torch.tensor([0.3, 0.7], dtype=torch.float64)
    out = diffusion_dpo(leaf, target, ref_mse=ref_mse, beta=beta)
    (found,) = torch.autograd.grad(out.loss, leaf)
    s = 1 / (1 + math.exp(out.margins.item()))
    assert out.margins.item() == pytest.approx(-3.5 * ((0.25 - 0.81) - (0.3 - 0.7)))
    assert (found / (2 * leaf)).flatten().tolist() == pytest.approx([3.5 * s, -3.5 * s])


def test_policy_equal_to_its_reference_has_loss_ln_2():
    prediction = normal(6, 3, 4).bfloat16()
    out = diffusion_dpo(prediction, torch.zeros(6, 3, 4), ref_prediction=prediction)
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert not out.accuracy.any()  # 0 is not above 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_stay_finite(dtype):
    prediction = torch.tensor([[2.0], [0.0], [0.0], [2.0]], dtype=dtype, requires_grad=True)
    out = diffusion_dpo(prediction, torch.zeros(4, 1), ref_mse=torch.tensor([1.0, 2.0, 0.0, 1.0]), beta=5000)
    (gradient,) = torch.autograd.grad(out.loss, prediction)
    assert torch.isfinite(gradient).all()
    assert out.margins.tolist() == [-2500 * 3, -2500 * -5]  # the first pair is wrong by far, the second right
    assert out.loss.item() == 2500 * 3 / 2
    assert gradient[:, 0].tolist() == [torch.tensor(5000.0, dtype=dtype).item(), 0, 0, 0]  # 2500 / 2 · dm/dp


def test_paired_noise_shares_timestep_and_noise():
    x0, alphas = normal(6, 1, 4, 4), torch.linspace(0.99, 0.01, 50, dtype=torch.float64)
    drawn = [paired_noise(x0, alphas, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    noisy, t, noise = drawn[0]
    assert t.dtype == torch.int64
    assert torch.equal(t[:3], t[3:])
    assert torch.equal(noise[:3], noise[3:])
    assert len({row.sum().item() for row in noise[:3]}) == 3  # one per pair, not one for all
    kept = alphas[t].reshape(6, 1, 1, 1)
    torch.testing.assert_close(noisy, kept.sqrt() * x0 + (1 - kept).sqrt() * noise)
    assert all(torch.equal(*same) for same in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0].noise, drawn[2].noise)
    half = paired_noise(x0.bfloat16(), alphas)
    assert half.noisy.dtype == half.noise.dtype == torch.bfloat16


def test_paired_noise_draws_every_timestep():
    t = paired_noise(torch.zeros(2000, 1), torch.linspace(1, 0, 7), torch.Generator().manual_seed(0)).timesteps
    assert set(t.tolist()) == set(range(7))


BATCH = torch.zeros(4, 2, 3)
ERRORS = {
    "beta: was 0": lambda: diffusion_dpo(BATCH, BATCH, ref_prediction=BATCH, beta=0),
    "beta: was nan": lambda: diffusion_dpo(BATCH, BATCH, ref_prediction=BATCH, beta=math.nan),
    r"prediction: was torch.float32 of shape \[3, 2, 3\]": lambda: diffusion_dpo(
        BATCH[:3], BATCH[:3], ref_mse=torch.zeros(3)
    ),
    r"prediction: was torch.float32 of shape \[0, 2, 3\]": lambda: diffusion_dpo(
        BATCH[:0], BATCH[:0], ref_mse=torch.zeros(0)
    ),
    "ref_mse: was None": lambda: diffusion_dpo(BATCH, BATCH),
    "ref_mse: was given together": lambda: diffusion_dpo(BATCH, BATCH, ref_mse=torch.zeros(4), ref_prediction=BATCH),
    r"ref_mse: was torch.float32 of shape \[2\]": lambda: diffusion_dpo(BATCH, BATCH, ref_mse=torch.zeros(2)),
    "ref_mse: was torch.int64": lambda: diffusion_dpo(BATCH, BATCH, ref_mse=torch.zeros(4, dtype=torch.int64)),
    r"ref_prediction: was of shape \[2, 2, 3\]": lambda: diffusion_dpo(BATCH, BATCH, ref_prediction=BATCH[:2]),
    r"target: was torch.float32 of shape \[4, 2, 2\]": lambda: sample_mse(BATCH, BATCH[..., :2]),
    "target: was torch.int64": lambda: sample_mse(BATCH, BATCH.long()),
    "target: required a gradient": lambda: sample_mse(BATCH, BATCH.clone().requires_grad_()),
    "target: was on meta": lambda: sample_mse(BATCH, BATCH.to("meta")),
    r"prediction: was torch.float32 of shape \[4\]": lambda: sample_mse(BATCH[:, 0, 0], BATCH[:, 0, 0]),
    r"prediction: was torch.float32 of shape \[4, 0\]": lambda: sample_mse(BATCH[:, :0, 0], BATCH[:, :0, 0]),
    "prediction: was torch.int64": lambda: sample_mse(BATCH.long(), BATCH),
    r"x0: was torch.float32 of shape \[3, 2, 3\]": lambda: paired_noise(BATCH[:3], torch.ones(5)),
    r"alphas_cumprod: was torch.float32 of shape \[1, 5\]": lambda: paired_noise(BATCH, torch.ones(1, 5)),
    "alphas_cumprod: was torch.int64": lambda: paired_noise(BATCH, torch.ones(5, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()


def run_quick(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DEMO": "quick", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "examples.diffusion.run", "--output", str(folder), *options]
    return subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_quick_example(tmp_path):
    done = run_quick(tmp_path, "--picture", str(tmp_path / "elsewhere.png"))
    assert done.returncode == 0, done.stderr
    for words in ("circles among valid shapes", "valid shapes among all", "real drawings"):
        assert words in done.stdout
    assert (tmp_path / "elsewhere.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["judge_accuracy"] >= 0.99
    assert record["dpo_losses"][0] == pytest.approx(math.log(2), rel=1e-5)  # the model is still its own reference
    before, after = (torch.load(tmp_path / f"{name}.pt") for name in ("before", "after"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert [model["valid"]["of"] for model in record["models"]] == [80, 80]


def test_judge_distinguishes_the_kinds_and_rejects_the_rest():
    specs = shapes.draw_specs(500, torch.Generator().manual_seed(11))
    for kind in shapes.KINDS:
        verdict = judge(shapes.render(kind, specs))
        right = verdict.valid & (verdict.circle == (kind == "circle"))
        assert right.double().mean() >= 0.99
        assert (verdict.places - specs[:, :2]).abs().max() <= 0.5
    circle, square = (shapes.render(kind, specs) for kind in shapes.KINDS)
    half = torch.cat([circle[:, :, :8], -torch.ones(500, 1, 8, 16)], 2)
    ring = circle - (shapes.render("circle", specs * torch.tensor([1, 1, 0.6, 1])) + 1)
    torn = torch.cat([square[..., :8], square[..., :8].flip(-2)], -1)
    broken = {
        "half": half,
        "ring": ring,
        "torn": torn,
        "noise": normal(500, 1, 16, 16).float(),
        "black": torch.full_like(circle, -1),
    }
    found = {name: judge(images).valid.double().mean().item() for name, images in broken.items()}
    assert max(found.values()) <= 0.15, found


def test_the_example_counts_shares_among_valid_shapes():
    specs = shapes.draw_specs(10, torch.Generator().manual_seed(1))
    drawn = [shapes.render("circle", specs[:6]), shapes.render("square", specs[6:8]), normal(2, 1, 16, 16).float()]
    found = findings("drawn", torch.cat(drawn))
    assert (found.circles.hits, found.circles.count) == (6, 8)
    assert (found.valid.hits, found.valid.count) == (8, 10)
    empty = findings("noise", drawn[2])
    assert empty.circles.record()["share"] is None
    assert not clear_win(found, found)
    assert not clear_win(found, empty)


def test_pairs_differ_only_in_kind():
    chosen, rejected = shapes.shape_pairs(50, torch.Generator().manual_seed(2)).chunk(2)
    ours, others = judge(chosen), judge(rejected)
    assert ours.circle.all()
    assert not others.circle.any()
    torch.testing.assert_close(chosen.amax((1, 2, 3)), rejected.amax((1, 2, 3)))  # the brightness
    light = [(images + 1).sum((1, 2, 3)) for images in (chosen, rejected)]
    torch.testing.assert_close(*light, rtol=0.02, atol=0.0)  # one area
    assert (ours.places - others.places).abs().max() <= 0.75


def test_the_example_is_the_same_for_the_same_seed():
    settings = Settings(steps=2, dpo_steps=2, samples=4)
    models = [train(settings, Reporter(quiet=True)) for _ in range(2)]
    assert models[0][2] == models[1][2]
    drawn = [sample(after, 3, seed=5) for _, after, _ in models]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], sample(models[0][1], 3, seed=6))
