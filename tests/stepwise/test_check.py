"""`sdpo check`: prints what a run would do, raises the errors training would raise, trains and writes nothing."""

import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from rich.console import Console

from sdpo_kernels.backends.describe import describe_auto
from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.memory.target import Target
from sdpo_kernels.stepwise.settings.run_file import load_config
from tests.stepwise import runs


def checked(config) -> str:
    stream = io.StringIO()
    check_run(config, Reporter(console=Console(file=stream, width=120, highlight=False)))
    return stream.getvalue()


def row(text, name):
    (line,) = [line for line in text.splitlines() if re.match(rf"\W*{re.escape(name)}\W", line)]
    return re.findall(r"[\w.,()-]+", line)


def test_prints_what_a_run_would_do_and_writes_nothing(tmp_path, model):
    evaluation = runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(3, seed=9))
    config = runs.configured(tmp_path, model, eval_data=str(evaluation), trainer={"gradient_accumulation_steps": 2})
    before = sorted(tmp_path.rglob("*"))
    text = checked(config)
    assert sorted(tmp_path.rglob("*")) == before
    name, pairs, dropped, tokens, scored, longest, steps, beta = row(text, "s1")
    assert (name, pairs, dropped, steps, beta) == ("s1", "12", "0", "2", "0.1")
    assert int(tokens) > int(scored) > 24
    assert int(longest) <= 12
    assert row(text, "eval_data")[1] == "3"
    for line in (
        f"model      {model} (llama, vocabulary {len(runs.VOCABULARY)})",
        f"backend    {describe_auto(torch.device('cpu'), torch.float32)}",
        "order      given: the order of the file",
        "reference  previous; policy starts from previous; loss sigmoid",
        f"output     {tmp_path}/run (new)",
        "prompts    go through the model once for both answers, if its attention allows: ",
    ):
        assert line in text.replace("\n", " ") or line in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        # without their last tokens 3 + 3, of which two are shared, and 2 + 2, of which one is
        ({}, "once for both answers, if its attention allows: 7 of 10 tokens (prefix_sharing: auto)"),
        ({"attn_implementation": "sdpa"}, "twice, once for each answer (attn_implementation: sdpa)"),
        ({"prefix_sharing": "off"}, "twice, once for each answer (prefix_sharing: off)"),
        ({"batching": "padded"}, "twice, once for each answer (batching: padded)"),
    ],
)
def test_what_shared_prompts_save(tmp_path, model, settings, text):
    rows = [
        {"prompt": "word1 word2", "chosen": " good1", "rejected": " bad1"},
        {"prompt": "word1", "chosen": " good1", "rejected": " good2"},
    ]
    data = runs.write_rows(tmp_path / "d.jsonl", rows)
    config = runs.configured(tmp_path, model, (), stages=[{"name": "s1", "data": str(data)}], **settings)
    assert f"prompts    go through the model {text}" in " ".join(checked(config).split("\n"))


def test_a_routers_loss_rules_out_shared_prompts(tmp_path, model):
    folder = shutil.copytree(model, tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text()) | {"output_router_logits": True}
    (folder / "config.json").write_text(json.dumps(settings))
    text = " ".join(checked(runs.configured(tmp_path, folder)).split("\n"))
    assert "twice, once for each answer (the loss of the model's router counts every token once)" in text


def test_the_steps_it_prints_are_the_steps_trained(tmp_path, model):
    stages = [
        {"name": "a", "data": str(runs.write_rows(tmp_path / "a.jsonl", runs.make_rows(10))), "epochs": 2.5},
        {
            "name": "b",
            "data": str(runs.write_rows(tmp_path / "b.jsonl", runs.make_rows(9, 1))),
            "trainer": {"max_steps": 1},
        },
    ]
    config = runs.configured(tmp_path, model, stages=stages)
    text = checked(config)
    manifest = runs.train(config)
    for stage in manifest["stages"]:
        assert row(text, stage["name"])[-2] == str(stage["steps"])
    assert row(text, "a")[1:3] == ["10", "0"]
    assert row(text, "b")[1:5] == ["4", "of", "9", "0"]
    assert "note       stage b: trains on 4 of 9 pairs; max_steps 1 ends it before its 1 epoch (3 steps)" in text
    assert "2 of 2 stages done" in checked(config)


def test_the_steps_of_tiers_are_those_of_all_of_them(tmp_path, model):
    config = runs.configured(tmp_path, model, sizes=(13,), order="margin", tiers=3, trainer={"max_steps": 1})
    text = checked(config)
    manifest = runs.train(config)
    assert [stage["pairs_used"] for stage in manifest["stages"]] == [4, 4, 4]
    assert row(text, "s1")[1:4] == ["12", "of", "13"]
    assert row(text, "s1")[-2] == "3"
    assert "note       stage s1-1: trains on 4 of 5 pairs; max_steps 1 ends it" in text
    assert "stage s1-2" not in text  # 4 of 4 pairs in 1 step, as its epoch


def test_unused_columns_are_listed_once_for_all_files_that_have_them(tmp_path, model):
    others = {
        "1": {"id": 1, "source": "x"},
        "2": {"id": 1, "source": "x"},
        "3": {"id": 1},
        "4": {"id": 1, "source": "x"},
    }
    files = {
        name: str(runs.write_rows(tmp_path / f"d{name}.jsonl", [row | more for row in runs.make_rows(4, int(name))]))
        for name, more in others.items()
    }
    stages = [{"name": "a", "data": [files["1"], files["2"]]}, {"name": "b", "data": [files["3"]]}]
    text = checked(runs.configured(tmp_path, model, stages=stages, eval_data=files["4"])).replace("\n", "")
    assert f"unused     {files['1']} and 2 others: id, source" in text
    assert f"unused     {files['3']}: id" in text
    assert text.count("unused  ") == 2


def test_bad_rows_and_dropped_pairs_are_listed(tmp_path, model):
    rows = runs.make_rows(5)
    rows[0]["chosen"] = 7
    rows[3]["prompt"] = " ".join(["word1"] * 20)
    runs.write_rows(tmp_path / "data1.jsonl", rows)
    text = checked(runs.configured(tmp_path, model, sizes=(5,), on_bad_row="skip", max_length=10))
    assert row(text, "s1")[1:3] == ["3", "1"]
    text = text.replace("\n", " ")
    assert "data1.jsonl:1: 'chosen' is of type int" in text
    assert "1 of 4 pairs dropped, the first" in text


def test_a_few_cut_pairs_are_a_line_and_many_a_warning(tmp_path, model):
    pair = {"prompt": "word1", "chosen": " good1 good2", "rejected": " bad1 bad2"}
    long = pair | {"prompt": "word1 word2"}
    runs.write_rows(tmp_path / "data1.jsonl", [long, *[pair] * 199])
    runs.write_rows(tmp_path / "data2.jsonl", [long, pair])
    text = " ".join(checked(runs.configured(tmp_path, model, max_length=4)).split())
    assert "note stage s1: max_length 4 cuts 1 of 200 pairs, which lose 2 of 1,200 scored tokens (0.2%)" in text
    many = "stage s2: max_length 4 cuts 1 of 2 pairs, which lose 2 of 12 scored tokens (16.7%); raise max_length"
    assert f"warning: {many}" in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"order": "pair_accuracy"}, "share of pairs ranked right by the initial model, highest first"),
        ({"order": "random"}, "shuffled into stages of these sizes"),
        ({"order": "margin", "tiers": 2, "sizes": (12,)}, "split into 2 tiers"),
    ],
)
def test_orders_are_explained(tmp_path, model, settings, text):
    assert text in checked(runs.configured(tmp_path, model, **settings)).replace("\n", " ")


def test_a_tokenizer_of_another_model_is_an_error(tmp_path):
    folder = runs.make_model(tmp_path / "small", vocab_size=20)
    for command in (checked, runs.train):
        with pytest.raises(UserError, match=r"produces token \d+, the model's vocabulary ends at 19"):
            command(runs.configured(tmp_path, folder))


def learned(folder, kind, positions):
    """A model with a table of learned positions."""
    config = {
        "GPT2": lambda: transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=positions),
        "OPT": lambda: transformers.OPTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16,
            max_position_embeddings=positions,
        ),
    }[kind]()  # fmt: skip
    config.vocab_size = len(runs.VOCABULARY)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    runs.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["GPT2", "OPT"])
def test_sequences_past_the_positions_a_model_has_learned_are_found_out(tmp_path, kind):
    folder = learned(tmp_path / "learned", kind, positions=4)
    for command in (checked, runs.train):
        with pytest.raises(
            UserError, match=r"max_length: was \d+, and the longest sequence has \d+ tokens, must be at"
        ):
            command(runs.configured(tmp_path, folder))


@pytest.mark.parametrize("kind", ["GPT2", "OPT"])
def test_the_limit_is_the_number_of_usable_positions(tmp_path, kind):
    """OPT's table has two rows more, which no position uses."""
    folder = learned(tmp_path / "start", kind, positions=4)
    with pytest.raises(UserError) as error:
        checked(runs.configured(tmp_path, folder))
    longest = int(re.search(r"longest sequence has (\d+) tokens", str(error.value))[1])

    for fewer in (1, 2):
        folder = learned(tmp_path / f"fewer{fewer}", kind, positions=longest - fewer)
        with pytest.raises(UserError, match=f"has {longest} tokens, must be at most {longest - fewer}: the model has"):
            checked(runs.configured(tmp_path, folder))

    config = runs.configured(tmp_path, learned(tmp_path / "enough", kind, positions=longest))
    checked(config)
    runs.train(config)


def test_the_positions_of_a_vision_tower_are_no_limit(tmp_path):
    """Gemma 3: a table of 4 patches beside a language model that computes its positions."""
    text = {"vocab_size": len(runs.VOCABULARY), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 131072}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    folder = tmp_path / "gemma"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    runs.make_tokenizer().save_pretrained(folder)
    text = checked(runs.configured(tmp_path, folder))
    assert int(row(text, "s1")[5]) > 4


def test_settings_that_transformers_refuses_are_an_error(tmp_path, model):
    config = load_config(runs.write_settings(tmp_path, model), ["stages.1.trainer={tf32: true}"])
    with pytest.raises(UserError, match=r"^trainer: .*tf32"):
        checked(config)


def test_a_config_other_than_the_runs_is_an_error(tmp_path, model):
    runs.train(runs.configured(tmp_path, model, sizes=(4,)))
    with pytest.raises(UserError, match=r"beta: 0\.1 -> 0\.2"):
        checked(runs.configured(tmp_path, model, sizes=(4,), beta=0.2))


def test_a_model_without_a_config_is_a_one_line_error(tmp_path, model):
    config = runs.configured(tmp_path, model)
    (tmp_path / "empty").mkdir()
    runs.make_tokenizer().save_pretrained(tmp_path / "empty")
    with pytest.raises(UserError, match=r"model: no config can be loaded from .*empty") as error:
        checked(config.model_copy(update={"model": str(tmp_path / "empty")}))
    assert "\n" not in str(error.value)


def test_the_memory_plan(tmp_path, model):
    """A line for this machine; for given GPUs the table, too, and what to change where it does not fit."""
    config = runs.configured(tmp_path, model)
    text = checked(config)
    weights = sum(weight.numel() for weight in transformers.AutoModelForCausalLM.from_pretrained(model).parameters())
    (found,) = re.findall(r"memory     about \d+ KiB on this CPU: weights (\d+), .*\(stage s[12]\)", text)
    assert int(found) == round(4 * weights / 2**10)
    assert "GPU" not in text

    stream = io.StringIO()
    reporter = Reporter(console=Console(file=stream, width=120, highlight=False))
    check_run(config, reporter, Target(gpus=2, memory=2**30))
    text = stream.getvalue()
    assert "memory of each of 2 GPUs in KiB, with the largest micro-batch (4 pairs, " in text
    assert "It does not fit: " in text  # what is assumed for CUDA takes all of it
    assert "trainer: {fsdp: true}" in text


def test_a_plan_for_other_gpus_needs_neither_weights_nor_disk(tmp_path, model, monkeypatch):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("sdpo_kernels.stepwise.models.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    stream = io.StringIO()
    config = runs.configured(tmp_path, folder, trainer={"per_device_train_batch_size": 1})
    check_run(config, Reporter(console=Console(file=stream, width=200)), Target(4, 2**32))
    text = stream.getvalue()
    assert "m has no weights; its config alone was checked" in text
    assert "are free on the disk" in text
    assert "It fits" in text
    assert row(text, "s1")[6] == "3"  # 12 pairs, four processes


def test_a_stage_that_was_added_counts_and_lora_and_samples_are_named(tmp_path, model):
    evaluation = runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(3, seed=9))
    settings = {"lora": {"r": 2, "alpha": 4}, "samples": 1, "eval_data": str(evaluation)}
    runs.train(runs.configured(tmp_path, model, sizes=(4,), **settings))
    text = checked(runs.configured(tmp_path, model, sizes=(4, 4), **settings))
    assert "1 of 2 stages done" in text
    assert "lora       rank 2, alpha 4, on all-linear" in text
    assert "samples    every model answers 1 prompt of eval_data" in text
