"""The patch against the function of TRL 1.15 and later, with every argument. Its trainers: test_trl_trainers.py."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from sdpo_kernels.backends.base import EXTRAS
from sdpo_kernels.integrations.trl import FusedHead, patch
from tests.reference import extras_of, logits_of, target_logps

seam = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL is not importable (make bench-env installs it)")

ROWS, WIDTH, VOCAB, CHUNK = 37, 24, 301, 64
NAMES = ("log_probs", *EXTRAS)


@pytest.fixture(scope="module")
def both():
    """TRL's apply and ours."""
    theirs = seam.ChunkedLogProbFunction
    assert not isinstance(theirs, FusedHead)
    return theirs.apply, FusedHead(theirs).apply


def make_problem(bias=True, dtype=torch.float32, rows=ROWS, width=WIDTH, vocab=VOCAB):
    """hidden, weight, bias and targets, and gradients for log-probs and entropy."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, spread=1.0):
        return torch.randn(*shape, generator=generator) * spread

    tensors = {"hidden": normal(rows, width).to(dtype), "weight": normal(vocab, width, spread=0.5).to(dtype)}
    tensors["bias"] = normal(vocab).to(dtype) if bias else None
    targets = torch.randint(vocab, (rows,), generator=generator)
    return tensors, targets, {"log_probs": normal(rows), "entropy": normal(rows)}


def found(apply, problem, *options, trains=("hidden", "weight", "bias"), grads=("log_probs", "entropy")):
    """The five outputs and the three gradients, each None if there is none."""
    tensors, targets, from_above = problem
    leaves = {n: None if t is None else t.clone().requires_grad_(n in trains) for n, t in tensors.items()}
    out = apply(leaves["hidden"], leaves["weight"], leaves["bias"], targets, *options)
    assert isinstance(out, tuple)
    answers = dict(zip(NAMES, out, strict=True))
    assert {n for n, t in answers.items() if t is not None and t.requires_grad} <= {"log_probs", "entropy"}
    wanted = [name for name in grads if answers[name] is not None and answers[name].requires_grad]
    torch.autograd.backward([answers[name] for name in wanted], [from_above[name] for name in wanted])
    return answers | {f"d_{n}": None if t is None else t.grad for n, t in leaves.items()}


def assert_near(mine, theirs, tolerance=5e-6):
    """Relative to the largest value, or to 1; shapes, dtypes and Nones equal."""
    for name, right in theirs.items():
        if right is None:
            assert mine[name] is None, name
            continue
        assert (mine[name].shape, mine[name].dtype) == (right.shape, right.dtype), name
        if right.dtype == torch.bool:
            assert torch.equal(mine[name], right), name
        elif right.numel():
            error = (mine[name].double() - right.double()).abs().max() / max(1.0, right.abs().max().item())
            assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",), ("weight",), ("bias",), ()], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"), list(itertools.product((1.0, 0.7), (None, 5.0), (1.0, 0.3)))
)
def test_equals_trl_in_float32(both, temperature, softcap, scale, bias, trains):
    problem = make_problem(bias)
    for grads in (("log_probs", "entropy"), ("log_probs",), ("entropy",)):
        theirs, mine = (
            found(apply, problem, temperature, CHUNK, softcap, scale, trains=trains, grads=grads) for apply in both
        )
        assert_near(mine, theirs)


@pytest.mark.parametrize("outputs", [c for n in range(5) for c in itertools.combinations(EXTRAS, n)], ids=str)
def test_requested_outputs(both, outputs):
    for names in (outputs, ("log_probs", *outputs), list(outputs)):
        theirs, mine = (found(apply, make_problem(), 0.9, CHUNK, None, 1.0, names) for apply in both)
        assert_near(mine, theirs)
        assert {name for name in EXTRAS if mine[name] is not None} == set(outputs)


def test_temperature_divides_the_softcapped_logit(both):
    tensors, targets, _ = problem = make_problem()
    z = logits_of(**tensors, temperature=0.5, logit_scale=2.0, softcap=3.0)
    for apply in both:
        answers = found(apply, problem, 0.5, CHUNK, 3.0, 2.0)
        assert torch.allclose(answers["log_probs"], target_logps(z, targets), atol=1e-5)
        assert torch.allclose(answers["mean_logits"], extras_of(z, targets)["mean_logits"], atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 64, 300, 301, 32768])
def test_chunk_size_changes_nothing(both, chunk):
    theirs, mine = (found(apply, make_problem(), 1.0, chunk) for apply in both)
    assert_near(mine, theirs)
    assert_near(mine, found(both[1], make_problem(), 1.0, CHUNK), tolerance=1e-12)


def test_no_rows(both):
    problem = make_problem(rows=0)
    theirs, mine = (found(apply, problem, 1.0, CHUNK) for apply in both)
    assert_near(mine, theirs)
    assert not mine["d_weight"].any()


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_dtypes_as_trls(both, hidden, weight, autocast):
    tensors, targets, above = make_problem()
    tensors = {n: t.to(hidden if n == "hidden" else weight) for n, t in tensors.items()}
    for n in tensors:  # so that both round the same numbers
        tensors[n] = tensors[n].bfloat16().to(tensors[n].dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, mine = (found(apply, (tensors, targets, above), 1.0, CHUNK) for apply in both)
    rounded = autocast or hidden == torch.bfloat16 or weight == torch.bfloat16
    theirs["is_top1"] = mine["is_top1"]  # bf16 logits tie
    assert_near(mine, theirs, tolerance=0.1 if rounded else 1e-5)


def test_bfloat16_is_nearer_to_float64_than_trl(both):
    problem = make_problem(dtype=torch.bfloat16, rows=256, width=128, vocab=8000)
    tensors, targets, above = problem
    wide = {n: t.double().requires_grad_() for n, t in tensors.items()}
    right = target_logps(logits_of(**wide), targets)
    right.backward(above["log_probs"].double())
    theirs, mine = (found(apply, problem, 1.0, 32768, None, 1.0, ("log_probs",)) for apply in both)
    errors = [(side["log_probs"].double() - right).abs().max() for side in (mine, theirs)]
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3
    for name, leaf in wide.items():
        mine_off, theirs_off = ((side[f"d_{name}"].double() - leaf.grad).norm() for side in (mine, theirs))
        assert mine_off <= theirs_off, name


def test_a_tie_with_an_earlier_token_is_the_one_difference_in_top1(both):
    tensors = {"hidden": torch.ones(2, 4), "weight": torch.zeros(6, 4), "bias": None}
    problem = tensors, torch.tensor([0, 3]), {"log_probs": torch.ones(2), "entropy": torch.ones(2)}
    theirs, mine = (found(apply, problem, 1.0, CHUNK)["is_top1"] for apply in both)
    assert theirs.tolist() == [True, False]
    assert mine.tolist() == [True, True]


def test_policy_with_metrics_and_reference_without_get_the_same_bits(both):
    problem = make_problem(dtype=torch.bfloat16)
    policy, reference = (
        found(both[1], problem, 1.0, CHUNK, None, 1.0, outputs) for outputs in (("entropy", "is_top1"), ("log_probs",))
    )
    assert torch.equal(policy["log_probs"], reference["log_probs"])


def test_torch_compile_uses_ours():
    from trl.trainer import utils

    tensors, targets, _ = make_problem(bias=False, dtype=torch.bfloat16)
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()

    def log_probs(hidden, weight):
        head = utils._ChunkedLogProbFunction
        return head.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ("log_probs",))[0]

    right = target_logps(logits_of(hidden.double(), weight.double()), targets)
    off = []
    for patched in (True, False):
        torch._dynamo.reset()
        with patch() if patched else contextlib.nullcontext():
            answer = torch.compile(log_probs, backend="eager", fullgraph=patched)(hidden, weight)
        off.append((answer.double() - right).abs().max().item())
    assert off[0] < 1e-5
    assert off[1] > 1e-3  # TRL's own
