"""The section `quantization:`, what it needs and what it rules out, and `lora.publish`. Needs no bitsandbytes."""

from __future__ import annotations

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.models import quantized
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_file import dump_config, load_config
from tests.stepwise import runs
from tests.stepwise.models.test_trial import assert_both_refuse


def test_four_bits_have_qloras_defaults_and_eight_none(tmp_path, model):
    four = runs.configured(tmp_path, model, lora={}, quantization={})
    assert four.model_dump(mode="json")["quantization"] == {
        "bits": 4,
        "type": "nf4",
        "double": True,
        "compute_dtype": "bfloat16",
    }
    assert four.quantization.text == "4 bits (nf4, double quantisation), products in bfloat16"
    other = runs.configured(tmp_path, model, lora={}, quantization={"type": "fp4", "double": False})
    assert other.quantization.text == "4 bits (fp4), products in bfloat16"
    eight = runs.configured(tmp_path, model, lora={}, quantization={"bits": 8})
    assert eight.quantization.text == "8 bits (LLM.int8)"
    for config in (four, eight):
        (tmp_path / "again.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "again.yaml") == config


def test_what_a_stage_publishes(tmp_path, model):
    def merged(**settings):
        return runs.configured(tmp_path, model, **settings).publishes_merged

    assert merged()
    assert merged(lora={})
    assert not merged(lora={"publish": "adapter"})
    assert not merged(lora={}, quantization={})
    assert merged(lora={"publish": "merged"}, quantization={})


LORA = {"lora": {}}
EXPO = {"expo": {"alpha": 0.3}}
REFUSED = [
    ({"quantization": {}}, "lora: is required with quantization: quantised weights are not trained, an adapter is"),
    (LORA | {"quantization": {"bits": 3}}, "quantization.bits: was 3, must be 4 or 8"),
    (LORA | {"quantization": {"type": "int4"}}, "quantization.type: was 'int4', must be 'nf4' or 'fp4'"),
    (LORA | {"quantization": {"bit": 4}}, "quantization.bit: unknown key; did you mean 'bits'?"),
    (LORA | {"quantization": {"bits": 8, "type": "nf4"}}, "quantization.type: was 'nf4', but only 4 bits have it"),
    ({"lora": {"use_dora": True}, "quantization": {"bits": 8}}, "lora.use_dora: was true with bits: 8, must be left"),
    (LORA | {"quantization": {"compute_dtype": "int8"}}, "quantization.compute_dtype: was 'int8', must be 'bfloat16',"),
    (
        LORA | {"quantization": {}, "trainer": {"fsdp": True}},
        "trainer.fsdp: was true, must be left out with quantization: quantised weights are not sharded",
    ),
    (
        LORA | {"quantization": {}, "post": EXPO},
        "post.expo: cannot be done with quantization: it extrapolates whole weights, and what was trained is the",
    ),
    ({"lora": {"publish": "adapter"}, "post": EXPO}, "post.expo: cannot be done with lora.publish: adapter: it"),
    ({"lora": {"publish": "both"}}, "lora.publish: was 'both', must be 'auto', 'merged' or 'adapter'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_does_not_fit(tmp_path, model, settings, message):
    with pytest.raises(UserError) as error:
        runs.configured(tmp_path, model, **settings)
    assert f"run.yaml: {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_bitsandbytes_is_an_error_that_names_the_extra(tmp_path, model, monkeypatch):
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: False)
    config = runs.configured(tmp_path, model, **LORA, quantization={})
    assert_both_refuse(config, r"^quantization: needs bitsandbytes; run: pip install sdpo-kernels\[qlora\]$")


@pytest.mark.parametrize("more", [{}, LORA | {"quantization": {}}], ids=["plain", "quantised"])
def test_a_model_that_is_stored_quantised_is_refused(tmp_path, more, monkeypatch):
    monkeypatch.setattr(quantized, "is_bitsandbytes_available", lambda: True)
    folder, text = runs.make_model(tmp_path / "m"), '"quantization_config": {"quant_method": "bitsandbytes"}, '
    file = folder / "config.json"
    file.write_text(file.read_text().replace("{", "{" + text, 1))
    config = runs.configured(tmp_path, folder, **more)
    with pytest.raises(UserError, match=rf"^model: {folder} is stored quantised .*; give the model it was made from"):
        run(config)
