"""Runs with `quantization:` from settings to published stages, killed, resumed, scored, and on two ranks."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from sdpo_kernels.cli import main
from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.load import load_model, weights_hash
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.post.expo import extrapolate
from sdpo_kernels.stepwise.score import score_run
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.training import end_guard, publish
from tests.stepwise import ranks_of_a_run as faults
from tests.stepwise import runs
from tests.stepwise.models.test_quantized import WIDE
from tests.stepwise.runs import Child, die

pytestmark = [
    pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes (pip install sdpo-kernels[qlora])"),
    pytest.mark.xdist_group("qlora"),
]

SENTENCE = "word1 good2 good3 bad4 word7"
QUANTIZED = {
    "4 bits": {},
    "4 bits, products in float32": {"compute_dtype": "float32"},
    "8 bits": {"bits": 8},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return runs.make_model(tmp_path_factory.mktemp("wide") / "model", **WIDE)


def settings_of(folder: Path, **more: Any) -> dict[str, Any]:
    """With evaluation data in `folder`."""
    data = folder / "eval.jsonl"
    if not data.exists():
        runs.write_rows(data, runs.make_rows(5, seed=9))
    return {"lora": {"r": 4}, "quantization": {}, "eval_data": str(data)} | more


def adapters(run: Path) -> dict[str, str]:
    """Digests of the adapters and of all else that must not depend on a kill."""
    found = sorted(run.glob("stage-*/adapter/*.safetensors"))
    return {path.relative_to(run).as_posix(): runs.digest(path) for path in found} | runs.fingerprint(run)


def logp(model: Any, stage: Path) -> float:
    """Summed log-prob of SENTENCE, float64."""
    ids = AutoTokenizer.from_pretrained(stage)(SENTENCE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.double()
    return float(logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())


# ---- stages ----


@pytest.mark.parametrize("kind", QUANTIZED)
def test_stages_publish_their_adapter_and_merged_weights_agree_with_it(tmp_path, wide, kind):
    """Stages start at ln 2. Loaded by transformers and PEFT alone, both results are the model that was trained."""
    found = {}
    for way in ("auto", "merged"):
        (tmp_path / way).mkdir()
        settings = settings_of(tmp_path, lora={"r": 4, "publish": way}, quantization=QUANTIZED[kind])
        found[way] = runs.train(runs.configured(tmp_path / way, wide, **settings))
        assert [stage["first_loss"] for stage in found[way]["stages"]] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    alone, merged = (tmp_path / way / "run" for way in ("auto", "merged"))
    assert [stage["weights"] for stage in found["auto"]["stages"]] == ["adapter"] * 2
    assert [stage["weights"] for stage in found["merged"]["stages"]] == ["full"] * 2

    # the next stage starts from base and adapter, so what is published besides changes nothing
    same = adapters(alone)
    assert len(same) == 7
    assert same.items() <= adapters(merged).items()
    assert not [path.name for path in alone.glob("stage-*/*") if path.name in ("model.safetensors", "config.json")]

    options = found["auto"]["config"]["quantization"]
    bits = {"load_in_8bit": True} if options["bits"] == 8 else {"load_in_4bit": True}
    if options["bits"] == 4:
        bits |= {f"bnb_4bit_{name}": options[name] for name in ("compute_dtype",)}
        bits |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    for name in ("stage-1-s1", "stage-2-s2"):
        base = AutoModelForCausalLM.from_pretrained(wide, quantization_config=BitsAndBytesConfig(**bits)).train()
        start, stage = logp(base, alone / name), alone / name
        trained = logp(PeftModel.from_pretrained(base, stage / "adapter").train(), stage)
        full = logp(AutoModelForCausalLM.from_pretrained(merged / name, dtype=torch.float32), stage)
        assert abs(trained - start) > 0.05
        assert full == pytest.approx(trained, rel=1e-2 if kind == "4 bits" else 1e-5)


def test_the_reference_is_the_base_with_the_adapter_of_the_stages_start(tmp_path, wide):
    config = runs.configured(tmp_path, wide, **settings_of(tmp_path))
    manifest = runs.train(config)
    cpu = Precision(torch.device("cpu"))
    starts = [str(wide), str(tmp_path / "run" / "stage-1-s1")]
    wanted = [weights_hash(load_model(start, config, cpu).model) for start in starts]
    assert [stage["reference_hash"] for stage in manifest["stages"]] == wanted
    assert manifest["weights"]["initial"] == wanted[0]
    plain = load_model(str(wide), config.of_full_weights, cpu)
    assert weights_hash(plain.model) != wanted[0]
    assert manifest["environment"]["bitsandbytes"]


MORE = [{"dtype": "bfloat16"}, {"trainer": {"bf16": True, "gradient_checkpointing": True}}, {"batching": "padded"}]


@pytest.mark.parametrize("more", MORE, ids=str)
def test_with_other_precisions_and_batches(tmp_path, wide, more):
    settings = settings_of(tmp_path, lora={"r": 4, "publish": "merged"})
    manifest = runs.train(runs.configured(tmp_path, wide, **settings, **more))
    assert [stage["state"] for stage in manifest["stages"]] == ["done", "done"]
    assert [stage["first_loss"] for stage in manifest["stages"]] == pytest.approx([math.log(2)] * 2, abs=1e-3)


ADAPTERS = [
    {"use_dora": True},
    {"use_rslora": True, "rank_pattern": {"q_proj": 8}},
    {"target_modules": ["q_proj", "lm_head"]},
]


@pytest.mark.parametrize("lora", ADAPTERS, ids=lambda lora: next(iter(lora)))
def test_with_other_adapters(tmp_path, wide, lora):
    settings = settings_of(tmp_path, lora={"r": 4, "publish": "merged", **lora})
    manifest = runs.train(runs.configured(tmp_path, wide, **settings))
    assert [stage["state"] for stage in manifest["stages"]] == ["done", "done"]


@pytest.mark.parametrize("more", [{"reference": "ema"}, {"reference": "multi"}, {"samples": 2}], ids=str)
def test_with_other_references_and_samples(tmp_path, wide, more):
    if more.get("reference") == "multi":
        more = more | {"multi": {"models": [str(runs.make_model(tmp_path / "other", seed=1, **WIDE))]}}
    manifest = runs.train(runs.configured(tmp_path, wide, **settings_of(tmp_path), **more))
    assert [stage["state"] for stage in manifest["stages"]] == ["done", "done"]
    assert (tmp_path / "run" / "stage-2-s2" / "samples.jsonl").exists() == ("samples" in more)


def test_no_model_is_in_memory_when_the_next_is_loaded(tmp_path, wide, monkeypatch):
    alive, from_pretrained = [], AutoModelForCausalLM.from_pretrained

    def counting(*arguments: Any, **options: Any) -> Any:
        if options.get("device_map") != "meta":  # where things are only tried out, no weights are loaded
            alive.append(sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects()))
        return from_pretrained(*arguments, **options)

    gc.collect()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    runs.train(runs.configured(tmp_path, wide, **settings_of(tmp_path)))
    assert alive == [0] * 7  # M_0's evaluation; a start, a check and an evaluation of each stage


def test_shared_prompts_train_the_same_as_two(tmp_path, wide):
    found = []
    for sharing in ("auto", "off"):
        (tmp_path / sharing).mkdir()
        settings = settings_of(tmp_path, quantization=QUANTIZED["8 bits"], prefix_sharing=sharing)
        runs.train(runs.configured(tmp_path / sharing, wide, (8,), **settings))
        found.append(load_file(tmp_path / sharing / "run" / "stage-1-s1" / "adapter" / "adapter_model.safetensors"))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-3, atol=1e-4)


# ---- killed, resumed, changed ----


def dies(moment: str) -> None:
    faults.run_module.write_report = lambda folder: []
    if moment == "training":
        faults.die_at(0, "s2", 2, (0,))
    else:
        publish.publish_folder = lambda *paths: die()


@pytest.mark.parametrize("moment", ["training", "publishing"])
def test_after_a_kill_the_adapters_are_the_same(tmp_path, wide, moment):
    """In another process: the base is quantised again, to the same bits."""
    trainer = {"save_steps": 1}
    yaml = runs.write_settings(tmp_path, wide, (8, 12), trainer=trainer, **settings_of(tmp_path))
    whole = runs.train(load_config(yaml, [f"output_dir={tmp_path / 'whole'}"]))
    arguments = ("train", yaml, f"output_dir={tmp_path / 'killed'}", "--quiet")
    child = Child(tmp_path, *arguments, fault=dies, options=[moment])
    assert child.wait() == -signal.SIGKILL, child.text
    again = Child(tmp_path, *arguments, fault=quick)
    assert again.wait() == 0, again.text

    assert adapters(tmp_path / "killed") == adapters(tmp_path / "whole")
    manifest = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    assert manifest["weights"] == whole["weights"]
    resumed = [stage["resumed_at_step"] for stage in manifest["stages"]]
    assert resumed == ([None, 1] if moment == "training" else [2, None])


def quick() -> None:
    faults.run_module.write_report = lambda folder: []


def test_what_may_change_when_a_run_goes_on(tmp_path, wide):
    yaml = runs.write_settings(tmp_path, wide, (8, 8), **settings_of(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        runs.stop_at(patch, stage="s2", step=1)
        with pytest.raises(KeyboardInterrupt):
            runs.train(load_config(yaml))

    for change, line in {
        "quantization.type=fp4": "quantization.type: nf4 -> fp4",
        "quantization.double=false": "quantization.double: true -> false",
        "quantization={bits: 8}": "quantization.bits: 4 -> 8",
        "quantization=null": "quantization: absent -> null",
    }.items():
        with pytest.raises(UserError) as error:
            runs.train(load_config(yaml, [change]))
        assert f"\n  {line} (the adapter was trained on a base that is quantised in this way)" in str(error.value)

    manifest = runs.train(load_config(yaml, ["lora.publish=merged"]))
    assert [stage["weights"] for stage in manifest["stages"]] == ["adapter", "full"]
    assert (tmp_path / "run" / "stage-2-s2" / "model.safetensors").exists()


def test_an_adapter_that_is_gone_is_an_error(tmp_path, wide):
    config = runs.configured(tmp_path, wide, (4,), **settings_of(tmp_path))
    runs.train(config)
    assert runs.train(config)["stages"][0]["state"] == "done"
    (tmp_path / "run" / "stage-1-s1" / "adapter" / "adapter_model.safetensors").unlink()
    lost = r"stage-1-s1: .*adapter_model.safetensors.* although the stage is finished; put it back"
    with pytest.raises(UserError, match=lost):
        runs.train(config)


# ---- the check at a stage's end ----


def doubled(staging: Path, file: str, part: str) -> None:
    weights = load_file(staging / file)
    weights = {name: weight * (2 if part in name else 1) for name, weight in weights.items()}
    save_file(weights, staging / file, {"format": "pt"})


@pytest.mark.parametrize("way", ["adapter", "merged", "base not dequantised"])
def test_what_is_not_what_was_trained_is_not_published(tmp_path, wide, way, monkeypatch):
    """The last one is the usual way to merge: into the base that was never quantised."""
    settings = settings_of(tmp_path, quantization=QUANTIZED["4 bits, products in float32"])
    settings["lora"] = {"r": 4, "publish": "adapter" if way == "adapter" else "merged"}
    genuine = publish._write

    def write(*arguments: Any) -> Path:
        staging = genuine(*arguments)
        if way == "adapter":
            doubled(staging, "adapter/adapter_model.safetensors", "lora_B")
        elif way == "merged":
            doubled(staging, "model.safetensors", "down_proj")
        return staging

    with monkeypatch.context() as patch:
        patch.setattr(publish, "_write", write)
        if way == "base not dequantised":
            patch.setattr("sdpo_kernels.stepwise.models.merge.copy_dequantized", lambda *models: None)
        with pytest.raises(UserError, match="stage s1: what was saved is not what was trained: log-prob of the"):
            runs.train(runs.configured(tmp_path, wide, **settings))
    assert not (tmp_path / "run" / "stage-1-s1").exists()
    assert runs.train(runs.configured(tmp_path, wide, **settings))["stages"][0]["resumed_at_step"] == 3


DEVIATIONS = [("adapter", {}, 0.0), ("adapter", {"bits": 8}, 0.0), ("merged", {"bits": 8}, 1e-6)]
DEVIATIONS += [("merged", {"compute_dtype": "float32"}, 1e-6), ("merged", {}, 2e-2)]


@pytest.mark.parametrize(("way", "quantization", "tolerance"), DEVIATIONS)
def test_the_deviations_are_far_below_what_is_allowed(tmp_path, wide, monkeypatch, way, quantization, tolerance):
    """The adapter on a base that is loaded again gives the same bits."""
    scored, genuine = [], end_guard._scores
    monkeypatch.setattr(end_guard, "_scores", lambda *a: scored.append(genuine(*a)) or scored[-1])
    settings = {"lora": {"r": 4, "publish": way}, "quantization": quantization}
    runs.train(runs.configured(tmp_path, wide, (8,), **settings))
    trained, saved = scored
    assert ((trained - saved).abs() <= tolerance * trained.abs()).all()


# ---- the other commands ----


def test_check_says_the_bits_and_what_is_published(tmp_path, wide, spoken):
    check_run(runs.configured(tmp_path, wide, **settings_of(tmp_path)), spoken.reporter)
    assert "base       4 bits (nf4, double quantisation), products in bfloat16; its head and embed" in spoken.text
    assert "publishes  the adapter alone (lora.publish: auto)" in spoken.text


def test_score_gives_what_the_run_has_recorded(tmp_path, wide, capsys):
    config = runs.configured(tmp_path, wide, **settings_of(tmp_path))
    manifest = runs.train(config)
    stages = [str(tmp_path / "run" / name) for name in ("stage-1-s1", "stage-2-s2")]
    for models in ([], stages):
        score_run(config, models, [], as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert found[str(wide)]["gamma"] == manifest["initial_eval"]["gamma"]
        assert [found[stage]["gamma"] for stage in stages] == [stage["eval"]["gamma"] for stage in manifest["stages"]]

    # another run has another base for it
    (tmp_path / "other").mkdir()
    other = runs.configured(tmp_path / "other", wide)
    with pytest.raises(
        UserError, match=r"^--model .*stage-1-s1: .* has no full weights, only an adapter for the base of"
    ):
        score_run(other, stages[:1], [str(tmp_path / "eval.jsonl")], as_json=True)


def test_the_command_that_expos_message_names_scales_the_adapter(tmp_path, wide, monkeypatch, capsys):
    runs.train(runs.configured(tmp_path, wide, (8,), **settings_of(tmp_path)))
    stage = tmp_path / "run" / "stage-1-s1"
    with pytest.raises(UserError, match=rf"has no full weights, but an adapter; give {stage}/adapter"):
        extrapolate(wide, stage, tmp_path / "none", 0.5)

    arguments = [str(wide), f"{stage}/adapter", f"{tmp_path}/new", "--alpha", "0.5"]
    monkeypatch.setattr("sys.argv", ["sdpo", "expo", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr()
    before = load_file(stage / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "new" / "adapter_model.safetensors")
    for name, weight in before.items():
        assert torch.equal(after[name], weight * 1.5 if "lora_B" in name else weight)


def test_merged_weights_of_a_quantised_base_are_extrapolated_from_another_stage_alone(tmp_path, wide):
    """From the base most of the difference is its rounding, which would grow by alpha."""
    settings = settings_of(tmp_path, lora={"r": 4, "publish": "merged"})
    runs.train(runs.configured(tmp_path, wide, (4, 4), **settings))
    first, second = (tmp_path / "run" / name for name in ("stage-1-s1", "stage-2-s2"))
    with pytest.raises(
        UserError, match=rf"^{second}: was trained on a base that was quantised, .*give {second}/adapter"
    ):
        extrapolate(wide, second, tmp_path / "new", 0.5)
    assert not (tmp_path / "new").exists()

    extrapolate(first, second, tmp_path / "new", 0.5)
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_the_model_card_says_what_the_folder_has(tmp_path, wide):
    runs.train(runs.configured(tmp_path, wide, (4,), **settings_of(tmp_path)))
    card = (tmp_path / "run" / "stage-1-s1" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "| base while training | 4 bits (nf4, double quantisation), products in bfloat16 |" in card
    assert f"The trained weights are the adapter in `adapter/`, for the base `{wide}`, quantised as above." in card


# ---- several ranks ----


@pytest.mark.parametrize("kind", ["4 bits, products in float32", "8 bits"])
def test_two_ranks_train_as_one(tmp_path, wide, kind):
    """Each has the whole quantised base; only the adapter's gradients are exchanged."""
    settings = settings_of(tmp_path, quantization=QUANTIZED[kind])
    yaml = runs.write_settings(tmp_path, wide, (13, 9), trainer={"per_device_train_batch_size": 4}, **settings)
    runs.train(load_config(yaml, [f"output_dir={tmp_path / 'one'}"]))
    overrides = (f"output_dir={tmp_path / 'two'}", "trainer.per_device_train_batch_size=2", "--quiet")
    ranks = faults.Ranks(tmp_path, "train", yaml, *overrides)
    assert ranks.wait() == [0, 0], ranks.text
    for stage in ("stage-1-s1", "stage-2-s2"):
        one, two = (load_file(tmp_path / n / stage / "adapter/adapter_model.safetensors") for n in ("one", "two"))
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_fsdp_by_accelerates_launcher_is_an_error(tmp_path, wide):
    """In the settings it is one as well, without reading a model."""
    yaml = runs.write_settings(tmp_path, wide, (8,), **settings_of(tmp_path))
    ranks = faults.Ranks(tmp_path, "train", yaml, "--quiet", fault=asks_for_fsdp)
    assert 2 in ranks.wait(), ranks.text
    assert "fsdp or deepspeed: quantised weights are not sharded; with quantization use plain DDP" in ranks.text


def asks_for_fsdp(rank: int) -> None:
    faults.fsdp_on_cpu(rank)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
