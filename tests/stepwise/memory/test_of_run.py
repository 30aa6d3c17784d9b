"""Which stage of a run is planned, and with which micro-batch."""

from dataclasses import replace

import pytest
import torch

from sdpo_kernels.stepwise.memory.of_run import NotPlanned, plan_run
from sdpo_kernels.stepwise.memory.target import Target
from sdpo_kernels.stepwise.prepare import prepare
from tests.stepwise import runs

TARGET = Target(gpus=2)


def planned(config, change=lambda stages: stages, target=TARGET, tp_size=1):
    prepared = prepare(config)
    config = config.model_copy(update={"tp_size": tp_size})
    stages = change(prepared.stages)
    return plan_run(config, prepared.model_config, stages, prepared.eval_tokens, target, shared=False)


@pytest.fixture
def config(tmp_path, model):
    """A stage of short pairs, and one of longer ones."""
    runs.write_rows(tmp_path / "data1.jsonl", runs.make_rows(8, longest=2))
    runs.write_rows(tmp_path / "data2.jsonl", runs.make_rows(8, longest=12))
    return runs.configured(tmp_path, model, (8, 8), max_length=40, trainer={"per_device_train_batch_size": 2})


def test_the_stage_with_the_longest_pairs(config):
    found = planned(config)
    assert (found.stage, found.plan.batch.pairs, found.plan.setup.gpus) == ("s2", 2, 2)
    alone = planned(config, lambda stages: stages[:1])
    assert alone.plan.batch.tokens < found.plan.batch.tokens


def test_a_stage_with_a_larger_batch_of_its_own(config):
    stages = [stage.model_dump(exclude_unset=True) for stage in config.stages]
    stages[0]["trainer"] = {"per_device_train_batch_size": 8, "optim": "sgd"}
    found = planned(type(config).model_validate(config.model_dump(exclude_unset=True) | {"stages": stages}))
    assert found.plan.setup.optimizer == "adamw_torch_fused"  # its states are more than the larger batch
    assert found.stage == "s2"


def test_pairs_that_are_generated_later_have_the_greatest_length(config):
    found = planned(config, lambda stages: [replace(stages[0], prompts=[])])
    assert (found.plan.batch.tokens, found.plan.batch.rows) == (2 * 2 * 39, 2 * 2 * 39)


def test_pairs_that_change_their_stage_come_together_at_their_longest(config):
    stages = prepare(config).stages
    totals = sorted(int(n) for stage in stages for n in stage.tokens.lengths.sum(1) - 2)
    found = planned(config.model_copy(update={"order": "random"}))
    assert found.plan.batch.tokens == sum(totals[-2:])


def test_evaluation_pairs_are_scored_too(config, tmp_path):
    evaluation = runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(8, longest=14))
    without = planned(config).plan.moments[0]
    found = planned(config.model_copy(update={"eval_data": (str(evaluation),)})).plan.moments[0]
    assert without.name == found.name == "scoring"
    assert found.parts["activations"] > without.parts["activations"]
    assert "optimizer" not in found.parts


def test_deepspeed_is_not_planned(config):
    config = config.model_copy(update={"trainer": config.trainer | {"deepspeed": "zero2.json"}})
    with pytest.raises(NotPlanned, match="DeepSpeed divides weights and states in its own way"):
        plan_run(config, None, [], None, TARGET, shared=False)


def test_ranks_of_a_tensor_parallel_model_work_on_the_same_pairs(config):
    """Without a number of GPUs the plan is for as many as a run needs."""
    alone = planned(config, target=Target()).plan
    for target in (TARGET, Target(), None):
        found = planned(config, target=target, tp_size=2).plan
        assert (found.setup.gpus, found.setup.tp, found.batch) == (2, 2, alone.batch)
        assert found.moments[-1].parts["gradients"] == found.sizes.gradients  # no buckets of DDP
        assert found.sizes.weights < alone.sizes.weights
    with pytest.raises(NotPlanned, match="tp_size: was 2 with 8 GPUs, must be as many"):
        planned(config, target=Target(8), tp_size=2)


def test_the_setup_is_that_of_the_settings(tmp_path, model):
    trainer = {
        "bf16": True, "fsdp": True, "fsdp_config": {"reshard_after_forward": False}, "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 5, "optim": "adafactor",
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }  # fmt: skip
    config = runs.configured(tmp_path, model, (8,), trainer=trainer, lora={"r": 4}, max_length=30)
    setup = planned(config).plan.setup
    assert (setup.sharded, setup.reshards, setup.checkpointing, setup.syncs_each) == (True, False, True, True)
    assert (setup.accumulation, setup.scored_pairs, setup.optimizer) == (2, 5, "adafactor")
    assert (setup.compute, setup.autocast, setup.body_dtype) == (torch.bfloat16, None, torch.bfloat16)
    assert (setup.lora.r, setup.max_length, setup.device, setup.follows) == (4, 30, "cuda", False)
