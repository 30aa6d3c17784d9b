"""What is printed: the fullest moment, whether it fits, and what to change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.memory.batch import Lengths
from sdpo_kernels.stepwise.memory.changes import changes
from sdpo_kernels.stepwise.memory.of_run import NotPlanned, PlannedRun, Task
from sdpo_kernels.stepwise.memory.setup import Setup
from sdpo_kernels.stepwise.memory.sizes import Measured
from sdpo_kernels.stepwise.memory.table import line, plan_lines
from sdpo_kernels.stepwise.memory.target import Target
from sdpo_kernels.stepwise.models.optimizer_states import OptimizerStates
from sdpo_kernels.stepwise.settings.lora import LoraSettings

CONFIG = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16
)
TASK = Task(Measured(CONFIG), Lengths(*(np.full(8, n) for n in (600, 600, 200, 800))), packed=True, shared=True)
SETUP = Setup(pairs=4, gpus=2, memory=3 * 2**30)


@pytest.fixture(scope="module")
def plan():
    return TASK.plan(SETUP)


def test_the_parts_of_the_line_add_up(plan):
    text = line(plan)
    total, *parts = (float(word) for word in text.replace(",", "").replace(":", "").split() if word[0].isdigit())
    assert text.startswith("about ")
    assert " GiB a GPU: weights " in text
    assert sum(parts) == pytest.approx(total, abs=0.05 * len(parts))
    assert total == pytest.approx(plan.total / 2**30, abs=0.05)


def test_a_plan_that_does_not_fit_says_what_to_change_and_ends_at_what_fits(plan):
    lines = plan_lines(PlannedRun("s1", TASK, plan), Target(2, SETUP.memory), quantises=True)
    assert (
        "memory of each of 2 GPUs in GiB, with the largest micro-batch (4 pairs, 4,000 tokens, 3,200 scored):" in lines
    )
    need = f"{plan.total / 2**30:.2f} GiB, and 1.0 GiB for CUDA and for gaps (assumed)"
    assert f"It does not fit: {need}, of 3.0 GiB." in lines
    assert lines[-1].endswith("  fits")
    first = lines.index("What to change, in this order (GiB afterwards):") + 3
    offered = [line.strip().split("  ")[0] for line in lines[first:]]
    assert offered[0] == "trainer: {gradient_checkpointing: true}"
    assert offered[1] == "trainer: {per_device_train_batch_size: 1, gradient_accumulation_steps: 4}"


def test_each_change_brings_what_a_plan_with_it_says(plan):
    base = replace(plan, setup=replace(SETUP, memory=2**29))
    found = {change.text: change for change in changes(TASK, base, quantises=True)}
    assert list(found) == [
        "trainer: {gradient_checkpointing: true}",
        "trainer: {per_device_train_batch_size: 1, gradient_accumulation_steps: 4}",
        "trainer: {fsdp: true}",
        "lora: {r: 16}, dtype: bfloat16",  # sharded over two GPUs it is smaller than a whole base in four bits
    ]
    checkpointing, *_, lora = found.values()
    assert checkpointing.alone.total == TASK.plan(replace(SETUP, checkpointing=True)).total < plan.total
    assert lora.alone.setup.dtype == torch.bfloat16
    assert not lora.alone.setup.sharded
    sharded = found["trainer: {fsdp: true}"].together.setup
    assert (sharded.sharded, sharded.pairs, sharded.max_length, sharded.syncs_each) == (True, 1, 1024, True)
    assert all(change.together.total < plan.total for change in found.values())

    # what is proposed must be allowed
    tolerant = replace(base, setup=replace(base.setup, grad_tol=0.01))
    assert "trainer: {fsdp: true}, grad_tol: 0" in [change.text for change in changes(TASK, tolerant, quantises=True)]


def test_one_gpu_can_hold_the_base_in_four_bits():
    setup = replace(SETUP, gpus=1, memory=2**29)
    *_, lora, packed = changes(TASK, TASK.plan(setup), quantises=True)
    assert packed.text == "lora: {r: 16}, dtype: bfloat16, quantization: {bits: 4}"
    assert packed.together.setup.quantization == {"bits": 4, "double": True}
    assert packed.together.total < lora.together.total


def test_scoring_fewer_pairs_is_a_change_where_scoring_takes_most():
    setup = replace(SETUP, lora=LoraSettings(), dtype=torch.bfloat16, checkpointing=True, pairs=1, memory=2**30)
    plan = TASK.plan(setup)
    assert plan.fullest.name == "scoring"
    first = next(changes(TASK, plan, quantises=True))
    assert first.text == "trainer: {per_device_eval_batch_size: 1}"
    assert first.alone.total < plan.total


def test_shorter_sequences_are_offered_where_they_bring_something():
    """With one short pair at a time the weights take nearly all. What is cut is lost, so it must be worth that."""
    setup = replace(SETUP, gpus=1, checkpointing=True, pairs=1, scored_pairs=1, memory=2**28)
    adapted = replace(setup, lora=LoraSettings(), dtype=torch.bfloat16)
    longer = replace(TASK, lengths=Lengths(*(np.full(8, n) for n in (1000, 1000, 200, 1600))))
    for task, start, offered in ((TASK, setup, False), (longer, adapted, True)):
        texts = [change.text for change in changes(task, task.plan(start), quantises=False)]
        assert ("max_length: 512" in texts) == offered


def test_a_plan_with_tensor_parallelism_offers_what_goes_with_it():
    setup = replace(SETUP, tp=2, memory=2**28)
    plan = TASK.plan(setup)
    lines = plan_lines(PlannedRun("s1", TASK, plan), Target(2, setup.memory), quantises=True)
    assert "tp_size 2: weights and what belongs to them are a rank's part; activations are whole." in lines
    assert not [text for text in lines if "lora" in text or "fsdp" in text]


def test_fsdp2_divides_what_it_shards():
    whole, half = (TASK.plan(replace(SETUP, sharded=True, gpus=gpus)) for gpus in (2, 8))
    for part in ("weights", "optimizer", "gradients"):
        assert half.moments[-1].parts[part] == pytest.approx(whole.moments[-1].parts[part] / 4, abs=4)
    ddp = TASK.plan(SETUP).moments[-1].parts
    assert ddp["gradients"] == 2 * ddp["weights"]  # the gradients, and DDP's buckets


def test_accumulation_under_fsdp2_keeps_whole_gradients_unless_each_batch_is_reduced():
    setup = replace(SETUP, sharded=True, accumulation=2)
    whole, reduced = TASK.plan(setup), TASK.plan(replace(setup, syncs_each=True))
    head = 32000 * 1024 * 4
    numbers = 4 * whole.sizes.numbers
    assert whole.moments[1].parts["gradients"] == numbers - head + head // 2
    assert reduced.moments[1].parts["gradients"] == numbers // 2


@pytest.mark.parametrize(
    ("name", "bytes_of_a_weight"),
    [
        ("adamw_torch_fused", 8), ("adamw_torch", 8), ("sgd", 0), ("adagrad", 4), ("rmsprop", 4), ("lion_32bit", 4),
        ("adamw_bnb_8bit", 2 + 2 * 4 / 256), ("adamw_torch_4bit", 1 + 2 * 4 / 256), ("paged_adamw_32bit", 8),
        ("adafactor", 4 * (128 + 256) / (128 * 256)), ("schedule_free_radam", 8),
    ],
)  # fmt: skip
def test_the_states_of_an_optimizer(name, bytes_of_a_weight):
    weight = torch.empty(128, 256, device="meta")
    states = OptimizerStates.of(name)
    assert states.known
    assert states.bytes_of([weight]) == bytes_of_a_weight * weight.numel()


def test_an_optimizer_that_is_not_known_counts_as_adam_and_is_named():
    setup = replace(SETUP, optimizer="galore_adamw")
    found = TASK.plan(setup)
    assert found.sizes.states == 8 * found.sizes.trained
    text = plan_lines(PlannedRun("s1", TASK, found), Target(2, None), quantises=False)
    assert "trainer.optim galore_adamw: its states are not known here; Adam's are assumed." in text


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("24 gb", 24 * 10**9), ("512MiB", 2**29)])
def test_a_memory_size(text, size):
    assert Target.of(None, text) == Target(1, size)


@pytest.mark.parametrize("text", ["80", "0GiB", "eighty", "80GiG", "-3GB"])
def test_a_memory_size_that_is_wrong(text):
    with pytest.raises(UserError, match=rf"--memory: was '{text}', must be a number above 0 with a unit \(MiB, GiB"):
        Target.of(8, text)


def test_a_number_of_gpus_that_is_wrong():
    with pytest.raises(UserError, match="--gpus: was 0, must be a number of GPUs, at least 1"):
        Target.of(0, "80GiB")


def test_a_model_that_cannot_run_without_values_has_no_plan(monkeypatch):
    from transformers.models.llama import modeling_llama

    genuine = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: genuine(self, x) if float(x.detach().sum()) < 1 else x
    )
    with pytest.raises(NotPlanned, match="this model's code does not run on tensors without values"):
        replace(TASK, model=Measured(CONFIG)).plan(SETUP)
