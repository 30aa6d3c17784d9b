"""A backend's pair epilogue against autograd through the losses in float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from sdpo_kernels import epilogue_op
from sdpo_kernels.dpo_output import pair_output
from sdpo_kernels.rows import ScoredRows, all_rows, sequence_logps

EPS = torch.finfo(torch.float32).eps
LOSSES: list[tuple[str, dict[str, float]]] = [
    ("sigmoid", {}),
    ("sigmoid", {"label_smoothing": 0.3}),
    ("robust", {"label_smoothing": 0.2}),
    ("hinge", {}),
    ("ipo", {}),
]
LONGEST = 40  # scored tokens of a sequence
WIDTH = LONGEST + 5


def pair_cases(n_pairs: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of `check_pair_epilogue`: sums of sequences, or log-probs of tokens still to be summed."""
    return st.fixed_dictionaries(
        {
            "loss": st.sampled_from(LOSSES),
            "n_pairs": n_pairs,
            "beta": st.floats(0.01, 2.0),
            "spread": st.sampled_from([1.0, 30.0]),
            "rows": st.sampled_from(["none", "scored", "all", "any order"]),
            "seed": st.integers(0, 2**31),
        }
    )


def check_pair_epilogue(
    backend: str, *, loss: tuple[str, dict[str, float]], n_pairs: int, beta: float, spread: float, rows: str, seed: int,
) -> None:  # fmt: skip
    """Loss, sums, metrics and the gradient; `rows`: "none" for sums, else which rows `segment` and `index` hold."""
    name, options = loss
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, LONGEST, (2 * n_pairs,), generator=generator)
    given, logps = None, spread * torch.randn(2 * n_pairs, generator=generator)
    if rows != "none":
        given = rows_of(counts, rows, generator)
        logps = spread * torch.randn(2 * n_pairs * WIDTH, generator=generator)
    ref = spread * torch.randn(2 * n_pairs, generator=generator)
    policy, exact = logps.clone().requires_grad_(), logps.double().requires_grad_()
    found, sums, metrics, _ = epilogue_op.pair_epilogue(
        policy, given, ref, counts, backend=backend, loss_type=name, beta=beta,
        smoothing=options.get("label_smoothing", 0.0),
    )  # fmt: skip
    summed = exact if given is None else sequence_logps(exact, given)
    truth = pair_output(summed, ref.double(), counts, beta=beta, loss_type=name, **options)
    (grad,) = torch.autograd.grad(found, policy)
    (right,) = torch.autograd.grad(truth.loss, exact)
    near = {"rtol": 8 * EPS, "atol": 8 * EPS * beta * spread * LONGEST}
    torch.testing.assert_close(found.double(), truth.loss, **near)
    torch.testing.assert_close(sums.double(), torch.cat([truth.chosen_logps, truth.rejected_logps]), **near)
    wanted = torch.stack([truth.chosen_rewards, truth.rejected_rewards, truth.margins, truth.accuracy])
    torch.testing.assert_close(metrics.double(), wanted, **near)
    torch.testing.assert_close(grad.double(), right, rtol=1e-4, atol=1e-9)


def rows_of(counts: torch.Tensor, which: str, generator: torch.Generator) -> ScoredRows:
    """Rows of a padded batch, as a collator or labels may give them."""
    labels = torch.full((len(counts), WIDTH), -100)
    for sequence, count in enumerate(counts.tolist()):
        labels[sequence, 5 : 5 + count] = 1
    if which == "all":
        return all_rows(labels)  # with prompt and padding, which `counts` does not count
    rows = ScoredRows.from_labels(labels)
    if which == "any order":
        mixed = torch.randperm(len(rows.segment), generator=generator)
        return rows._replace(segment=rows.segment[mixed])
    return rows
