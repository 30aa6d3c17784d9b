"""What a stage publishes is what it trained: the check at its end, and what injected faults leave behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models import merge
from sdpo_kernels.stepwise.training import end_guard, publish
from sdpo_kernels.stepwise.training.trainer import StageTrainer
from tests.stepwise import runs

STORIES = Path(__file__).parents[4] / "shared" / "data" / "models" / "stories260K"
SENTENCE = "Once upon a time there was a little girl who liked to play in the park"
ENDS = [["embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"]]


def logp(model, ids) -> float:
    """Summed log-prob of one sequence, float64."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.double()
    return float(logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())


def published_and_trained(base: Path, stage: Path, text: str) -> tuple[float, float, float]:
    """Log-probs of `text`, by transformers and PEFT alone: the stage's own weights, base + adapter, the base."""
    ids = AutoTokenizer.from_pretrained(stage)(text, return_tensors="pt")["input_ids"]
    before = logp(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), ids)
    with_adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(stage / "adapter")
    )
    return logp(AutoModelForCausalLM.from_pretrained(stage, dtype=torch.float32), ids), logp(with_adapter, ids), before


# ---- what is published ----


@pytest.mark.parametrize("targets", ENDS, ids="+".join)
def test_a_tied_head_is_published_as_it_was_trained(tmp_path, targets):
    folder = runs.make_model(tmp_path / "m", tie_word_embeddings=True)
    settings = {"lora": {"r": 4, "target_modules": targets}, "trainer": {"learning_rate": 0.05}}
    runs.train(runs.configured(tmp_path, folder, **settings))
    for stage in ("stage-1-s1", "stage-2-s2"):
        published, trained, base = published_and_trained(folder, tmp_path / "run" / stage, "word1 good2 good3 bad4")
        assert published == pytest.approx(trained, rel=1e-5)
        assert abs(trained - base) > 0.1
        assert json.loads((tmp_path / "run" / stage / "config.json").read_text())["tie_word_embeddings"] is False
        adapter = load_file(tmp_path / "run" / stage / "adapter" / "adapter_model.safetensors")
        assert all("lora_" in name for name in adapter)  # and no copy of the embedding


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs shared/data/models/stories260K")
@pytest.mark.parametrize("targets", ENDS, ids="+".join)
def test_a_real_tied_model_is_published_as_it_was_trained(tmp_path, targets):
    rows = [
        {"prompt": "Once upon a time", "chosen": f" there was a {a} cat", "rejected": f" dog {a} the"}
        for a in "abcdefgh"
    ]
    data = runs.write_rows(tmp_path / "stories.jsonl", rows)
    settings = {"lora": {"target_modules": targets}, "trainer": {"learning_rate": 0.05, "max_steps": 4}}
    runs.train(runs.configured(tmp_path, STORIES, stages=[{"name": "s1", "data": str(data)}], **settings))
    published, trained, base = published_and_trained(STORIES, tmp_path / "run" / "stage-1-s1", SENTENCE)
    assert published == pytest.approx(trained, rel=1e-5)
    assert abs(trained - base) > 1.0


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 0.0),
        ({"trainer": {"bf16": True}}, 0.0),
        ({"batching": "padded"}, 0.0),
        ({"reference": "ema"}, 0.0),
        ({"loss": "ld_dpo", "loss_options": {"ld_alpha": 0.5}}, 0.0),
        ({"trainer": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}}, 0.0),
        ({"lora": {"r": 4, "publish": "adapter"}}, 0.0),
        ({"lora": {"r": 4}}, 1e-6),
        ({"lora": {"r": 4}, "batching": "padded"}, 1e-6),
        ({"lora": {"r": 4}, "reference": "ema"}, 1e-6),
        ({"lora": {"r": 4}, "dtype": "bfloat16"}, 2e-2),
        ({"lora": {"r": 4}, "trainer": {"bf16": True}}, 2e-2),
    ],
    ids=str,
)
def test_the_deviations_are_far_below_what_is_allowed(tmp_path, model, monkeypatch, settings, tolerance):
    """Without an adapter the published model gives the same bits."""
    scored, allowed = [], []
    genuine, bound = end_guard._scores, end_guard.end_tolerance
    monkeypatch.setattr(end_guard, "_scores", lambda *a: scored.append(genuine(*a)) or scored[-1])
    monkeypatch.setattr(end_guard, "end_tolerance", lambda *a: allowed.append(bound(*a)) or allowed[-1])
    runs.train(runs.configured(tmp_path, model, **settings))
    assert len(scored) == 4  # two stages, each before and after saving
    for trained, saved in (scored[:2], scored[2:]):
        assert trained.shape == (4, 2)
        assert ((trained - saved).abs() <= tolerance * trained.abs()).all()
    assert all(tolerance * 2 < bound for bound in allowed)


# ---- faults ----


def drop_the_head(staging: Path) -> None:
    weights = load_file(staging / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, staging / "model.safetensors", {"format": "pt"})


def flip_the_tie(staging: Path) -> None:
    config = json.loads((staging / "config.json").read_text())
    config["tie_word_embeddings"] = not config.get("tie_word_embeddings", False)
    (staging / "config.json").write_text(json.dumps(config))


def lose_a_layer(staging: Path) -> None:
    weights = load_file(staging / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(weights, staging / "model.safetensors", {"format": "pt"})


def change_the_scale(staging: Path) -> None:
    config = json.loads((staging / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (staging / "config.json").write_text(json.dumps(config))


def break_saved(patch, fault) -> None:
    genuine = publish._write

    def write(*args):
        staging = genuine(*args)
        fault(staging)
        return staging

    patch.setattr(publish, "_write", write)


def merge_without_untying(patch, _) -> None:
    patch.setattr(merge, "is_tied", lambda model: False)


def save_a_wrong_merge(patch, _) -> None:
    genuine = merge.merge_adapter

    def wrong(*arguments):
        model = genuine(*arguments)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(4.0)
        return model

    patch.setattr(publish, "merge_adapter", wrong)


def gather_old_weights(patch, _) -> None:
    """As if the shards of another model had been gathered."""
    genuine = publish.gathered

    def gathered(trainer):
        assert genuine(trainer) is None
        return {name: weight.flip(0) for name, weight in trainer.model.state_dict().items()}

    patch.setattr(publish, "gathered", gathered)


LORA = {"lora": {"r": 4, "target_modules": ["embed_tokens"]}}
FAULTS = {
    "head dropped": (break_saved, drop_the_head, False, {}, "1 of the weights of a LlamaForCausalLM are missing"),
    "head dropped with lora": (break_saved, drop_the_head, True, LORA, "1 of the weights of a LlamaForCausalLM are"),
    "untied, said to be tied": (break_saved, flip_the_tie, False, {}, "its weights have a head of their own"),
    "tied, said to be untied": (break_saved, flip_the_tie, True, {}, "1 of the weights of a LlamaForCausalLM are"),
    "merged head, said to be tied": (break_saved, flip_the_tie, True, LORA, "its weights have a head of their own"),
    "layer lost": (break_saved, lose_a_layer, False, {}, "the trained model gives"),
    "another config": (break_saved, change_the_scale, False, {"batching": "padded"}, "the trained model gives"),
    "merged into a tied head": (merge_without_untying, None, True, LORA, "the trained model gives"),
    "wrong merge": (save_a_wrong_merge, None, False, {"lora": {"r": 4}}, "the trained model gives"),
    "wrong merge, bfloat16": (save_a_wrong_merge, None, False, {"lora": {"r": 4}, "dtype": "bfloat16"}, "the trained"),
    "wrong shards": (gather_old_weights, None, False, {"reference": "ema"}, "the trained model gives"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_what_was_trained_is_never_published(tmp_path, monkeypatch, fault):
    """The weights stay in the last checkpoint, and the next start publishes them without a training step."""
    inject, how, tied, settings, text = FAULTS[fault]
    folder = runs.make_model(tmp_path / "m", tie_word_embeddings=tied)
    settings = {"sizes": (12,), "trainer": {"learning_rate": 0.05}, **settings}
    whole = tmp_path / "whole"
    whole.mkdir()
    runs.train(runs.configured(whole, folder, **settings))

    config, run = runs.configured(tmp_path, folder, **settings), tmp_path / "run"
    with monkeypatch.context() as patch:
        inject(patch, how)
        for _ in range(2):  # trying again changes nothing
            with pytest.raises(UserError, match="stage s1: what was saved is not what was trained: ") as error:
                runs.train(config)
    message = str(error.value)
    assert text in message
    assert f"Nothing was published; the trained weights are in {run}/.stage-1-s1/checkpoint-3" in message
    if text.startswith("the trained"):
        assert f"answer of pair {tmp_path}/data1.jsonl:" in message
        assert "the saved one" in message
    assert not (run / "stage-1-s1").exists()
    assert (run / ".stage-1-s1" / "checkpoint-3" / "complete.json").exists()

    monkeypatch.setattr(StageTrainer, "training_step", lambda *a, **k: pytest.fail("trained again"))
    assert runs.train(config)["stages"][0]["resumed_at_step"] == 3
    assert runs.fingerprint(run) == runs.fingerprint(whole / "run")
    assert runs.leftovers(run) == []


# ---- saving that fails ----


def fail(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "trainer",
    [{}, {"save_strategy": "no"}, {"save_strategy": "epoch", "max_steps": 2}, {"max_steps": 2, "save_steps": 5}],
    ids=str,
)
@pytest.mark.parametrize("place", ["tokenizer", "model", "files", "card", "rename"])
def test_a_failure_while_saving_costs_no_step(tmp_path, model, monkeypatch, trainer, place):
    """Also where Trainer makes no checkpoint at the end, and where the last step is in the middle of an epoch."""
    settings = {"sizes": (12,), "trainer": trainer}
    whole = tmp_path / "whole"
    whole.mkdir()
    runs.train(runs.configured(whole, model, **settings))

    config, run = runs.configured(tmp_path, model, **settings), tmp_path / "run"
    steps = 2 if "max_steps" in trainer else 3
    with monkeypatch.context() as patch:
        break_at(patch, place)
        with pytest.raises(UserError, match=r"stage s1: is trained, but could not be saved: .*No space left") as error:
            runs.train(config)
    assert f"Its weights are in {run}/.stage-1-s1/checkpoint-{steps}; " in str(error.value)
    assert not (run / "stage-1-s1").exists()

    monkeypatch.setattr(StageTrainer, "training_step", lambda *a, **k: pytest.fail("trained again"))
    assert runs.train(config)["stages"][0]["resumed_at_step"] == steps
    assert runs.fingerprint(run) == runs.fingerprint(whole / "run")


def break_at(patch, place: str) -> None:
    if place == "tokenizer":
        genuine = publish._write

        def write(stage, *args):
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(type(stage.run.tokenizer), "save_pretrained", fail)
                return genuine(stage, *args)

        patch.setattr(publish, "_write", write)
    elif place == "model":
        genuine_write = publish._write

        def write_model(stage, trainer, *args):
            trainer.model.save_pretrained = fail
            return genuine_write(stage, trainer, *args)

        patch.setattr(publish, "_write", write_model)
    elif place == "files":
        patch.setattr(publish, "copy_beside", fail)
    elif place == "card":
        patch.setattr(publish, "model_card", fail)
    else:
        patch.setattr(publish, "publish_folder", fail)


def test_a_full_disk_while_the_checkpoint_is_saved_keeps_the_one_before(tmp_path, model, monkeypatch):
    config = runs.configured(tmp_path, model, sizes=(12,), trainer={"save_steps": 1})
    genuine = StageTrainer.write_extra

    def write_extra(self, checkpoint):
        if self.state.global_step == 3:
            fail()
        genuine(self, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "write_extra", write_extra)
        with pytest.raises(OSError, match="No space left"):
            runs.train(config)
    assert (tmp_path / "run" / ".stage-1-s1" / "checkpoint-2" / "complete.json").exists()
    assert runs.train(config)["stages"][0]["resumed_at_step"] == 2


def test_what_a_failed_check_left_does_not_reach_the_published_folder(tmp_path, model, monkeypatch):
    config = runs.configured(tmp_path, model, sizes=(8,))
    with monkeypatch.context() as patch:
        break_saved(
            patch,
            lambda staging: shutil.copyfile(staging / "config.json", staging / "left.json") and lose_a_layer(staging),
        )
        with pytest.raises(UserError, match="what was saved is not what was trained"):
            runs.train(config)
    runs.train(config)
    assert not (tmp_path / "run" / "stage-1-s1" / "left.json").exists()
