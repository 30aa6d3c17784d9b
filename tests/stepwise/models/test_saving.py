"""What a published folder has besides weights: its generation config, the files beside the model, its code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models.load import load_model
from sdpo_kernels.stepwise.models.merge import merge_adapter
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.models.saving import copy_beside, is_tied, keep_generation_config
from sdpo_kernels.stepwise.run import run
from tests.stepwise import runs

EXPO = {"post": {"expo": {"alpha": 0.5}}}


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


REFUSED = [
    {"do_sample": False, "temperature": 0.9},  # Vicuna
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9},  # Llama-2 chat
    {"num_beams": 1, "early_stopping": True},
]


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 2}}], ids=str)
@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_a_generation_config_that_transformers_refuses_to_save_is_published_unchanged(
    tmp_path, spoken, settings, values
):
    folder = runs.make_model(tmp_path / "m")
    change(folder / "generation_config.json", **values)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        GenerationConfig.from_pretrained(folder).validate(strict=True)

    config = runs.configured(tmp_path, folder, **settings, **EXPO)
    check_run(config, spoken.reporter)
    name = next(reversed(values))
    warning = f"warning: model: its generation config is saved unchanged, despite `{name}`"
    if len(values) == 2:
        assert spoken.text.count(warning) == 1
    run(config, spoken.reporter)
    assert spoken.text.count("its generation config is saved unchanged") == 2  # by each command once
    for stage in ("stage-1-s1", "stage-2-s2", "expo"):
        published = json.loads((tmp_path / "run" / stage / "generation_config.json").read_text())
        assert {key: published[key] for key in values} == values
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / stage).generation_config.to_diff_dict() == {
            **published
        }


def test_a_valid_generation_config_is_not_touched(model):
    network = AutoModelForCausalLM.from_pretrained(model)
    assert keep_generation_config(network) is None
    assert type(network.generation_config) is GenerationConfig
    network.generation_config = None
    assert keep_generation_config(network) is None


BESIDE = {
    "preprocessor_config.json": '{"image_mean": [0.5]}',
    "processor_config.json": '{"processor_class": "LlavaProcessor"}',
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "tools.jinja": "{{ tools }}",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "LICENSE": "as is",
}


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 2}}], ids=str)
def test_the_files_beside_the_model_come_along(tmp_path, settings):
    folder = runs.make_model(tmp_path / "m")
    (folder / "additional_chat_templates").mkdir()
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    (folder / "chat_template.jinja").write_text(runs.CHAT)
    (folder / "surprise.py").write_text("raise SystemExit")
    (folder / "training_args.bin").write_text("no")
    runs.train(runs.configured(tmp_path, folder, **settings, **EXPO))
    for stage in ("stage-1-s1", "stage-2-s2", "expo"):
        published = tmp_path / "run" / stage
        assert {name: (published / name).read_text() for name in BESIDE} == BESIDE
        assert (published / "chat_template.jinja").read_text() == runs.CHAT
        assert not (published / "surprise.py").exists()  # without trust_remote_code no code is carried on
        assert not (published / "training_args.bin").exists()


def test_what_was_saved_is_not_overwritten(tmp_path, model):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for folder, text in ((source, "old"), (target, "new")):
        (folder / "chat_template.jinja").write_text(text)
    (source / "processor_config.json").write_text("{}")
    (source / "code.py").write_text("")
    assert copy_beside(str(source), target, code=True) == ["code.py", "processor_config.json"]
    assert (target / "chat_template.jinja").read_text() == "new"


def custom_model(folder: Path) -> Path:
    """A model whose classes are in its folder."""
    runs.make_model(folder)
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
    )
    (folder / "helper_own.py").write_text("SCALE = 1.0\n")
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "from .helper_own import SCALE\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(folder / "config.json", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=classes)
    return folder


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 2}}], ids=str)
def test_a_model_with_code_of_its_own_is_published_with_it(tmp_path, settings):
    folder = custom_model(tmp_path / "own")
    runs.train(runs.configured(tmp_path, folder, trust_remote_code=True, **settings, **EXPO))
    for stage in ("stage-1-s1", "stage-2-s2", "expo"):
        published = tmp_path / "run" / stage
        for name in ("configuration_own.py", "helper_own.py", "modeling_own.py"):
            assert (published / name).read_text() == (folder / name).read_text()
        network = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True)
        assert type(network).__name__ == "OwnForCausalLM"
        weights = load_file(published / "model.safetensors")
        assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_expo_of_an_untied_head_agrees_with_its_adapter(tmp_path):
    """The head is tied in θ0 and untied in θ1; the merged weights and the scaled adapter are one model."""
    folder = runs.make_model(tmp_path / "m", tie_word_embeddings=True)
    settings = {"lora": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, "trainer": {"learning_rate": 0.05}}
    config = runs.configured(tmp_path, folder, **settings, **EXPO)
    runs.train(config)
    wanted = merge_adapter(tmp_path / "run" / "expo" / "adapter", config).state_dict()
    published = load_file(tmp_path / "run" / "expo" / "model.safetensors")
    assert published.keys() == wanted.keys()
    assert all(torch.allclose(published[name], wanted[name], atol=1e-6) for name in wanted)
    head, embedding = published["lm_head.weight"], published["model.embed_tokens.weight"]
    assert float((head - embedding).abs().max()) > 1e-3
    assert not is_tied(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "expo"))


def test_a_config_that_calls_a_head_of_its_own_tied_is_corrected(tmp_path):
    """transformers ties nothing if the weights have both; other software goes by the config."""
    folder = runs.make_model(tmp_path / "m")
    change(folder / "config.json", tie_word_embeddings=True)
    config = runs.configured(tmp_path, folder, sizes=(8,))
    loaded = load_model(str(folder), config, Precision(torch.device("cpu"))).model
    assert not is_tied(loaded)
    assert loaded.config.tie_word_embeddings is False
    runs.train(config)
    published = tmp_path / "run" / "stage-1-s1"
    assert json.loads((published / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(published / "model.safetensors")


def test_a_model_with_missing_weights_is_an_error(tmp_path):
    """transformers would give them random values."""
    folder = runs.make_model(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"1 of the weights of a LlamaForCausalLM are missing in it, first lm_head\.weig"
    ):
        load_model(str(folder), runs.configured(tmp_path, folder), Precision(torch.device("cpu")))
