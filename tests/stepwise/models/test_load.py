"""Loading: dropout off, head attached, packed attention or the padded fallback; hashes; adapters."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Lfm2Config, MixtralConfig

from sdpo_kernels import linear_logps
from sdpo_kernels.integrations import head_logps
from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.fit import load_model_config
from sdpo_kernels.stepwise.models.load import add_adapter, load_model, load_tokenizer, weights_hash
from sdpo_kernels.stepwise.models.merge import merge_adapter
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.settings.lora import LoraSettings
from tests.stepwise import runs

CPU = torch.device("cpu")


def load(config, path=None):
    return load_model(path or config.model, config, Precision(CPU))


def test_a_loaded_model_is_ready_to_train(tmp_path):
    folder = runs.make_model(tmp_path / "m", attention_dropout=0.1)
    loaded = load(runs.configured(tmp_path, folder))
    assert loaded.packed
    assert loaded.by_sequence
    assert loaded.shared
    assert loaded.model.config._attn_implementation == "sdpo_packed"
    assert loaded.model.model.layers[0].self_attn.attention_dropout == 0.0
    ids = torch.tensor([[5, 6, 7]])
    positions = torch.arange(3)[None]
    assert loaded.model(input_ids=ids, position_ids=positions, logp_targets=ids).logps.shape == (3,)


def test_its_head_has_the_runs_tolerance(tmp_path, model, monkeypatch):
    seen = []

    def spy(*args, **options):
        seen.append((options["grad_tol"], options["grad_tol_relative"]))
        return done

    monkeypatch.setattr(head_logps, "linear_logps", spy)
    done = linear_logps(torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3, dtype=torch.int64))
    ids = torch.tensor([[5, 6, 7]])
    for settings in ({"grad_tol": 0.01, "grad_tol_relative": True}, {}):
        load(runs.configured(tmp_path, model, batching="padded", **settings)).model(input_ids=ids, logp_targets=ids)
    assert seen == [(0.01, True), (0.0, False)]


def test_a_tolerance_that_can_leave_nothing_out_is_said(tmp_path, model, caplog):
    load(runs.configured(tmp_path, runs.make_model(tmp_path / "large", vocab_size=65), grad_tol=0.01))
    assert "grad_tol" not in caplog.text
    load(runs.configured(tmp_path, model, grad_tol=0.01))
    assert (
        "grad_tol: 0.01 changes nothing: it leaves out blocks of 64 vocabulary entries, and the vocabulary has 44"
        in (caplog.text)
    )


def test_sharding_contradicts_a_tolerance(tmp_path, model):
    with pytest.raises(UserError, match=r"grad_tol: was 0\.01, must be 0 with tp_size or trainer\.fsdp"):
        runs.configured(tmp_path, model, grad_tol=0.01, trainer={"fsdp": True})


def test_padded_batches_if_asked_for(tmp_path, model):
    loaded = load(runs.configured(tmp_path, model, batching="padded"))
    assert not loaded.packed
    assert not loaded.by_sequence
    assert not loaded.shared


def test_prompts_are_not_shared_if_that_is_off_or_cannot_be(tmp_path, model, caplog):
    loaded = load(runs.configured(tmp_path, model, prefix_sharing="off"))
    assert loaded.packed
    assert not loaded.shared
    assert not caplog.messages

    # the auxiliary loss of a router is an average over tokens
    folder = tmp_path / "moe"
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    config = MixtralConfig(
        vocab_size=len(runs.VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, **experts,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    runs.make_tokenizer().save_pretrained(folder)
    loaded = load(runs.configured(tmp_path, folder))
    assert loaded.packed
    assert not loaded.shared
    assert "prompts go through the model twice, once for each answer: MixtralForCausalLM" in caplog.text


def test_a_model_that_mixes_packed_sequences_gets_padded_batches_with_a_warning(tmp_path, caplog):
    """Short convolutions carry state across the end of a sequence."""
    config = Lfm2Config(
        vocab_size=len(runs.VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, layer_types=["conv", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "lfm2"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    runs.make_tokenizer().save_pretrained(folder)
    run_config = runs.configured(tmp_path, folder, sizes=(8,))
    loaded = load(run_config)
    assert not loaded.packed
    assert "batches are padded, in groups of similar length, instead of packed: Lfm2ForCausalLM" in caplog.text
    manifest = runs.train(run_config)
    assert manifest["stages"][0]["first_loss"] == pytest.approx(0.693147, abs=1e-3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text('{"model_type": "nonesuch"}'),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
    ],
    ids=["no folder", "no config", "unknown type", "no weights", "broken weights"],
)
def test_a_model_that_cannot_be_loaded_is_a_one_line_error(tmp_path, model, damage):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    config = runs.configured(tmp_path, folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        load(config)
    expected = f"{folder} cannot be loaded: " if folder.exists() else f"there is no folder {folder}"
    assert str(error.value).startswith(f"model: {expected}")
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(tmp_path, model):
    """Reading pytorch_model.bin may run code."""
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(runs.configured(tmp_path, folder))


def test_a_missing_tokenizer_is_a_one_line_error(tmp_path, model):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="model: no tokenizer can be loaded from") as error:
        load_tokenizer(runs.configured(tmp_path, folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["smoll", "org/smoll"])
def test_a_name_that_is_no_folder_says_so_before_what_the_hub_says(tmp_path, model, monkeypatch, name):
    def refuses(*args, **options):
        raise OSError(f"{name} is not a valid model identifier listed on 'https://huggingface.co/models'\nIf this is")

    monkeypatch.chdir(tmp_path)
    config = runs.configured(tmp_path, model).model_copy(update={"model": name})
    for loader, what in ((AutoTokenizer, "tokenizer"), (AutoConfig, "config"), (AutoModelForCausalLM, "model")):
        monkeypatch.setattr(loader, "from_pretrained", refuses)
        steps = {"tokenizer": load_tokenizer, "config": load_model_config, "model": load}
        with pytest.raises(UserError) as error:
            steps[what](config)
        assert str(error.value) == (
            f"model: there is no folder {name!r} in {tmp_path}, and the hub gives no {what} of that name: {name} is "
            "not a valid model identifier listed on 'https://huggingface.co/models'"
        )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ImportError("this model needs einops"), "org/m cannot be loaded: this model needs einops"),
        (
            OSError("org/m does not appear to have a file named model.safetensors"),
            "no model can be loaded from org/m: org/",
        ),
    ],
)
def test_a_model_of_the_hub_that_is_there_is_not_called_missing(tmp_path, model, monkeypatch, error, reason):
    def refuses(*args, **options):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuses)
    with pytest.raises(UserError, match=f"model: {reason}"):
        load(runs.configured(tmp_path, model).model_copy(update={"model": "org/m"}))


def test_the_hash_depends_on_every_weight_name_and_dtype(tmp_path, model):
    network = AutoModelForCausalLM.from_pretrained(model)
    first = weights_hash(network)
    assert weights_hash(AutoModelForCausalLM.from_pretrained(model)) == first
    seen = {first}
    for parameter in network.parameters():
        kept = parameter.data.clone()
        parameter.data.view(-1)[-1] = torch.nextafter(parameter.data.view(-1)[-1], torch.tensor(9.0))
        seen.add(weights_hash(network))
        parameter.data.copy_(kept)
    assert len(seen) == 1 + len(list(network.parameters()))
    assert weights_hash(network) == first
    assert weights_hash(network.bfloat16()) not in seen
    network.register_buffer("more", torch.zeros(1))
    assert weights_hash(network) not in seen


def test_only_the_adapter_trains_and_it_merges_in_float32(tmp_path, model):
    config = runs.configured(tmp_path, model, lora={"r": 2})
    loaded = load(config)
    add_adapter(loaded, config.lora)
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    loaded.model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 9, 7, 30]])
    with torch.no_grad():
        wanted = loaded.model(input_ids=ids).logits
        merged = merge_adapter(tmp_path / "adapter", config)
        own = merged(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids).logits
    assert all(p.dtype == torch.float32 for p in merged.parameters())
    assert torch.allclose(own, wanted, atol=1e-5)
    assert not torch.allclose(own, base, atol=1e-3)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_an_unknown_target_module_is_a_one_line_error(tmp_path, model):
    loaded = load(runs.configured(tmp_path, model))
    with pytest.raises(UserError, match=r"lora: .*nonesuch") as error:
        add_adapter(loaded, LoraSettings(target_modules="nonesuch"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_the_attention_that_is_asked_for_is_used(tmp_path, model, name, batching):
    """Packed only if it keeps sequences apart, which the probe finds out; the scores are the same either way."""
    config = runs.configured(tmp_path, model, attn_implementation=name, batching=batching)
    loaded = load(config)
    assert loaded.model.config._attn_implementation == name
    assert loaded.packed in ((True, False) if batching == "packed" else (False,))
    assert not loaded.by_sequence


def test_an_attention_that_is_not_there_is_an_error(tmp_path, model):
    config = runs.configured(tmp_path, model, attn_implementation="flash_atention")
    with pytest.raises(UserError, match=r"model: .*model cannot be loaded: .*flash_atention"):
        check_run(config, Reporter(quiet=True))


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_run_with_another_attention_trains_the_same(tmp_path, model, batching):
    """Up to rounding."""
    weights = []
    for name in (None, "eager"):
        folder = tmp_path / str(name)
        folder.mkdir()
        runs.train(runs.configured(folder, model, (8,), attn_implementation=name, batching=batching))
        weights.append(load_file(folder / "run" / "stage-1-s1" / "model.safetensors"))
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-4, atol=1e-4)
