"""The adapter for ms-swift, on a stub of it: the stock trainers' results without logits, or their own way.

`make trainers` runs the same against ms-swift itself.
"""

from __future__ import annotations

import copy
import logging
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sdpo_kernels.integrations import swift
from sdpo_kernels.integrations.causal_lm import attach_fused_head, disable_dropout, is_attached
from sdpo_kernels.integrations.lm_head import unwrap
from tests.integrations.swift_stub import (
    CLASSES,
    CPOTrainer,
    DPOTrainer,
    KTOTrainer,
    ORPOTrainer,
    RewardTrainer,
    RLHFTrainerMixin,
    SwiftMixin,
    create,
    install,
)  # fmt: skip
from tests.integrations.test_dpo_step import batch
from tests.integrations.test_page import BLOCKS
from tests.integrations.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # ms-swift's names

STUBBED = (*CLASSES.values(), SwiftMixin)


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    """ms-swift's stub; after each test nothing of it is replaced."""
    install(monkeypatch)
    found = [dict(vars(each)) for each in STUBBED]
    yield
    swift.unpatch()
    assert [dict(vars(each)) for each in STUBBED] == found


def inputs(prefix="", seed=0):
    ids, labels, mask = batch(seed)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, f"{prefix}labels": labels}


def packed_inputs():
    """The same sequences in one row, without padding."""
    ids, labels, mask = batch()
    lengths = mask.sum(1).tolist()
    rows = {"input_ids": ids, "labels": labels}
    packed = {
        name: torch.cat([row[:n] for row, n in zip(value, lengths, strict=True)])[None] for name, value in rows.items()
    }
    return packed | {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


def left_padded_inputs():
    ids, labels, mask = batch()
    lengths = mask.sum(1).tolist()
    found = {name: torch.stack([row.roll(9 - n) for row, n in zip(value, lengths, strict=True)])
             for name, value in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}  # fmt: skip
    return found | {"position_ids": (found["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def kto_inputs():
    return inputs("completion_") | inputs("KL_completion_", seed=1) | {"label": [True, False, False, True]}


def count_logits(model):
    """Calls of the head as a module: only logits come from there."""
    calls = []
    unwrap(model).get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    return calls


def pair(family="llama", **options):
    """A model and its copy."""
    model = tiny_model(family, **options)
    disable_dropout(model)
    return model, copy.deepcopy(model)


def flat(results):
    """All results as one list of names and tensors."""
    return list(results.items() if isinstance(results, dict) else enumerate(results))


def assert_same(trainer, family, given, call, **options):
    """The results and gradients of `call(trainer, model, batch)` are the stock trainer's, and no logits are made."""
    twin, model = pair(family)
    wanted = flat(call(create(trainer, twin, **options), twin, given))
    with swift.patch():
        calls = count_logits(model)
        found = flat(call(create(trainer, model, **options), model, given))
    assert not calls
    assert [name for name, _ in found] == [name for name, _ in wanted]
    for (name, ours), (_, own) in zip(found, wanted, strict=True):
        if trainer in (CPOTrainer, ORPOTrainer) and name in (2, 3):  # logits, of which only the mean is read
            continue
        torch.testing.assert_close(ours.float(), own.float(), rtol=1e-4, atol=1e-4, msg=str(name))

    differentiable = [i for i, (_, own) in enumerate(wanted) if own.requires_grad and i not in skipped(trainer)]
    for results in (found, wanted):
        sum((i + 1) * results[i][1].sum() for i in differentiable).backward()
    for (name, ours), own in zip(model.named_parameters(), twin.parameters(), strict=True):
        limit = 2e-5 * float(own.grad.abs().max())
        torch.testing.assert_close(ours.grad, own.grad, rtol=2e-3, atol=limit, msg=name)


def skipped(trainer):
    """Results whose gradient no loss reads: means of logits, by position."""
    return {DPOTrainer: (3, 4), KTOTrainer: (2, 3), CPOTrainer: (2, 3), ORPOTrainer: (2, 3)}[trainer]


def dpo(trainer, model, given):
    return trainer.concatenated_forward(model, given)


def kto(trainer, model, given):
    return trainer.forward(model, given)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("gemma2", {"use_logits_to_keep": True}), ("llama", {"ld_alpha": 0.5}), ("mixtral", {"moe": True})],
    ids=["plain", "logits_to_keep", "ld_alpha", "router"],
)
def test_dpo(family, options):
    assert_same(DPOTrainer, family, inputs(), dpo, **options)


@pytest.mark.parametrize(
    ("given", "template"), [(packed_inputs, {"padding_free": True}), (left_padded_inputs, {})], ids=["packed", "left"]
)
def test_dpo_on_other_rows(given, template):
    assert_same(DPOTrainer, "llama", given(), dpo, template=template)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("mixtral", {"moe": True})], ids=["plain", "router"])
def test_kto(family, options):
    assert_same(KTOTrainer, family, kto_inputs(), kto, **options)


@pytest.mark.parametrize(
    ("trainer", "family", "options"),
    [
        (CPOTrainer, "llama", {}),
        (CPOTrainer, "mixtral", {"moe": True, "loss_type": "simpo", "cpo_alpha": 0.0}),
        (ORPOTrainer, "llama", {}),
    ],
    ids=["cpo", "simpo", "orpo"],
)
def test_cpo_simpo_and_orpo(trainer, family, options):
    assert_same(trainer, family, inputs(), dpo, **options)


def test_mean_logits_of_cpo_are_those_of_the_scored_tokens():
    twin, model = pair()
    given = inputs()
    logits = twin(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1].mean(-1)
    scored = given["labels"][:, 1:] != -100
    with swift.patch():
        found = create(CPOTrainer, model).concatenated_forward(model, given)
    torch.testing.assert_close(found[2].mean(), logits[:2][scored[:2]].mean())
    torch.testing.assert_close(found[3].mean(), logits[2:][scored[2:]].mean())


def test_a_labelled_first_token_is_not_scored():
    _, model = pair()
    for given, template in ((inputs(), {}), (packed_inputs(), {"padding_free": True})):
        firsts = torch.zeros_like(given["input_ids"], dtype=torch.bool)
        firsts[:, 0] = True
        firsts = given["position_ids"] == 0 if template else firsts
        first_too = given | {"labels": torch.where(firsts, given["input_ids"], given["labels"])}
        with swift.patch():
            trainer = create(DPOTrainer, model, template=template)
            without, found = dpo(trainer, model, given), dpo(trainer, model, first_too)
        for name, value in without.items():
            assert torch.equal(found[name], value), name


def test_the_reference_is_scored_without_logits_either():
    model, reference = pair()
    calls = count_logits(reference)
    with swift.patch():
        trainer = create(DPOTrainer, model, reference)
        own = dpo(trainer, model, inputs())
        theirs = trainer.concatenated_forward(trainer.ref_model, inputs(), is_ref_model=True)
    assert not calls
    assert "nll_loss" not in theirs
    assert torch.equal(own["chosen_logps"], theirs["chosen_logps"])


@pytest.mark.parametrize("options", [{}, {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_lora_models_and_their_reference(options):
    lora = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False} | options
    twin, model = (get_peft_model(each, LoraConfig(**lora)) for each in pair())
    model.load_state_dict(twin.state_dict())
    given = kto_inputs()

    def both(trainer, which):
        with which.disable_adapter():
            reference = trainer.forward(which, given)
        return [*trainer.forward(which, given), *reference]

    wanted = both(create(KTOTrainer, twin), twin)
    with swift.patch():
        found = both(create(KTOTrainer, model), model)
    assert not torch.allclose(found[0], found[5], atol=1e-2)
    for ours, own in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


def test_ktos_divergence_has_no_gradient_and_no_checkpointing():
    _, model = pair()
    model.gradient_checkpointing_enable()
    states = []
    model.model.register_forward_hook(lambda body, *_: states.append(body.is_gradient_checkpointing))
    with swift.patch():
        found = create(KTOTrainer, model).forward(model, kto_inputs())
    assert found[0].requires_grad
    assert not found[4].requires_grad
    assert states == [False, True]


@pytest.mark.parametrize("asked", [None, True, False])
def test_arguments_are_as_before(asked):
    _, model = pair()
    with swift.patch():
        trainer = create(DPOTrainer, model, use_logits_to_keep=asked)
        dpo(trainer, model, inputs())
        assert trainer.args.use_logits_to_keep is asked
        with pytest.raises(RuntimeError, match=r"ms-swift: called its model with other input_ids, must be"):
            swift._StandIn(model, inputs())(input_ids=inputs()["input_ids"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"template": {"is_encoder_decoder": True}}, "an encoder-decoder model"),
        ({"template": {"sequence_parallel_size": 2}}, "sequence_parallel_size above 1"),
        ({"multimodal": True}, "a multimodal model"),
        ({"use_liger_kernel": True}, "use_liger_kernel, which replaces the model's forward"),
        ({"tuner_backend": "unsloth"}, "tuner_backend unsloth, which"),
    ],
)
def test_what_is_left_to_ms_swift(options, reason, caplog):
    twin, model = pair()
    wanted = dpo(create(DPOTrainer, twin), twin, inputs())
    with swift.patch():
        trainer = create(DPOTrainer, model, **options)
        found = [dpo(trainer, model, inputs()) for _ in range(2)][1]
    assert not is_attached(model)
    (message,) = caplog.messages
    assert message.startswith(f"ms-swift's DPOTrainer builds logits as without patch(): {reason}")
    # torch's own products may differ in the last bit from one call to the next
    torch.testing.assert_close(found["chosen_logps"], wanted["chosen_logps"], rtol=1e-6, atol=0)


def test_zero3_several_devices_and_other_tuners_are_left_to_ms_swift(monkeypatch, caplog):
    class SwiftModel(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = model

    with swift.patch():
        _, model = pair()
        model.hf_device_map = {"model": 0, "lm_head": 1}
        create(DPOTrainer, model)
        create(DPOTrainer, SwiftModel(tiny_model("llama")))
        headless = tiny_model("llama")
        headless.lm_head = nn.Identity()
        create(DPOTrainer, headless)
        monkeypatch.setattr(swift, "is_deepspeed_zero3_enabled", lambda: True)
        create(DPOTrainer, tiny_model("llama"))
    reasons = [message.partition("without patch(): ")[2] for message in caplog.messages]
    assert reasons[0] == "a model on several devices"
    assert reasons[1] == "a SwiftModel around the model, where only PEFT's tuners are known"
    assert "its head was a Identity without a weight" in reasons[2]
    assert reasons[3].startswith("DeepSpeed ZeRO-3")


def test_a_router_loss_that_cannot_be_computed_is_left_to_ms_swift(monkeypatch, caplog):
    without, model = pair("mixtral")
    monkeypatch.setattr(sys.modules[type(model).__module__], "load_balancing_loss_func", lambda other: other)
    with swift.patch():
        create(DPOTrainer, without)
        assert not caplog.messages
        create(DPOTrainer, model, moe=True)
    assert is_attached(without)
    assert not is_attached(model)
    assert "auxiliary loss of the router takes other arguments" in caplog.text


def test_a_trainer_from_before_and_a_wrapped_model_are_left_to_ms_swift(caplog):
    twin, model = pair()
    early = create(CPOTrainer, twin)
    calls = count_logits(twin)
    with swift.patch():
        for _ in range(2):
            early.concatenated_forward(twin, inputs())
        assert len(calls) == 2

        # as nn.DataParallel
        wrapped = nn.Sequential(model)
        wrapped.forward = model.forward
        late = create(DPOTrainer, model)
        for _ in range(2):
            assert dpo(late, wrapped, inputs())["chosen_logps"].requires_grad
    assert caplog.messages == [
        "ms-swift's CPOTrainer builds logits as without patch(): it was created before patch()",
        "ms-swift's DPOTrainer builds logits as without patch(): its model was wrapped in a Sequential, in which the "
        "fused head cannot be found",
    ]


def test_other_trainers_are_not_touched():
    _, model = pair()
    with swift.patch():
        create(RewardTrainer, model)
    assert not is_attached(model)


def test_settings_reach_the_head_and_a_second_patch_replaces_them(caplog):
    _, model = pair()
    _, other = pair()
    attach_fused_head(other, stash_bytes=64)
    with caplog.at_level(logging.INFO):
        swift.patch(backend="eager", stash_bytes=0, grad_tol=0.01, grad_tol_relative=True)
    create(DPOTrainer, model)
    assert (model._sdpo_fused.backend, model._sdpo_fused.stash_bytes) == ("eager", 0)
    assert model._sdpo_fused.grad_tol == 0.01
    assert model._sdpo_fused.grad_tol_relative

    swift.patch()
    create(DPOTrainer, model, other)
    assert {(each._sdpo_fused.backend, each._sdpo_fused.stash_bytes) for each in (model, other)} == {("auto", "auto")}
    assert caplog.messages == [
        "ms-swift 4.6.0: replaced RLHFTrainerMixin.__init__, "
        "RLHFTrainerMixin.get_per_token_logps, DPOTrainer.concatenated_forward, KTOTrainer.forward, "
        "CPOTrainer.concatenated_forward, "
        "ORPOTrainer.concatenated_forward, to score tokens without logits"
    ]
    swift.unpatch()
    swift.unpatch()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (RLHFTrainerMixin, "__init__"),
        (RLHFTrainerMixin, "get_per_token_logps"),
        (DPOTrainer, "concatenated_forward"),
        (KTOTrainer, "forward"),
        (CPOTrainer, "concatenated_forward"),
    ],
)
def test_another_signature_is_refused_and_nothing_stays_replaced(monkeypatch, owner, name):
    with monkeypatch.context() as other:
        other.setattr(owner, name, lambda self, rows: None, raising=False)
        found = [dict(vars(each)) for each in STUBBED]
        wanted = rf"{owner.__name__}.{name} was one of \(self, rows\), must take \(self, "
        with pytest.raises(RuntimeError, match=wanted):
            swift.patch()
        assert [dict(vars(each)) for each in STUBBED] == found


def test_other_versions_and_none(monkeypatch, caplog):
    install(monkeypatch, "4.7.0")
    swift.patch()
    assert "ms-swift 4.7.0 is untested with sdpo_kernels (tried: 4.6.0)" in caplog.text
    swift.unpatch()
    monkeypatch.undo()
    with pytest.raises(ImportError, match=r"ms-swift: is not installed, must be 4\.6\.0"):
        swift.patch()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backend": "cuda"}, "backend: was 'cuda'"), ({"stash_bytes": -1}, "stash_bytes: was -1, must be")],
)
def test_wrong_settings_are_refused_at_once(options, message):
    swift.patch(stash_bytes=0)
    with pytest.raises(ValueError, match=message):
        swift.patch(**options)
    model = tiny_model("llama")
    create(DPOTrainer, model)
    assert model._sdpo_fused.stash_bytes == 0


def test_the_pages_plugin_patches():
    (plugin,) = [text for text in BLOCKS if "integrations.swift" in text]
    exec(plugin, {})
    model = tiny_model("llama")
    create(DPOTrainer, model)
    assert is_attached(model)


def test_importing_it_imports_neither_ms_swift_nor_trl():
    code = (
        "import sys, sdpo_kernels.integrations.swift as ours\n"
        "assert not {'swift', 'trl', 'peft'} & set(sys.modules)\nours.unpatch()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
