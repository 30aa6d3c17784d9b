"""Scores of a model: what their cache key depends on, what they do not depend on, and a stopped run's cache."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdpo_kernels.integrations.causal_lm import unwrap
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.models.load import weights_hash
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.references import scorer as scorer_module
from sdpo_kernels.stepwise.references.cache import write_scores
from sdpo_kernels.stepwise.references.scorer import Scorer, pad_token_id
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from tests.stepwise import runs


def scorer_of(config):
    prepared = prepare(config)
    args = training_arguments(config, config.stages[0], config.output_dir, config.output_dir)
    scorer = Scorer.of(config, args, pad_token_id(prepared.tokenizer), Reporter(quiet=True))
    return scorer, prepared.stages[0].tokens


def test_the_key_depends_on_everything_a_score_depends_on(tmp_path, model, monkeypatch):
    """Max length and truncation change the tokens, and are in the key as well."""
    keys: dict[str, str] = {}
    genuine = scorer_module.cached_scores

    def note(path, key, *rest):
        keys[name] = key
        return genuine(path, key, *rest)

    monkeypatch.setattr(scorer_module, "cached_scores", note)
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
        "unshared": (model, {"prefix_sharing": "off"}, None),
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


def test_shared_prompts_change_scores_by_rounding_only(tmp_path, model):
    found = []
    for sharing in ("auto", "off"):
        scorer, tokens = scorer_of(runs.configured(tmp_path, model, prefix_sharing=sharing))
        found.append(scorer.score(scorer.load(str(model)), tokens, "x"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


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


def test_packed_bf16_scores_are_the_same_to_the_bit_in_any_batch(tmp_path, model):
    """The tight bound of the cache check depends on this."""
    config = runs.configured(tmp_path, model, trainer={"bf16": True})
    scorer, tokens = scorer_of(config)
    loaded = scorer.load(str(model))
    assert loaded.by_sequence
    together = scorer.score(loaded, tokens, "x")
    reverse = scorer.score(loaded, tokens.take(range(len(tokens))[::-1]), "x").flip(0)
    assert torch.equal(together, reverse)
    scorer32, _ = scorer_of(runs.configured(tmp_path, model))
    assert not torch.equal(together, scorer32.score(loaded, tokens, "x"))


def test_scoring_changes_no_weight_and_keeps_no_graph(tmp_path, model):
    scorer, tokens = scorer_of(runs.configured(tmp_path, model))
    loaded = scorer.load(str(model))
    before = weights_hash(loaded.model)
    scores = scorer.score(loaded, tokens, "x")
    assert not scores.requires_grad
    assert weights_hash(loaded.model) == before
    assert unwrap(loaded.model) is loaded.model


def test_the_pad_token_of_a_tokenizer_with_and_without_one(model):
    tokenizer = runs.make_tokenizer()
    assert pad_token_id(tokenizer) == 0
    tokenizer.pad_token = "good1"
    assert pad_token_id(tokenizer) == runs.VOCABULARY.index("good1")
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == 0


# ---- in a run that was stopped ----


@pytest.fixture
def stopped(tmp_path, model, monkeypatch):
    """Of a run stopped in its second stage: config, fingerprint of the same run not stopped, second stage's cache."""
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
def test_a_resumed_stage_recomputes_a_bad_cache_with_the_previous_stages_model(stopped, tmp_path, caplog, damage):
    config, wanted, cache = stopped
    if damage == "missing":
        cache.unlink()
    elif damage == "truncated":
        cache.write_bytes(cache.read_bytes()[:-8])
    else:
        columns = load_file(cache)
        scores = torch.stack([columns["chosen"], columns["rejected"]], 1)
        if damage == "NaN":
            scores[3, 0] = float("nan")
            with safe_open(str(cache), "pt") as stored:
                key = stored.metadata()["key"]
            write_scores(cache, scores, key)
        else:
            write_scores(cache, scores * 1.01, "another key")
    spoken = runs.Spoken(tmp_path)
    runs.run(config, spoken.reporter)
    assert runs.fingerprint(tmp_path / "run") == wanted
    assert "stage 2 of 2 s2: resuming at step 2" in spoken.text
    assert "stage 1 of 2 s1: done earlier in " in spoken.text
    if damage == "missing":
        assert "its reference_logps.safetensors is missing and is recomputed" in spoken.text
    else:
        assert "reference_logps.safetensors is recomputed: " in caplog.text


def test_weights_that_changed_while_a_run_was_stopped_are_an_error(stopped, tmp_path):
    config, _, _ = stopped
    weights = tmp_path / "run" / "stage-1-s1" / "model.safetensors"
    state = load_file(weights)
    state["lm_head.weight"][0, 0] += 1
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(UserError, match="stage-1-s1: its weights have changed since this run was started"):
        runs.train(config)
