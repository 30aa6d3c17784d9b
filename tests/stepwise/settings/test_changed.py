"""The settings that differ from their defaults."""

from sdpo_kernels.stepwise.settings.changed import changed_settings
from sdpo_kernels.stepwise.settings.run_settings import RunConfig


def changed(**settings):
    stages = settings.pop("stages", [{"name": "easy", "data": ["a.jsonl"]}])
    config = RunConfig.model_validate({"model": "m", "output_dir": "o", "stages": stages, **settings})
    return changed_settings(config.model_dump(mode="json"))


PLAIN = {"model": "m", "output_dir": "o", "stages": [{"name": "easy", "data": ["a.jsonl"]}]}


def test_defaults_are_left_out_even_if_the_file_says_them():
    assert changed() == PLAIN
    assert changed(beta=0.1, trainer={"seed": 42, "logging_steps": 10}, lora=None, loss_options={}) == PLAIN


def test_what_differs_stays_at_every_depth():
    ranked = {"kind": "ranked", "judge": "a:b", "samples": 3}
    stages = [{"name": "hard", "prompts": ["p.jsonl"], "source": ranked, "beta": 0.3, "trainer": {"seed": 42}}]
    trainer = {"learning_rate": 1e-6}
    got = changed(
        stages=stages, beta=0.2, trainer=trainer, lora={"r": 4, "use_rslora": True}, post={"expo": {"alpha": 0.3}}
    )
    assert got["beta"] == 0.2
    assert got["trainer"] == trainer
    assert got["lora"] == {"r": 4, "use_rslora": True}
    assert got["post"] == {"expo": {"alpha": 0.3}}
    assert got["stages"] == stages
    assert changed(lora={})["lora"] == {}, "that it is there is a choice"


def test_a_config_of_another_version_is_shown_without_its_nulls():
    old = {"model": "m", "gone": 1, "beta": 0.1, "trainer": None, "stages": [{"name": "a", "gone": 2}, "b"]}
    assert changed_settings(old) == {key: value for key, value in old.items() if key != "trainer"}
