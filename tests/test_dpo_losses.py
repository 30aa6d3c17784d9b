"""fused_linear_dpo with every loss: weighted tokens and pairs, losses without a reference, sums, torch.compile."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels import fused_linear_dpo, losses
from sdpo_kernels.dpo_output import pair_output
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows
from sdpo_kernels.token_weights import length_weights
from tests.reference import error, logits_of, size, target_logps
from tests.test_dpo import EPS, Batch, with_gradients

pytestmark = pytest.mark.usefixtures("each_backend")
MIXED = [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}, {"name": "sft"}]
EVERY = [*(name for name in losses.loss_names() if name != "diffusion_dpo"), MIXED]


def scored_by_hand(batch: Batch, states: torch.Tensor, weight: torch.Tensor, ld_alpha: float | None):
    """Sums [2B] in which tokens beyond the pair's shorter length weigh ld_alpha."""
    logps = target_logps(logits_of(states, weight, None), batch.labels)
    scored = batch.labels != IGNORE_INDEX
    if ld_alpha is not None:
        counts = scored.sum(1)
        shorter = torch.minimum(*counts.chunk(2)).repeat(2)
        logps = torch.where(scored.cumsum(1) > shorter[:, None], ld_alpha, 1.0) * logps
    return logps.sum(1)


def wpo_weights(batch: Batch) -> torch.Tensor:
    """[B] as in the paper: a token's probability over that of agreeing with a token drawn at random."""
    logits = logits_of(batch.hidden, batch.weight, None)
    token = (target_logps(logits, batch.labels).exp() / (logits.softmax(-1) ** 2).sum(-1)).log()
    scored = batch.labels != IGNORE_INDEX
    return torch.stack([token[i][scored[i]].mean() for i in range(len(scored))]).chunk(2)


@pytest.mark.parametrize("loss", EVERY, ids=lambda loss: loss if isinstance(loss, str) else "sum")
def test_every_loss_from_hidden_states(loss, each_backend):
    batch = Batch(3, 9, 6, 40, seed=3)
    wanted = losses.loss_sum(loss)
    policy = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight)]
    sums = scored_by_hand(batch, *policy, wanted.ld_alpha)
    ref = scored_by_hand(batch, batch.ref_hidden, batch.ref_weight, wanted.ld_alpha)
    counts = (batch.labels != IGNORE_INDEX).sum(1)
    weights = torch.stack(wpo_weights(batch)).sum(0).exp() if wanted.weighs_pairs else None
    pair = losses.PairLogps(*sums.chunk(2), *ref.chunk(2), *counts.chunk(2), weights)
    truth = losses.pair_loss(loss, pair, 0.3).mean()
    right = torch.autograd.grad(truth, policy)

    # in float64 where the backend has it; else float32 sums of up to 40 nats
    served, exact = (batch, 1e-11) if each_backend == "eager" else (batch.cast(torch.float32), 1e-5)
    ways = [served.reference(), {"ref_logps": ref}] + ([{}] if wanted.reference_free else [])
    for reference in ways:
        out, found = with_gradients(served, **reference, beta=0.3, loss_type=loss)
        assert error(out.loss.detach(), truth.detach()) <= exact * max(1.0, truth.abs().item())
        assert all(error(a, b) <= exact * max(1.0, size(b)) for a, b in zip(found, right, strict=True))
        assert error(torch.cat([out.chosen_logps, out.rejected_logps]), sums.detach()) <= exact * size(sums)

    again = pair_output(sums.detach(), ref, counts, pair_weights=weights, beta=0.3, loss_type=loss)
    assert error(again.loss, truth.detach()) <= 1e-11 * max(1.0, truth.abs().item())
    if wanted.reference_free:
        assert error(out.margins, 0.3 * (sums.detach()[:3] - sums.detach()[3:])) <= exact * size(sums)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
def test_an_f_divergence_does_not_take_the_fast_path(loss):
    batch = Batch(3, 9, 6, 40, seed=3).cast(torch.float32)
    plain, js, reverse = (
        with_gradients(batch, **batch.reference(), loss_type=loss, **options)[0].loss
        for options in ({}, {"f_divergence": "js"}, {"f_divergence": "reverse_kl"})
    )
    assert torch.equal(plain, reverse)
    assert abs(plain - js) > 1e-3


def test_rows_in_any_order_of_sequences_get_their_length_weights():
    counts = torch.tensor([1, 3, 2, 2])  # pairs (1, 2) and (3, 2)
    rows = ScoredRows(torch.arange(8), torch.tensor([3, 3, 0, 1, 1, 1, 2, 2]), counts)
    assert length_weights(rows, 0.25).tolist() == [1, 1, 1, 1, 1, 0.25, 1, 0.25]
    scored = torch.tensor([True, True, True, False, True, True, True, True, True])
    rows = ScoredRows(torch.arange(9), torch.tensor([3, 3, 0, 1, 1, 1, 1, 2, 2]), counts)
    assert length_weights(rows, 0.25, scored)[scored].tolist() == [1, 1, 1, 1, 1, 0.25, 1, 0.25]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("dpop", {"dpop_lambda": 5.0}),
        ("ld_dpo", {"ld_alpha": 0.3}),
        ("wpo", {}),
        ("simpo", {}),
        ("sigmoid", {"f_divergence": "alpha", "f_alpha": 0.3}),
        (MIXED, {}),
    ],
    ids=str,
)
def test_losses_compile_without_a_graph_break(loss, options):
    torch._dynamo.reset()
    batch = Batch(2, 6, 5, 40).cast(torch.float32)
    keywords = {**batch.reference(), "loss_type": loss, **options}
    weight = batch.weight.requires_grad_()
    compiled = torch.compile(fused_linear_dpo, fullgraph=True, backend="aot_eager")
    results = [f(batch.hidden, weight, batch.labels, **keywords).loss for f in (compiled, fused_linear_dpo)]
    assert error(*(loss.detach() for loss in results)) <= 4 * EPS * max(1.0, results[1].item())
    a, b = (torch.autograd.grad(loss, weight)[0] for loss in results)
    assert error(a, b) <= 4 * EPS * size(b)


def test_pair_weights_are_for_wpo_only():
    sums, counts = torch.zeros(2), torch.ones(2).long()
    with pytest.raises(ValueError, match=r"^pair_weights: was None, must be \[B\], which 'wpo' needs"):
        pair_output(sums, sums, counts, loss_type="wpo")
    with pytest.raises(ValueError, match=r"^pair_weights: was given, must be None, as only 'wpo' needs"):
        pair_output(sums, sums, counts, pair_weights=torch.ones(1))
