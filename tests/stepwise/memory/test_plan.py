"""Plans beside what the driver really takes: the most bytes of tensors that exist at once while it trains."""

import pytest

from benchmarks.memory import plan_of, train_measured
from tests.stepwise import runs

MODEL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Half a million weights, and room for longer sequences."""
    return runs.make_model(
        tmp_path_factory.mktemp("wide") / "model", num_key_value_heads=2, max_position_embeddings=256, **MODEL
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trainer": {"bf16": True, "gradient_checkpointing": True, "optim": "adamw_torch"}},
        {"lora": {"r": 4}, "reference": "ema", "ema": {"decay": 0.5, "sync_steps": 1}},
        {"lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}},
        {"trainer": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, "batching": "padded"},
    ],
    ids=["full", "checkpointing", "lora", "lora on the head", "accumulation"],
)
def test_the_plan_is_within_15_percent_of_the_tensors_that_exist(tmp_path, wide, settings):
    runs.write_rows(tmp_path / "data1.jsonl", runs.make_rows(16, longest=60))
    config = runs.configured(tmp_path, wide, (16,), **settings)
    assert plan_of(config).tensors == pytest.approx(train_measured(config, counted=True), rel=0.15)


def test_scoring_many_pairs_at_once_can_take_most(tmp_path, wide):
    """References are scored eight times as many pairs at a time as are trained on."""
    runs.write_rows(tmp_path / "data1.jsonl", runs.make_rows(32, longest=60))
    trainer = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 32, "optim": "sgd"}
    config = runs.configured(tmp_path, wide, (32,), trainer=trainer)
    plan = plan_of(config)
    assert plan.fullest.name == "scoring"
    assert plan.tensors == pytest.approx(train_measured(config, counted=True, scoring=True), rel=0.15)
