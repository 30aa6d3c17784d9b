"""`trainer.fsdp_config`: transformers ignores a misspelt key, and a user may put its keys one level too high."""

import pytest

from sdpo_kernels.stepwise.settings.deepspeed import deepspeed_config
from sdpo_kernels.stepwise.settings.mistakes import SettingErrors
from sdpo_kernels.stepwise.settings.trainer import check_trainer


def test_a_misspelt_key_names_the_right_one():
    with pytest.raises(SettingErrors, match="reshard_after_foward: unknown key; did you mean 'reshard_after_forward'"):
        check_trainer({"fsdp": True, "fsdp_config": {"reshard_after_foward": True}})


@pytest.mark.parametrize("key", ["transformer_layer_cls_to_wrap", "fsdp_version", "a_key_of_a_later_version"])
def test_known_and_future_keys_pass(key):
    settings = {"fsdp": True, "fsdp_config": {key: "x"}}
    assert check_trainer(settings) == settings


def test_a_key_one_level_too_high_says_where_it_belongs():
    with pytest.raises(SettingErrors, match=r"it belongs to trainer.fsdp_config: \{reshard_after_forward: …\}"):
        check_trainer({"reshard_after_forward": True})


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("sdpo_kernels.stepwise.settings.deepspeed.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package is not installed; run: pip install deepspeed"):
        deepspeed_config({"zero_optimization": {"stage": 2}})
