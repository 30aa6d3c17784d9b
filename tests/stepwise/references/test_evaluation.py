"""Accuracies, γ and rewards by hand; evaluation pairs and their stored log-probs."""

import pytest
import torch

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.pairs import Pair
from sdpo_kernels.stepwise.data.tokenize import tokenize_pairs
from sdpo_kernels.stepwise.references.cache import write_scores
from sdpo_kernels.stepwise.references.evaluation import EVAL_FILE, EvalData, summarise
from tests.stepwise import runs

LOGPS = torch.tensor([[-4.0, -6.0], [-9.0, -8.0], [-5.0, -5.0], [-2.0, -3.0]])
COUNTS = torch.tensor([[1, 6], [9, 2], [1, 1], [2, 3]])
REFERENCE = torch.tensor([[-5.0, -6.0], [-9.0, -9.0], [-4.0, -5.0], [-2.0, -5.0]])


def test_scores_by_hand():
    scores = summarise(LOGPS, COUNTS, REFERENCE, beta=0.5)
    assert scores["pairs"] == 4
    assert scores["pair_accuracy"] == 0.5  # a tie is not right
    # by the token: -4 < -1, -1 > -4, tie, and -1 against -1 a tie
    assert scores["pair_accuracy_per_token"] == 0.25
    assert scores["pair_ties"] == 0.25
    assert (scores["logps_chosen"], scores["logps_rejected"]) == (-5.0, -5.5)
    assert scores["gamma"] == pytest.approx((2 - 1 + 0 + 1) / 4)
    # rewards: .5 > 0, 0 < .5, -.5 < 0, 0 < 1
    assert scores["reward_accuracy"] == 0.25
    assert scores["reward_ties"] == 0.0
    assert scores["reward_margin"] == pytest.approx((0.5 - 0.5 - 0.5 - 1.0) / 4)


def test_no_rewards_without_a_reference_and_zero_against_itself():
    scores = summarise(LOGPS, COUNTS, None, beta=0.5)
    assert scores["reward_accuracy"] is scores["reward_margin"] is None
    own = summarise(LOGPS, COUNTS, LOGPS, beta=0.5)
    assert (own["reward_accuracy"], own["reward_margin"], own["reward_ties"]) == (0.0, 0.0, 1.0)


def test_stored_log_probs_must_exist_and_match_the_pairs(tmp_path):
    pairs = [Pair(**row, where=f"d:{i}") for i, row in enumerate(runs.make_rows(3))]
    tokens = tokenize_pairs(pairs, runs.make_tokenizer(), max_length=64, truncation="keep_start")
    data = EvalData(tokens, tmp_path, 0.1, "initial")
    assert torch.equal(data.dataset(None).ref_logps, torch.zeros(3, 2))
    with pytest.raises(UserError, match=rf"{EVAL_FILE}: is missing"):
        data.dataset(tmp_path)
    write_scores(tmp_path / EVAL_FILE, LOGPS, "key")
    with pytest.raises(UserError, match="it holds 4 pairs, not 3"):
        data.dataset(tmp_path)
    write_scores(tmp_path / EVAL_FILE, LOGPS[:3], "key")
    assert torch.equal(data.dataset(tmp_path).ref_logps, LOGPS[:3])
