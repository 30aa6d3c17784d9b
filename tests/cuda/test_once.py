"""What does not depend on the backend, or ends its process: refusals, data parallelism, a Trainer step."""

from __future__ import annotations

import pytest
import torch

from sdpo_kernels import fused_linear_dpo, linear_logps
from sdpo_kernels.rows import ScoredRows
from sdpo_kernels.sharded import sharded_linear_logps
from sdpo_kernels.vocab_parallel import vocab_parallel_linear_logps
from tests.cuda.common import DEVICE, ON_CUDA, needs_cuda, problem, run_alone


def call_with_a_target_out_of_range(device: str) -> str:
    """A target of V."""
    hidden, weight = torch.randn(4, 8, device=device), torch.randn(50, 8, device=device)
    linear_logps(hidden, weight, torch.tensor([0, 1, 50, 2], device=device))
    if device == "cuda":
        torch.cuda.synchronize()
    return "not refused"


def test_a_target_out_of_range_is_refused():
    """On CUDA by a device assert, which does not synchronise, and after which the process cannot use the device."""
    if not ON_CUDA:
        with pytest.raises(ValueError, match=r"targets: was 50, must be in \[0, 50\)"):
            call_with_a_target_out_of_range(DEVICE)
        return
    done = run_alone(f"tests.cuda.test_once.call_with_a_target_out_of_range({DEVICE!r})")
    assert done.returncode != 0
    assert "not refused" not in done.stdout
    assert "targets: must be in [0, " in done.stdout + done.stderr  # 50, or V where a kernel says it


def call_with_rows_that_do_not_ascend(name: str, device: str, folder: str) -> str:
    """A row that stands twice in the index of `rows`."""
    index = torch.tensor([1, 1], device=device)
    rows = ScoredRows(index, torch.zeros_like(index), torch.tensor([2], device=device))
    hidden, weight = torch.randn(4, 8, device=device), torch.randn(50, 8, device=device)
    targets = torch.arange(4, device=device)
    kind = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(kind, init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        if name == "vocab_parallel":
            vocab_parallel_linear_logps(hidden, weight, targets, rows=rows, slice_rows=[50])
        else:
            sharded_linear_logps(hidden, weight, targets, rows=rows, shard_rows=[50])
        if device == "cuda":
            torch.cuda.synchronize()
    finally:
        torch.distributed.destroy_process_group()
    return "not refused"


@pytest.mark.parametrize("name", ["vocab_parallel", "sharded"])
def test_rows_that_do_not_ascend_are_refused_for_a_divided_head(name, tmp_path):
    """On CUDA by a device assert, as `linear_logps` refuses them."""
    if not ON_CUDA:
        with pytest.raises(ValueError, match=r"rows: its index was not ascending"):
            call_with_rows_that_do_not_ascend(name, DEVICE, str(tmp_path))
        return
    done = run_alone(f"tests.cuda.test_once.call_with_rows_that_do_not_ascend({name!r}, {DEVICE!r}, {str(tmp_path)!r})")
    assert done.returncode != 0
    assert "not refused" not in done.stdout
    assert "rows: its index must be ascending" in done.stdout + done.stderr


@needs_cuda
def test_a_reference_on_another_device_is_refused():
    hidden = torch.randn(2, 4, 32, device=DEVICE)
    weight, labels = torch.randn(50, 32, device=DEVICE), torch.ones(2, 4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="ref_logps: was on cpu"):
        fused_linear_dpo(hidden, weight, labels, ref_logps=torch.zeros(2))


def test_data_parallel_of_one(tmp_path):
    """Gradients through DistributedDataParallel equal the bare module's; buckets are reduced during our backward."""
    kind = "nccl" if ON_CUDA else "gloo"
    torch.distributed.init_process_group(kind, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hidden, weight, targets = problem(torch.bfloat16)
        body = torch.nn.Linear(64, 64, bias=False, device=DEVICE, dtype=torch.bfloat16)
        head = torch.nn.Linear(64, weight.shape[0], bias=False, device=DEVICE, dtype=torch.bfloat16)

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = body, head

            def forward(self, x):
                return linear_logps(self.body(x), self.head.weight, targets).logps

        found = []
        for wrap in (lambda model: model, torch.nn.parallel.DistributedDataParallel):
            model = Model()
            model.zero_grad()
            wrap(model)(hidden).sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        for alone, wrapped in zip(*found, strict=True):
            assert torch.equal(alone, wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_a_trainer_step(tmp_path):
    """transformers' Trainer with our loss: log 2 where the policy is the reference, less on the same pairs later."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from sdpo_kernels.integrations.causal_lm import attach_fused_head
    from sdpo_kernels.integrations.dpo_step import dpo_step, score_pairs
    from tests.integrations.tiny_models import tiny_model

    model = attach_fused_head(tiny_model("llama")).to(DEVICE)
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    pairs = [{"ids": ids[[i, i + 2]], "labels": labels[[i, i + 2]]} for i in range(2)]
    ref = score_pairs(model, ids.to(DEVICE), labels.to(DEVICE))

    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return dpo_step(model, **inputs).loss

    def collate(items):
        both = {name: torch.stack([item[name] for item in items], 1).flatten(0, 1) for name in ("ids", "labels")}
        return {"input_ids": both["ids"], "labels": both["labels"], "ref_logps": ref}

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=0.003, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to=[], remove_unused_columns=False, use_cpu=not ON_CUDA,
        disable_tqdm=True, train_sampling_strategy="sequential",  # the order of `ref`
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=pairs, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.6 < losses[0]
