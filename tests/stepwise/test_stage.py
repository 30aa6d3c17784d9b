"""A stage: its first loss is ln 2 however it trains; which models policy and reference are; what LoRA saves."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_kernels.stepwise import state
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.load import load_model, weights_hash
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.references import scorer as reference_module
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.training.trainer import StageTrainer
from tests.stepwise import runs

LN2 = math.log(2)
WAYS = {
    "fp32": {},
    "bf16": {"trainer": {"bf16": True}},
    "accumulation": {"trainer": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}},
    "checkpointing": {"trainer": {"gradient_checkpointing": True}},
    "lora": {"lora": {"r": 2}},
    "lora bf16": {"lora": {"r": 2}, "trainer": {"bf16": True}},
    "lora on bf16 weights": {"lora": {"r": 2}, "dtype": "bfloat16"},
    "lora checkpointing": {"lora": {"r": 2}, "trainer": {"gradient_checkpointing": True}},
    "everything": {
        "lora": {"r": 2},
        "trainer": {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    },
    "padded": {"batching": "padded"},
    "padded bf16": {"batching": "padded", "trainer": {"bf16": True}},
    "robust": {"loss": "robust", "loss_options": {"label_smoothing": 0.1}},
    "smoothed": {"loss_options": {"label_smoothing": 0.1}},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_stage_starts_at_ln_2_and_then_moves(tmp_path, model, way):
    manifest = runs.train(runs.configured(tmp_path, model, **WAYS[way]))
    lines = runs.metrics(tmp_path / "run")
    for stage in manifest["stages"]:
        assert stage["first_loss"] == pytest.approx(LN2, abs=1e-3)
        first, *later = [line for line in lines if line["stage/index"] == stage["index"]]
        assert first["loss"] == stage["first_loss"]
        assert abs(first["rewards/margins"]) < 1e-2
        assert first["grad_norm"] > 0
        assert all(abs(line["loss"] - LN2) > 1e-5 for line in later)


def test_stages_can_have_their_own_trainer_settings(tmp_path, model):
    """accelerate and TensorBoard keep global state: a stage must not inherit another's."""
    path = runs.write_settings(tmp_path, model, sizes=(8, 8), trainer={"report_to": "tensorboard"})
    settings = [
        "stages.1.trainer={bf16: true, gradient_accumulation_steps: 2, learning_rate: 0.005}",
        "stages.1.beta=0.3",
        "stages.1.epochs=2",
    ]
    manifest = runs.train(load_config(path, settings))
    assert [stage["steps"] for stage in manifest["stages"]] == [2, 2]
    assert [stage["beta"] for stage in manifest["stages"]] == [0.1, 0.3]
    assert [stage["first_loss"] for stage in manifest["stages"]] == pytest.approx([LN2, LN2], abs=1e-3)
    lines = runs.metrics(tmp_path / "run")
    assert [line["learning_rate"] for line in lines if line["step"] == 1] == [0.01, 0.005]
    assert [line["stage/global_step"] for line in lines] == [1, 2, 3, 4]
    for name in ("stage-1-s1", "stage-2-s2"):
        assert len(list((tmp_path / "run" / "tensorboard" / name).rglob("events.*"))) == 1
    # the second stage, alone and from the same start, is the same: nothing was left over from the first
    alone = tmp_path / "alone"
    alone.mkdir()
    data = tmp_path / "data2.jsonl"
    stage = {"name": "s2", "data": str(data), "beta": 0.3, "epochs": 2}
    stage["trainer"] = {"bf16": True, "gradient_accumulation_steps": 2, "learning_rate": 0.005}
    runs.train(runs.configured(alone, tmp_path / "run" / "stage-1-s1", stages=[stage]))
    assert runs.digest(alone / "run/stage-1-s2/model.safetensors") == runs.digest(
        tmp_path / "run/stage-2-s2/model.safetensors"
    )


def test_bf16_computes_in_bf16(tmp_path, model):
    """Log-probs differ a little from those of float32, and the saved weights stay float32."""
    runs.train(runs.configured(tmp_path, model, sizes=(8,)))
    other = tmp_path / "bf16"
    other.mkdir()
    runs.train(runs.configured(other, model, sizes=(8,), trainer={"bf16": True}))
    logps = [runs.metrics(folder / "run")[0]["logps/chosen"] for folder in (tmp_path, other)]
    assert logps[0] != logps[1]
    assert logps[0] == pytest.approx(logps[1], rel=2e-2)
    weights = load_file(other / "run/stage-1-s1/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_accumulated_batches_train_like_one_batch(tmp_path, model):
    """2 x 2 pairs give the same step as 4 pairs."""
    trainer = {"train_sampling_strategy": "sequential", "max_steps": 2, "logging_steps": 1, "optim": "sgd"}
    whole = runs.configured(tmp_path, model, sizes=(8,), trainer=trainer)
    runs.train(whole)
    other = tmp_path / "split"
    other.mkdir()
    split = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    runs.train(runs.configured(other, model, sizes=(8,), trainer=trainer | split, **same_data(tmp_path)))
    for one, two in zip(runs.metrics(tmp_path / "run"), runs.metrics(other / "run"), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert one[name] == pytest.approx(two[name], rel=1e-5, abs=1e-6), name


def same_data(folder):
    return {"stages": [{"name": "s1", "data": str(folder / "data1.jsonl")}]}


@pytest.mark.parametrize(
    ("reference", "policy", "at_ln_2"),
    [
        ("previous", "previous", (True, True)),
        ("initial", "initial", (True, True)),
        ("previous", "initial", (True, False)),
        ("initial", "previous", (True, False)),
        ("none", "previous", (False, False)),
        ("none", "initial", (False, False)),
    ],
)
def test_policy_and_reference_are_the_models_asked_for(tmp_path, model, reference, policy, at_ln_2):
    trainer = {"per_device_train_batch_size": 8}  # one batch a stage, all of its pairs
    settings = {"sizes": (8, 8), "reference": reference, "policy": policy, "trainer": trainer}
    manifest = runs.train(runs.configured(tmp_path, model, **settings))
    first, second = manifest["stages"]
    for stage, expected in zip((first, second), at_ln_2, strict=True):
        assert (abs(stage["first_loss"] - LN2) <= 1e-3) == expected
    run = tmp_path / "run"
    before = {"initial": model, "previous": run / "stage-1-s1"}
    logps = {name: batch_logps(path, tmp_path / "data2.jsonl") for name, path in before.items()}
    (line,) = [line for line in runs.metrics(run) if line["stage/index"] == 2]
    own = logps[policy]
    other = logps[reference] if reference != "none" else torch.zeros_like(own)
    assert line["logps/chosen"] == pytest.approx(float(own[:, 0].mean()), rel=1e-4)
    margins = 0.1 * ((own - other)[:, 0] - (own - other)[:, 1])
    assert line["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert line["loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), abs=1e-4)
    if reference == "none":
        assert second["reference_hash"] is second["gamma_reference"] is None
    else:
        assert second["gamma_reference"] == pytest.approx(float((other[:, 0] - other[:, 1]).mean()), abs=1e-4)
        assert second["reference_hash"] == weights_hash(AutoModelForCausalLM.from_pretrained(before[reference]))


def batch_logps(path, data):
    """Summed log-probs [n, 2] of the pairs in `data`, computed with transformers alone."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(path).double(), AutoTokenizer.from_pretrained(path)
    sums = []
    for row in map(json.loads, data.read_text().splitlines()):
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        for side in ("chosen", "rejected"):
            ids = torch.tensor([tokenizer(row["prompt"] + row[side] + "</s>")["input_ids"]])
            with torch.no_grad():
                logps = network(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            sums.append(logps.gather(1, ids[0, 1:, None])[prompt - 1 :].sum())
    return torch.stack(sums).view(-1, 2)


def test_a_finished_stage_is_an_ordinary_transformers_model(tmp_path, model):
    """transformers loads it without this package, with the cache that generation needs."""
    runs.train(runs.configured(tmp_path, model, sizes=(8,)))
    folder = tmp_path / "run" / "stage-1-s1"
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "reference_logps.safetensors"} <= names
    text = (folder / "config.json").read_text()
    assert "sdpo" not in text
    assert json.loads(text)["use_cache"] is True
    network = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("word1 word2", return_tensors="pt")["input_ids"]
    assert network.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 5
    before = load_file(model / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


# ---- LoRA ----


def test_lora_saves_merged_weights_and_one_adapter_that_stages_pass_on(tmp_path, model):
    settings = {"lora": {"r": 2}, "trainer": {"learning_rate": 0.05}}
    manifest = runs.train(runs.configured(tmp_path, model, **settings))
    run = tmp_path / "run"
    base = load_file(model / "model.safetensors")
    one, two = (load_file(run / name / "model.safetensors") for name in ("stage-1-s1", "stage-2-s2"))
    for before, after in ((base, one), (one, two)):
        assert before.keys() == after.keys()
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if "proj" in name}  # not the head, not the embedding
    # one adapter goes through the stages: a stage's weights are the base plus it
    name = "model.layers.0.mlp.down_proj"
    for stage, weights in (("stage-1-s1", one), ("stage-2-s2", two)):
        adapter = load_file(run / stage / "adapter" / "adapter_model.safetensors")
        a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        delta = weights[f"{name}.weight"] - base[f"{name}.weight"]
        assert torch.allclose(delta, b @ a * (32 / 2), atol=1e-6)
        assert float(delta.abs().max()) > 1e-4
    assert manifest["stages"][1]["reference_hash"] != manifest["stages"][0]["reference_hash"]


def test_on_a_bfloat16_base_a_stage_starts_from_everything_the_previous_one_learned(tmp_path, model):
    """A step of 1e-5 is far below the resolution of bf16 weights: merged and rounded, it would be lost."""
    settings = {"lora": {"r": 2}, "dtype": "bfloat16", "trainer": {"learning_rate": 1e-5}}
    config = runs.configured(tmp_path, model, sizes=(8, 8), **settings)
    runs.train(config)
    folder = str(tmp_path / "run" / "stage-1-s1")
    loaded = load_model(folder, config, Precision(torch.device("cpu")))
    saved = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
    held = {name.replace(".default", ""): p for name, p in loaded.model.named_parameters() if "lora_" in name}
    assert held.keys() == saved.keys()
    assert all(torch.equal(held[name], saved[name]) for name in saved)
    assert any("lora_B" in name and bool(saved[name].any()) for name in saved)
    base = load_model(str(model), config, Precision(torch.device("cpu"))).model.state_dict()
    merged = load_file(Path(folder) / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(merged[name], base[name].float())  # float32 holds it
    lost = (merged[name].bfloat16() == base[name]).float().mean()
    assert lost > 0.9  # what loading the merged weights would have thrown away


def test_lora_on_chosen_modules_only(tmp_path, model):
    runs.train(runs.configured(tmp_path, model, sizes=(8,), lora={"r": 2, "target_modules": ["q_proj"]}))
    base, after = load_file(model / "model.safetensors"), load_file(tmp_path / "run/stage-1-s1/model.safetensors")
    changed = [name for name in base if not torch.equal(base[name], after[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_a_stopped_lora_run_resumes_to_the_same_bits(tmp_path, model, monkeypatch):
    settings = {"lora": {"r": 2}, "trainer": {"save_steps": 2}}
    whole = tmp_path / "whole"
    whole.mkdir()
    runs.train(runs.configured(whole, model, sizes=(8, 16), **settings))
    config = runs.configured(tmp_path, model, sizes=(8, 16), **settings)
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s2", step=4)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    manifest = runs.train(config)
    assert manifest["stages"][1]["resumed_at_step"] == 2
    assert runs.fingerprint(tmp_path / "run") == runs.fingerprint(whole / "run")


class Clock:
    """Ten seconds a training step, and what a process uses at most; it stops before `step` with `error`."""

    def __init__(self, patch, peak, step=None, error=None):
        self.now = 1000.0 * peak  # no process starts where another ends
        genuine = StageTrainer.training_step

        def training_step(trainer, *args, **kwargs):
            if error is not None and trainer.state.global_step == step - 1:
                raise error
            self.now += 10
            return genuine(trainer, *args, **kwargs)

        patch.setattr(StageTrainer, "training_step", training_step)
        names = {name: getattr(time, name) for name in ("strftime", "gmtime")}
        patch.setattr(state, "time", SimpleNamespace(monotonic=lambda: self.now, **names))
        patch.setattr(state, "peak_memory_bytes", lambda: peak)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (KeyboardInterrupt(), 3 * 10 + 2 * 10),  # stopped in step 4, resumed at step 2 of 4
        (SystemExit(), 2 * 10 + 2 * 10),  # as a kill: what came after the checkpoint is not recorded
    ],
)
def test_the_time_of_a_stage_is_that_of_all_processes(tmp_path, model, monkeypatch, error, seconds):
    config = runs.configured(tmp_path, model, sizes=(16,), trainer={"save_steps": 2})
    with monkeypatch.context() as patch:
        Clock(patch, peak=5, step=4, error=error)
        with pytest.raises(type(error)):
            runs.train(config)
    with monkeypatch.context() as patch:
        Clock(patch, peak=3)
        (stage,) = runs.train(config)["stages"]
    assert (stage["resumed_at_step"], stage["seconds"], stage["peak_memory_bytes"]) == (2, seconds, 5)


def test_skipped_rows_are_in_the_manifest_and_the_card(tmp_path, model):
    for number, bad in ((1, 2), (2, 0)):
        runs.write_rows(tmp_path / f"data{number}.jsonl", [*runs.make_rows(4, seed=number), *[{"x": 1}] * bad])
    manifest = runs.train(runs.configured(tmp_path, model, sizes=(4, 4), on_bad_row="skip"))
    assert [(stage["pairs"], stage["skipped"]) for stage in manifest["stages"]] == [(4, 2), (4, 0)]
    cards = [(tmp_path / f"run/stage-{number}-s{number}/README.md").read_text() for number in (1, 2)]
    assert ["| bad rows skipped | 2 |" in card for card in cards] == [True, False]
    assert all("| data | data" in card for card in cards)


# ---- what goes wrong ----


@pytest.mark.parametrize("reference", ["previous", "none"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, model, reference):
    """At this learning rate weights overflow within a few steps; Trainer alone would log a loss of 0."""
    trainer = {"learning_rate": 1e30, "save_steps": 1, "max_grad_norm": 0, "optim": "sgd", "logging_steps": 5}
    config = runs.configured(tmp_path, model, sizes=(40,), reference=reference, trainer=trainer)
    with pytest.raises(
        UserError, match=r"stage s1: the loss became NaN or infinite at step \d+.*a learning rate that is too high"
    ):
        runs.train(config)
    run = tmp_path / "run"
    assert not (run / "stage-1-s1").exists()
    assert json.loads((run / "manifest.json").read_text())["stages"][0]["state"] == "training"
    kept = list((run / ".stage-1-s1").glob("checkpoint-*"))
    assert len(kept) == 1
    assert all(math.isfinite(line["loss"]) for line in runs.metrics(run))


def test_weights_that_become_infinite_at_the_last_step_are_not_published(tmp_path, model):
    trainer = {"learning_rate": 3e38, "max_grad_norm": 0, "optim": "sgd", "max_steps": 1}
    config = runs.configured(tmp_path, model, sizes=(8,), beta=10.0, trainer=trainer)
    with pytest.raises(UserError, match="stage s1: the last step made weights NaN or infinite, first "):
        runs.train(config)
    assert not (tmp_path / "run" / "stage-1-s1").exists()


def test_a_model_with_broken_weights_is_an_error(tmp_path, model):
    folder = runs.make_model(tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][5] = float("inf")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"NaN or infinite.*weights are broken"):
        runs.train(runs.configured(tmp_path, folder))


def test_a_resumed_stage_reads_its_cache(tmp_path, model, monkeypatch):
    """It scores nothing, so never with the weights of the checkpoint."""
    config = runs.configured(tmp_path, model, sizes=(16,), trainer={"save_steps": 1})
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s1", step=3)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    scored = []
    monkeypatch.setattr(reference_module.Scorer, "score", lambda *a: scored.append(a))
    runs.train(config)
    assert scored == []


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"optim": "schedule_free_adamw"}, "stage s1: trainer: .*schedulefree"),
        ({"report_to": "nonesuch"}, r"stage s1: trainer\.report_to: nonesuch is not supported"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 50},
            r"stage s1: trainer\.dataloader_drop_last drops its only batch",
        ),
        ({"fp16": True}, r"trainer\.fp16: was true, which needs a GPU"),
    ],
)
def test_settings_that_trainer_refuses_are_a_one_line_error(tmp_path, model, trainer, message):
    with pytest.raises(UserError, match=message) as error:
        runs.train(runs.configured(tmp_path, model, trainer=trainer))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "stage-1-s1").exists()


@pytest.mark.parametrize(
    "trainer",
    [
        {"dataloader_num_workers": 1},
        {"save_strategy": "no"},
        {"logging_strategy": "no"},
        {"include_num_input_tokens_seen": "all"},
        {"train_sampling_strategy": "sequential"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_trainers_own_settings_work(tmp_path, model, trainer):
    manifest = runs.train(runs.configured(tmp_path, model, trainer=trainer))
    assert [stage["steps"] for stage in manifest["stages"]] == [3, 2]
    assert [stage["first_loss"] for stage in manifest["stages"]] == pytest.approx([LN2, LN2], abs=1e-3)
