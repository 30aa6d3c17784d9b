"""The reference cache: believed only with its key, count and finite values; made again and said otherwise."""

import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdpo_kernels.integrations.causal_lm import unwrap
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.models.load import weights_hash
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.references import scorer as reference
from sdpo_kernels.stepwise.references.scorer import Scorer, cached_scores, pad_token_id, read_scores, write_scores
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from tests.stepwise import runs

SCORES = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.5]])


class Maker:
    """Gives SCORES and counts how often it was asked."""

    def __init__(self, scores=SCORES):
        self.scores, self.calls = scores, 0

    def __call__(self):
        self.calls += 1
        return self.scores


def test_scored_once_then_read(tmp_path, caplog):
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
def test_anything_off_is_made_again_and_said(tmp_path, caplog, reason):
    path = tmp_path / "r.safetensors"
    write_scores(path, SCORES - 9, "key")
    DAMAGE[reason](path)
    make = Maker()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached_scores(path, "key", 3, make), SCORES)
    assert make.calls == 1
    assert "r.safetensors is made again: " in caplog.text
    assert reason in caplog.text
    assert torch.equal(read_scores(path, "key", 3)[0], SCORES)


def test_a_file_that_is_not_there_is_no_news(tmp_path):
    assert read_scores(tmp_path / "no", "key", 3) == (None, "")


def test_broken_scores_are_never_kept(tmp_path):
    path = tmp_path / "r.safetensors"
    scores = SCORES.clone()
    scores[1:, 0] = -torch.inf
    with pytest.raises(UserError, match=r"r\.safetensors: the model scores 2 of 3 pairs as NaN or infinite.*pair 2"):
        cached_scores(path, "key", 3, Maker(scores))
    assert not path.exists()


# ---- with a model ----


def scorer_of(config):
    prepared = prepare(config)
    args = training_arguments(config, config.stages[0], config.output_dir, config.output_dir)
    scorer = Scorer.of(config, args, pad_token_id(prepared.tokenizer), Reporter(quiet=True))
    return scorer, prepared.stages[0].tokens


def test_the_key_depends_on_everything_a_score_depends_on(tmp_path, model, monkeypatch):
    """Max length and truncation act through the tokens and are in the key besides."""
    keys: dict[str, str] = {}
    genuine = reference.cached_scores

    def note(path, key, count, make):
        keys[name] = key
        return genuine(path, key, count, make)

    monkeypatch.setattr(reference, "cached_scores", note)
    other = runs.make_model(tmp_path / "other", seed=1)
    capped = runs.make_model(tmp_path / "capped", max_position_embeddings=63)  # the same weights, another config
    cases = {
        "one": (model, {}, None),
        "same": (model, {}, None),
        "weights": (other, {}, None),
        "config": (capped, {}, None),
        "max_length": (model, {"max_length": 100}, None),
        "truncation": (model, {"truncation": "keep_end"}, None),
        "padded": (model, {"batching": "padded"}, None),
        "bf16": (model, {"trainer": {"bf16": True}}, None),
        "dtype": (model, {"dtype": "bfloat16", "lora": {}}, None),
        "tokens": (model, {}, -1),
    }
    for name, (path, settings, cut) in cases.items():
        scorer, tokens = scorer_of(runs.configured(tmp_path, path, **settings))
        tokens = tokens.take(range(len(tokens))[:cut])
        loaded = scorer.load(str(path))
        scorer.cached(loaded, weights_hash(loaded.model), tokens, "x", tmp_path / f"{name}.safetensors")
    assert keys["one"] == keys["same"]
    assert len(set(keys.values())) == len(keys) - 1, keys


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_scores_do_not_depend_on_the_batch(tmp_path, model, batching):
    config = runs.configured(tmp_path, model, batching=batching)
    scorer, tokens = scorer_of(config)
    loaded = scorer.load(str(model))
    together = scorer.score(loaded, tokens, "x")
    reverse = scorer.score(loaded, tokens.take(range(len(tokens))[::-1]), "x").flip(0)
    assert together.shape == (len(tokens), 2)
    assert together.dtype == torch.float32
    assert torch.allclose(together, reverse, rtol=3e-7 if batching == "packed" else 1e-5)


def test_packed_bf16_scores_do_not_depend_on_the_batch_at_all(tmp_path, model):
    """What the tight bound of the cache check rests on."""
    config = runs.configured(tmp_path, model, trainer={"bf16": True})
    scorer, tokens = scorer_of(config)
    loaded = scorer.load(str(model))
    assert loaded.by_sequence
    together = scorer.score(loaded, tokens, "x")
    reverse = scorer.score(loaded, tokens.take(range(len(tokens))[::-1]), "x").flip(0)
    assert torch.equal(together, reverse)
    scorer32, _ = scorer_of(runs.configured(tmp_path, model))
    assert not torch.equal(together, scorer32.score(loaded, tokens, "x"))


def test_scoring_leaves_the_weights_alone_and_keeps_no_graph(tmp_path, model):
    scorer, tokens = scorer_of(runs.configured(tmp_path, model))
    loaded = scorer.load(str(model))
    before = weights_hash(loaded.model)
    scores = scorer.score(loaded, tokens, "x")
    assert not scores.requires_grad
    assert weights_hash(loaded.model) == before
    assert unwrap(loaded.model) is loaded.model


def test_the_pad_token_of_a_tokenizer_without_one(model):
    tokenizer = runs.make_tokenizer()
    assert pad_token_id(tokenizer) == 0
    tokenizer.pad_token = "good1"
    assert pad_token_id(tokenizer) == runs.VOCABULARY.index("good1")
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == 0


# ---- in a run that was stopped ----


@pytest.fixture
def stopped(tmp_path, model, monkeypatch):
    """(config, fingerprint of a whole run, the second stage's working folder) of a run stopped in its second stage."""
    whole = tmp_path / "whole"
    whole.mkdir()
    settings = {"trainer": {"logging_steps": 3, "save_steps": 2}}
    runs.train(runs.configured(whole, model, sizes=(8, 16), **settings))
    config = runs.configured(tmp_path, model, sizes=(8, 16), **settings)
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s2", step=3)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    work = tmp_path / "run" / ".stage-2-s2"
    assert (work / "checkpoint-2").is_dir()
    return config, runs.fingerprint(whole / "run"), work / "reference_logps.safetensors"


@pytest.mark.parametrize("damage", ["missing", "stale key", "NaN", "truncated"])
def test_a_resumed_stage_scores_a_bad_cache_again_with_the_model_before_it(stopped, tmp_path, caplog, damage):
    config, wanted, cache = stopped
    if damage == "missing":
        cache.unlink()
    elif damage == "truncated":
        cache.write_bytes(cache.read_bytes()[:-8])
    else:
        columns = load_file(cache)
        scores = torch.stack([columns["chosen"], columns["rejected"]], 1)
        if damage == "NaN":
            scores[3] = float("nan")
            with safe_open(str(cache), "pt") as stored:
                key = stored.metadata()["key"]
            write_scores(cache, scores, key)
        else:
            write_scores(cache, scores * 1.01, "another key")
    spoken = runs.Spoken(tmp_path)
    runs.run(config, spoken.reporter)
    assert runs.fingerprint(tmp_path / "run") == wanted
    assert "going on at step 2" in spoken.text
    said = spoken.text if damage == "missing" else caplog.text
    assert "reference_logps.safetensors is gone and is made again" in said or "is made again: " in said


def test_weights_that_changed_under_a_stopped_stage_are_an_error(stopped, tmp_path):
    config, _, _ = stopped
    weights = tmp_path / "run" / "stage-1-s1" / "model.safetensors"
    state = load_file(weights)
    state["lm_head.weight"][0, 0] += 1
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(UserError, match="stage-1-s1: its weights have changed since this run was started"):
        runs.train(config)
