"""What `sdpo check` and the start of `sdpo train` try out: both raise the same error, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.models import disk, saving, trial
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.training.trainer import StageTrainer
from tests.stepwise import runs

WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def assert_both_refuse(config, match: str) -> None:
    for command in (lambda: check_run(config, Reporter(quiet=True)), lambda: runs.train(config)):
        with pytest.raises(UserError, match=match) as error:
            command()
        assert "\n" not in str(error.value)
    assert not Path(config.output_dir).exists()


# ---- the model ----


def test_a_model_without_a_causal_class_is_named_by_its_architecture(tmp_path):
    folder = tmp_path / "t5"
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=len(runs.VOCABULARY), **sizes)).save_pretrained(folder)
    runs.make_tokenizer().save_pretrained(folder)
    assert_both_refuse(
        runs.configured(tmp_path, folder),
        r"model: .*t5 cannot be loaded: transformers has no causal language model class for T5ForConditionalGeneration",
    )


def test_a_classifier_would_train_on_a_random_head(tmp_path):
    folder = tmp_path / "reward"
    config = LlamaConfig(vocab_size=len(runs.VOCABULARY), tie_word_embeddings=False, pad_token_id=0, **WIDTHS)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    runs.make_tokenizer().save_pretrained(folder)
    assert_both_refuse(
        runs.configured(tmp_path, folder),
        r"first lm_head\.weight; is it another kind of model \(LlamaForSequenceClassification\)\?",
    )


def test_a_layer_that_the_files_lack_is_named(tmp_path, model):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_both_refuse(runs.configured(tmp_path, folder), r"1 of the weights .* first model\.layers\.0\.self_attn\.q_p")


def test_weights_of_another_shape_are_an_error(tmp_path, model):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_both_refuse(runs.configured(tmp_path, folder), "model: .* cannot be loaded: ")


def test_a_folder_without_weights_is_an_error(tmp_path, model):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    assert_both_refuse(runs.configured(tmp_path, folder), "model: .* cannot be loaded: ")


def test_a_model_whose_head_cannot_be_used_is_an_error(tmp_path, model, monkeypatch):
    from sdpo_kernels.integrations import lm_head

    monkeypatch.setattr(lm_head, "_check_weight", lambda head: (_ for _ in ()).throw(ValueError("model: odd head")))
    assert_both_refuse(runs.configured(tmp_path, model), "cannot be trained: model: odd head")


def test_a_hub_model_is_built_from_its_config(tmp_path, model):
    """Its weights are downloaded only by training."""
    config = runs.configured(tmp_path, model)
    named = config.model_copy(update={"model": "someone/some-model"})
    network = trial._on_meta(named, AutoModelForCausalLM.from_pretrained(model).config)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


# ---- adapters ----


@pytest.mark.parametrize("targets", [["foo"], ["q_proj", "foo"], ["self_attn.foo"]], ids=str)
def test_a_target_module_that_does_not_exist_is_an_error_that_names_those_that_do(tmp_path, model, targets):
    """PEFT ignores a name without a module if another name has one."""
    assert_both_refuse(
        runs.configured(tmp_path, model, lora={"target_modules": targets}),
        rf"lora\.target_modules: no module of this model is named '{targets[-1]}' \(it has down_proj, embed_tokens, "
        "gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
    )


@pytest.mark.parametrize("target", ["foo", r".*\.foo_proj"])
def test_a_pattern_that_matches_nothing_is_an_error(tmp_path, model, target):
    config = runs.configured(tmp_path, model, lora={"target_modules": target})
    assert_both_refuse(config, r"lora: .*foo.* \(it has down_proj, ")


def test_a_target_that_is_not_a_layer_is_an_error(tmp_path, model):
    assert_both_refuse(
        runs.configured(tmp_path, model, lora={"target_modules": ["self_attn"]}), "lora: .*not supported"
    )


# ---- saving ----


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer", "files beside", "model card"])
def test_what_cannot_be_saved_at_the_end_is_an_error_at_the_start(tmp_path, model, monkeypatch, file):
    from transformers import GenerationConfig, PreTrainedTokenizerBase
    from transformers.models.llama.configuration_llama import LlamaConfig as Config

    def fail(*_, **__):
        raise ValueError("cannot be\nwritten")

    owner, name = {
        "config.json": (Config, "save_pretrained"),
        "generation_config.json": (GenerationConfig, "save_pretrained"),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
        "files beside": (trial, "copy_beside"),
        "model card": (trial, "model_card"),
    }[file]
    monkeypatch.setattr(owner, name, fail)
    config = runs.configured(tmp_path, model)
    assert_both_refuse(
        config, rf"model: {model}: {file}.* cannot be saved, which a finished stage needs: cannot be writ"
    )


def test_a_file_beside_the_model_that_cannot_be_read_is_an_error_at_the_start(tmp_path, model, monkeypatch):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    (folder / "processor_config.json").write_text("{}")
    genuine = shutil.copyfile

    def copyfile(source, target):
        if Path(source).name == "processor_config.json":
            raise PermissionError(13, "Permission denied", str(source))
        return genuine(source, target)

    config = runs.configured(tmp_path, folder)
    monkeypatch.setattr(saving.shutil, "copyfile", copyfile)
    assert_both_refuse(config, "files beside the model .* cannot be saved.*Permission denied: .*processor_config.json")


# ---- Trainer ----


@pytest.mark.parametrize(
    ("trainer", "match"),
    [
        ({"report_to": "wandb"}, r"stage s1: trainer\.report_to: WandbCallback requires wandb to be installed"),
        ({"report_to": ["tensorboard", "mlflow"]}, r"stage s1: trainer\.report_to: .*mlflow"),
        ({"optim": "schedule_free_adamw"}, "stage s1: trainer: .*schedulefree"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "stage s1: trainer: .*min_lr"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"nonesuch": 1}}, "stage s1: trainer: .*nonesuch"),
    ],
    ids=str,
)
def test_what_trainer_will_need_is_made_before_training(tmp_path, model, trainer, match):
    assert_both_refuse(runs.configured(tmp_path, model, trainer=trainer), match)


def test_a_later_stage_is_tried_too(tmp_path, model):
    config = load_config(runs.write_settings(tmp_path, model), ["stages.1.trainer={report_to: wandb}"])
    assert_both_refuse(config, r"stage s2: trainer\.report_to: WandbCallback requires wandb")


@pytest.mark.parametrize("size", [2**31, 2**63 - 1, 2**64], ids=str)
@pytest.mark.parametrize(
    "name",
    ["max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"],
)
def test_absurd_sizes_are_mistakes_in_the_settings(tmp_path, model, name, size):
    path = runs.write_settings(tmp_path, model, trainer={name: size})
    with pytest.raises(UserError, match=rf"trainer\.{name}: was {size}, must be at least 1 and at most 2147483647"):
        load_config(path)


@pytest.mark.parametrize(("name", "value"), [("seed", 2**32), ("seed", -1), ("data_seed", 2**64)])
def test_seeds_that_numpy_refuses_are_mistakes_in_the_settings(tmp_path, model, name, value):
    path = runs.write_settings(tmp_path, model, trainer={name: value})
    with pytest.raises(UserError, match=rf"trainer\.{name}: was {value}, must be at least 0 and at most 4294967295"):
        load_config(path)


def test_epochs_that_never_end_are_an_error(tmp_path, model):
    config = load_config(runs.write_settings(tmp_path, model), ["stages.1.epochs=1e18"])
    assert_both_refuse(config, r"stage s2: epochs: was 1e\+18, which is 2e\+18 steps, must be at most 2,147,483,647")


# ---- positions ----


def test_sequences_longer_than_the_stated_positions_are_a_warning(tmp_path, spoken):
    """Rotary positions are computed, so it trains."""
    folder = runs.make_model(tmp_path / "m", max_position_embeddings=8)
    rows = [{"prompt": "word1", "chosen": " good1" * n, "rejected": " bad1"} for n in (2, 9, 12)]
    data = runs.write_rows(tmp_path / "long.jsonl", rows)
    config = runs.configured(tmp_path, folder, stages=[{"name": "s1", "data": str(data)}])
    check_run(config, spoken.reporter)
    assert "max_position_embeddings 8, and 2 pairs are longer, up to 14 tokens" in spoken.text  # prompt, answer, end
    assert runs.train(config)["stages"][0]["state"] == "done"


def test_sequences_that_fit_are_no_warning(tmp_path, model, spoken):
    check_run(runs.configured(tmp_path, model), spoken.reporter)
    assert "max_position_embeddings" not in spoken.text
    assert "warning" not in spoken.text


# ---- disk ----


def with_free(monkeypatch, size: float) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(size)))


def space_of(config, monkeypatch) -> disk.Space:
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(trial, "check_space", lambda space, *rest: seen.append(space))
        check_run(config, Reporter(quiet=True))
    return seen[0]


SPACES = [
    {},
    {"lora": {"r": 4}},
    {"lora": {"r": 4}, "dtype": "bfloat16"},
    {"trainer": {"optim": "sgd"}},
    {"reference": "ema", "ema": {"sync_steps": 1}},
]


@pytest.mark.parametrize("settings", SPACES, ids=str)
def test_the_estimate_is_close_to_what_a_run_writes(tmp_path, monkeypatch, settings):
    """A model large enough that files without weights do not count."""
    folder = runs.make_model(tmp_path / "m", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    config = runs.configured(tmp_path, folder, sizes=(4,), **settings)
    space, sizes = space_of(config, monkeypatch), []
    genuine = StageTrainer.write_extra

    def write_extra(self, checkpoint):
        genuine(self, checkpoint)
        sizes.append(folder_size(checkpoint))

    monkeypatch.setattr(StageTrainer, "write_extra", write_extra)
    runs.train(config)
    rest = 100_000  # tokenizer, configs, names of tensors
    assert space.checkpoint == pytest.approx(sizes[-1], rel=0.1, abs=rest)
    assert space.finished == pytest.approx(folder_size(tmp_path / "run" / "stage-1-s1"), rel=0.1, abs=rest)


def folder_size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_one_checkpoint_does_not_fit_on_is_an_error(tmp_path, model, monkeypatch):
    config = runs.configured(tmp_path, model)
    with_free(monkeypatch, space_of(config, monkeypatch).checkpoint - 1)
    assert_both_refuse(config, rf"output_dir: 0 MiB are free on the disk of {tmp_path}/run; a checkpoint takes about ")


def test_a_disk_without_room_for_two_checkpoints_and_all_stages_is_a_warning(tmp_path, model, monkeypatch, spoken):
    config = runs.configured(tmp_path, model)
    space = space_of(config, monkeypatch)
    with_free(monkeypatch, 2 * space.checkpoint + 2 * space.finished - 1)
    check_run(config, spoken.reporter)
    assert "two checkpoints and 2 stages are " in spoken.text

    with_free(monkeypatch, 2 * space.checkpoint + 2 * space.finished)
    assert disk.check_space(space, tmp_path / "run", 2) is None


def test_a_run_with_a_checkpoint_needs_room_for_its_finished_stage_only(tmp_path):
    space, folder = disk.Space(checkpoint=2**60, finished=0), tmp_path / "run"
    with pytest.raises(UserError, match="free some space"):
        disk.check_space(space, folder, 1)
    (folder / ".stage-1-a" / "checkpoint-7").mkdir(parents=True)
    assert "more than is free" in disk.check_space(space, folder, 1)


def test_a_finished_run_needs_no_space(tmp_path, model, monkeypatch):
    config = runs.configured(tmp_path, model, sizes=(4,))
    runs.train(config)
    with_free(monkeypatch, 0)
    assert runs.train(config)["stages"][0]["state"] == "done"
