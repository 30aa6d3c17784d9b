"""TRL's own trainers with the patch and without it, step by step; TRL 1.14's where that is installed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

from sdpo_kernels.backends.base import EXTRAS
from sdpo_kernels.integrations import trl as fused_trl
from sdpo_kernels.integrations import trl_versions as versions
from sdpo_kernels.integrations.trl import LIGER_LAYERS_OFF, patch
from sdpo_kernels.integrations.trl_head import Head
from tests.stepwise.runs import make_model, make_rows, make_tokenizer

trl = pytest.importorskip("trl", reason="TRL is not importable (make bench-env installs it)")

OF_1_14 = versions.installed() == (1, 14)
REACHED_BY_OPTION = ("DPO", "KTO", "GRPO")


def rows_for(trainer):
    rows = make_rows(12, seed=1)
    if trainer == "SFT":
        return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    if trainer == "KTO":
        answers = [row["chosen"] if i % 2 else row["rejected"] for i, row in enumerate(rows)]
        labels = [bool(i % 2) for i in range(len(rows))]
        return [
            {"prompt": r["prompt"], "completion": a, "label": y} for r, a, y in zip(rows, answers, labels, strict=True)
        ]
    return rows if trainer == "DPO" else [{"prompt": row["prompt"]} for row in rows]


def lengths(completions, **_):
    """A reward: the longer the better."""
    return [float(len(completion)) for completion in completions]


def train(trainer, folder: Path, patched, **options):
    """Three steps of TRL's own trainer; log, gradients of every step, final weights."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(make_model(folder / "model"), dtype=torch.float32)
    online = trainer in ("GRPO", "RLOO")
    settings = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1, "use_cpu": True,
        "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "gradient_checkpointing": False,
    }  # fmt: skip
    settings |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.04} if online else {}
    if OF_1_14 and trainer in REACHED_BY_OPTION:
        settings |= {"use_liger_kernel": True, "liger_kernel_config": LIGER_LAYERS_OFF}
    gradients = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, *args, model: nn.Module, **kwargs):
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    with patch() if patched else contextlib.nullcontext():
        made = getattr(trl, f"{trainer}Trainer")(
            model=model, args=getattr(trl, f"{trainer}Config")(output_dir=str(folder), **settings | options),
            train_dataset=Dataset.from_list(rows_for(trainer)),
            processing_class=make_tokenizer(**{"padding_side": "left"} if online else {}),
            callbacks=[Recorder()], **{"reward_funcs": lengths} if online else {},
        )  # fmt: skip
        made.train()
    return made.state.log_history, gradients, dict(model.named_parameters())


@pytest.fixture
def calls(monkeypatch):
    """How often our function was called."""
    counted = []
    scored = Head._scored

    def counting(self, *args):
        counted.append(args)
        return scored(self, *args)

    monkeypatch.setattr(Head, "_scored", counting)
    return counted


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        ("DPO", {}),
        ("DPO", {"use_weighting": True, "precompute_ref_log_probs": True}),
        ("DPO", {"loss_type": ["ipo"], "gradient_accumulation_steps": 2}),
        ("SFT", {}),
        ("KTO", {}),
        ("GRPO", {"temperature": 0.8, "entropy_coef": 0.01}),
        ("GRPO", {"cast_lm_head_to_fp32": True}),
        ("RLOO", {}),
    ],
    ids=str,
)
def test_trls_trainers_step_for_step(trainer, options, tmp_path, calls):
    if OF_1_14 and (trainer not in REACHED_BY_OPTION or "use_weighting" in options):
        pytest.skip("TRL 1.14 has no such way through the head")
    theirs = train(trainer, tmp_path / "theirs", False, **options)
    assert not calls
    mine = train(trainer, tmp_path / "mine", True, **options)
    assert len(calls) >= 3
    assert len(mine[0]) == len(theirs[0]) == 4  # three steps and the summary
    for step, (logged, right) in enumerate(zip(mine[0], theirs[0], strict=True)):
        assert logged.keys() == right.keys()
        for name, value in right.items():
            if not any(word in name for word in ("runtime", "per_second", "step_time")):
                assert logged[name] == pytest.approx(value, rel=2e-5, abs=2e-6), (step, name)
    for step, (grads, right) in enumerate(zip(mine[1], theirs[1], strict=True)):
        assert grads.keys() == right.keys()
        for name, grad in right.items():
            assert (grads[name] - grad).abs().max() <= 2e-5 * max(1.0, grad.abs().max().item()), (step, name)
    for name, weight in theirs[2].items():
        assert (mine[2][name] - weight).abs().max() < 1e-5, name


@pytest.mark.skipif(OF_1_14, reason="TRL 1.14 has no add_fused_lm_head")
def test_a_batch_without_a_scored_token_does_not_stop_training(tmp_path):
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    def run(patched):
        model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"))
        add_fused_lm_head(model, outputs=("log_probs", *EXTRAS))
        ids = torch.arange(4, 12).reshape(2, 4)
        with patch() if patched else contextlib.nullcontext():
            out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
            out.loss.backward()
        assert out.loss == 0
        return model.lm_head.weight.grad

    assert torch.equal(run(True), run(False))


@pytest.mark.skipif(not OF_1_14, reason="from TRL 1.15 on, every trainer reaches the head")
def test_trl_1_14_without_the_option_says_so(tmp_path, calls, caplog):
    fused_trl._log_once.cache_clear()
    theirs = train("DPO", tmp_path / "theirs", False, use_liger_kernel=False)
    assert not caplog.messages
    mine = train("DPO", tmp_path / "mine", True, use_liger_kernel=False)
    assert not calls
    assert sum("log-probs are computed from logits" in message for message in caplog.messages) == 1
    assert [log.get("loss") for log in mine[0]] == [log.get("loss") for log in theirs[0]]


@pytest.mark.skipif(not OF_1_14, reason="the function of TRL 1.14; later ones: test_trl.py")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("settings", [(1.0, 8), (0.7, 8, 5.0, 0.3)], ids=["", "softcap"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_equals_trl_1_14s_function(bias, settings, autocast):
    theirs = versions.OF_1_14.current()
    generator = torch.Generator().manual_seed(0)
    shapes = (37, 24), (301, 24), (301,)
    values = [torch.randn(shape, generator=generator).bfloat16().float() * 0.5 for shape in shapes]
    targets, above = torch.randint(301, (37,), generator=generator), torch.randn(2, 37, generator=generator)
    answers = []
    for apply in (theirs.apply, fused_trl.FusedHeadWithEntropy(theirs).apply):
        leaves = [value.clone().requires_grad_() for value in values[: 3 if bias else 2]]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = apply(*leaves[:2], leaves[2] if bias else None, targets, *settings)
        torch.autograd.backward(found, list(above))
        answers.append([*found, *(leaf.grad for leaf in leaves)])
    for mine, right in zip(answers[1], answers[0], strict=True):
        assert (mine.shape, mine.dtype) == (right.shape, right.dtype)
        assert (mine - right).abs().max() < (0.1 if autocast else 5e-6) * max(1.0, right.abs().max().item())
