"""The cache of scores: used only if its key, count and values are right; otherwise recomputed with a warning."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.references.cache import cached_scores, read_scores, write_scores

SCORES = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.5]])


class Maker:
    """Returns `scores` and counts its calls."""

    def __init__(self, scores=SCORES):
        self.scores, self.calls = scores, 0

    def __call__(self):
        self.calls += 1
        return self.scores


def test_computed_once_then_read(tmp_path, caplog):
    make, path = Maker(), tmp_path / "r.safetensors"
    for _ in range(3):
        assert torch.equal(cached_scores(path, "key", 3, make), SCORES)
    assert make.calls == 1
    assert caplog.text == ""


def nan(path):
    write_scores(path, torch.tensor([[1.0, 2], [3, float("nan")], [5, 6]]), "key")


DAMAGE = {
    "its key differs": lambda path: write_scores(path, SCORES, "other"),
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
        assert torch.equal(cached_scores(path, "key", 3, make), SCORES)
    assert make.calls == 1
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
        cached_scores(path, "key", 3, Maker(scores))
    assert not path.exists()


def test_read_scores_reads_what_write_scores_wrote(tmp_path):
    scores = torch.randn(5, 2)
    write_scores(tmp_path / "s.safetensors", scores, "key")
    read, _ = read_scores(tmp_path / "s.safetensors", "key", 5)
    assert torch.equal(read, scores)
