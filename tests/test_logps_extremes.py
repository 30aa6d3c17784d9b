"""linear_logps where arithmetic breaks first: certainty, very unlikely targets, infinities, huge vocabularies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sdpo_kernels import linear_logps
from tests.reference import Case, check, chunk_columns, error, logits_of, random_case, size, target_logps

pytestmark = pytest.mark.usefixtures("each_backend")
EPS = torch.finfo(torch.float32).eps
ALL = 10**12  # stash_bytes that holds everything


def logit_case(logits: list[float], target: int = 0, **options) -> Case:
    """One row whose logits are exactly `logits`: hidden is 1, so d_weight [V, 1] is dL/dlogits."""
    return Case(torch.ones(1, 1), torch.tensor(logits).unsqueeze(1), torch.tensor([target]), **options)


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error relative to the entry itself."""
    return ((found.double() - truth) / truth).abs().max().item()


@pytest.mark.parametrize("columns", [2, 1000])
@pytest.mark.parametrize("stash_bytes", [0, ALL])
@pytest.mark.parametrize("gap", [12.0, 25.0, 40.0, 80.0])
def test_near_certainty_nothing_is_lost(gap, stash_bytes, columns, each_backend):
    case = logit_case([gap, 0.0, -0.5, 0.25, 1.0], settings={"stash_bytes": stash_bytes})
    with chunk_columns(columns):
        ours = case.ours()
    z = torch.tensor(case.weight.squeeze(1).tolist(), dtype=torch.float64)
    rest = z[1:].logsumexp(0) - z[0]  # float64 log_softmax itself loses 1 − p here
    p_rest = torch.sigmoid(rest)
    truth = -(z[1:] - z[1:].logsumexp(0)).exp() * p_rest
    if each_backend == "native" and gap > 47:  # its range ends there: 1 − p is below 1e-20
        assert ours["logps"] == 0
        assert not ours["d_weight"].any()
        return
    assert relative(ours["logps"], -torch.nn.functional.softplus(rest)) <= 4 * EPS
    rounding = EPS * gap  # of z − logsumexp before the exponential
    assert relative(ours["d_weight"][0], p_rest) <= 4 * EPS
    assert relative(ours["d_weight"][1:, 0], truth) <= 4 * rounding
    if gap >= 25:
        assert case.plain()["d_weight"][0] == 0.0  # what plain float32 returns instead


@pytest.mark.parametrize("gap", [12.0, 25.0, 40.0])
def test_near_certainty_a_frozen_head_loses_nothing_either(gap):
    weight = torch.tensor([[gap, 1.0], [0.0, -2.0], [0.5, 3.0]])
    case = Case(torch.tensor([[1.0, 0.0]]), weight, torch.tensor([0]), trains=("hidden",))
    z = weight[:, 0].double()
    q = (z[1:] - z[1:].logsumexp(0)).exp()
    truth = torch.sigmoid(z[1:].logsumexp(0) - z[0]) * (weight[0].double() - q @ weight[1:].double())
    assert relative(case.ours()["d_hidden"][0], truth) <= max(8, gap) * EPS  # z − z_y is rounded at `gap`


@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("gap", [100.0, 300.0])
def test_very_unlikely_targets(gap, trains):
    case = random_case(4, 3, 50, bias=True, trains=trains)
    case.bias[7] = -gap
    case.targets[:] = 7
    with chunk_columns(13):
        ours = case.ours()
    assert ours["logps"].max() < 10 - gap
    check(case, ours)


@pytest.mark.parametrize("bias", [-60.0, -1000.0, 1000.0])
def test_logits_far_from_0(bias):
    case = random_case(6, 5, 150, bias=True, outputs=("entropy",), grad_entropy=torch.randn(6))
    case.bias += bias  # log-probs are the same; every logit is rounded at `bias`
    with chunk_columns(64):
        check(case, case.ours())


@pytest.mark.parametrize("offset", [-30000.0, 1000.0, 30000.0])
def test_exact_logits_far_from_0_cost_no_precision(offset):
    near = (8 * torch.randn(50, generator=torch.Generator().manual_seed(0))).round() / 4  # exact also after the shift
    grad_entropy = torch.tensor([0.7])
    case, shifted = (
        logit_case((near + by).tolist(), 3, outputs=("entropy",), grad_entropy=grad_entropy) for by in (0.0, offset)
    )
    ours, moved = case.ours(), shifted.ours()
    for name in ("logps", "entropy", "d_weight"):
        assert error(moved[name], ours[name]) <= 4 * EPS * size(ours[name]), name


@pytest.mark.parametrize("trains", [("hidden", "weight", "bias"), ("hidden",)], ids="+".join)
def test_columns_masked_out_by_a_bias_of_minus_infinity(trains):
    outputs = ("entropy", "log_sum_sq_probs", "is_top1")
    grad_entropy = torch.ones(5) if "weight" in trains else None
    case = random_case(5, 4, 60, bias=True, outputs=outputs, grad_entropy=grad_entropy, trains=trains)
    case.bias[[0, 1, 2, 3, 17, 59]] = -torch.inf  # the first chunk has no other columns
    case.targets[:] = torch.tensor([5, 6, 16, 18, 58])
    with chunk_columns(4):
        ours = case.ours()
    kept = case.bias.isfinite()
    alone = dataclasses.replace(
        case, weight=case.weight[kept], bias=case.bias[kept], targets=kept.cumsum(0)[case.targets] - 1
    )
    for name in ("d_weight", "d_bias"):
        if ours[name] is not None:
            assert not ours[name][~kept].any()
            ours[name] = ours[name][kept]
    check(alone, ours)


def test_a_masked_target_has_log_prob_minus_infinity():
    case = logit_case([-torch.inf, 1.0, 2.0])
    ours, truth = case.ours(), case.truth()
    assert ours["logps"].item() == -torch.inf
    assert error(ours["d_weight"], truth["d_weight"]) <= 4 * EPS


@pytest.mark.parametrize("trains", [("hidden", "weight"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("columns", [2, 1000])
@pytest.mark.parametrize(
    "logits",
    [
        [torch.nan, 0.0, 1.0, 2.0],
        [0.0, 1.0, 2.0, torch.nan],
        [torch.inf, 0.0, 1.0, 2.0],
        [0.0, torch.inf, 1.0, 2.0],
        [torch.inf, -torch.inf, -torch.inf, -torch.inf],
        [torch.inf, torch.inf, 0.0, 0.0],
        [-torch.inf, -torch.inf, -torch.inf, -torch.inf],
        [-torch.inf, 0.0, torch.nan, -torch.inf],
    ],
    ids=str,
)
def test_nan_where_float64_has_nan(logits, columns, trains):
    case = logit_case(logits, outputs=("entropy",) if len(trains) == 2 else ())
    with chunk_columns(columns):
        ours = case.ours()
    assert case.truth()["logps"].isnan().all()
    assert ours["logps"].isnan().all()
    assert ours[f"d_{trains[-1]}"].isnan().all()
    if "entropy" in ours:
        assert ours["entropy"].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(bad):
    case = random_case(4, 3, 20)
    case.hidden[2, 1] = bad
    ours = case.ours()
    assert ours["logps"].isnan().tolist() == [False, False, True, False]
    assert ours["d_hidden"].isnan().any(1).tolist() == [False, False, True, False]
    assert ours["d_weight"].isnan().all()  # every row adds to every column


def test_bfloat16_sums_of_512_tokens_over_a_vocabulary_of_152k():
    case = random_case(512, 8, 151936, dtype=torch.bfloat16, scale=4.0)
    with torch.no_grad():
        ours = linear_logps(case.hidden, case.weight, case.targets).logps
    truth = torch.cat([
        target_logps(logits_of(x.double(), case.weight.double()), y)
        for x, y in zip(case.hidden.split(64), case.targets.split(64), strict=True)
    ])  # fmt: skip
    assert abs(ours.double().sum() - truth.sum()) < 5e-3
    assert error(ours, truth) <= 16 * EPS * size(truth)


@pytest.mark.slow
def test_more_logits_than_an_int32_can_count():
    n_rows, n_columns = 20000, 120000
    assert n_rows * n_columns > 2**31
    case = random_case(n_rows, 1, n_columns, scale=2.0)
    case.targets[-1] = n_columns - 1
    with torch.no_grad():
        ours = linear_logps(case.hidden, case.weight, case.targets).logps
    looked_at = torch.tensor([0, 1, n_rows // 2, n_rows - 2, n_rows - 1])
    truth = target_logps(logits_of(case.hidden[looked_at].double(), case.weight.double()), case.targets[looked_at])
    assert error(ours[looked_at], truth) <= 4 * EPS * size(truth)
