"""The cache of scores: used only if its key, count and values are right; otherwise recomputed with a warning."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.references.cache import cached_scores, read_scores, write_scores

SCORES = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.5]])


ALL = np.arange(3)


class Maker:
    """Returns the `scores` it is asked for, and notes which these were."""

    def __init__(self, scores=SCORES):
        self.scores, self.asked = scores, []

    def __call__(self, missing):
        self.asked.append(missing.tolist())
        return self.scores[missing]


def test_computed_once_then_read(tmp_path, caplog):
    make, path = Maker(), tmp_path / "r.safetensors"
    for _ in range(3):
        assert torch.equal(cached_scores(path, "key", ALL, 3, make), SCORES)
    assert make.asked == [[0, 1, 2]]
    assert caplog.text == ""


def test_only_what_is_asked_for_and_missing_is_computed(tmp_path, caplog):
    """The others are NaN in the file, and a file that has more than is asked for is taken as it is."""
    make, path = Maker(), tmp_path / "r.safetensors"
    scores = cached_scores(path, "key", np.array([1]), 3, make)
    assert scores[1].equal(SCORES[1])
    assert scores[[0, 2]].isnan().all()
    assert read_scores(path, "key", 3) == (None, "it holds NaN or infinite values")
    assert torch.equal(read_scores(path, "key", 3, partial=True)[0].nan_to_num(9), scores.nan_to_num(9))
    assert caplog.text == ""

    cached_scores(path, "key", np.array([1]), 3, make)
    scores = cached_scores(path, "key", np.array([1, 2]), 3, make)
    assert make.asked == [[1], [2]]
    assert scores[1:].equal(SCORES[1:])
    assert scores[0].isnan().all()
    assert "r.safetensors: 1 more pairs are scored" in caplog.text

    assert cached_scores(path, "key", ALL, 3, make).equal(SCORES)
    assert cached_scores(path, "key", np.array([0]), 3, make).equal(SCORES)
    assert make.asked == [[1], [2], [0]]
    assert read_scores(path, "key", 3)[0].equal(SCORES)


def nan(path):
    write_scores(path, torch.tensor([[1.0, 2], [3, float("nan")], [5, 6]]), "key")


DAMAGE = {
    "made with another model": lambda path: write_scores(path, SCORES, "other"),
    "it holds 2 pairs, not 3": lambda path: write_scores(path, SCORES[:2], "key"),
    "NaN or infinite": nan,
    "cannot be read": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "it cannot be read": lambda path: path.write_bytes(b""),
    "cannot be read (": lambda path: save_file({"chosen": torch.zeros(3)}, path, {"key": "key"}),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_an_invalid_file_is_recomputed_with_a_warning(tmp_path, caplog, reason):
    path = tmp_path / "r.safetensors"
    write_scores(path, SCORES - 9, "key")
    DAMAGE[reason](path)
    make = Maker()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached_scores(path, "key", ALL, 3, make), SCORES)
    assert make.asked == [[0, 1, 2]]
    assert "r.safetensors is recomputed: " in caplog.text
    assert reason in caplog.text
    assert torch.equal(read_scores(path, "key", 3)[0], SCORES)


def test_a_missing_file_needs_no_reason(tmp_path):
    assert read_scores(tmp_path / "no", "key", 3) == (None, "")


def test_scores_that_are_not_finite_are_never_saved(tmp_path):
    path = tmp_path / "r.safetensors"
    scores = SCORES.clone()
    scores[1:, 0] = -torch.inf
    with pytest.raises(UserError, match=r"r\.safetensors: the model scores 2 of 3 pairs as NaN or infinite.*pair 2"):
        cached_scores(path, "key", ALL, 3, Maker(scores))
    with pytest.raises(UserError, match=r"scores 1 of 2 pairs .*the first is pair 3;"):
        cached_scores(path, "key", np.array([0, 2]), 3, Maker(scores))
    assert not path.exists()


def test_read_scores_reads_what_write_scores_wrote(tmp_path):
    scores = torch.randn(5, 2)
    write_scores(tmp_path / "s.safetensors", scores, "key")
    read, _ = read_scores(tmp_path / "s.safetensors", "key", 5)
    assert torch.equal(read, scores)
