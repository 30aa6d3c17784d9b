"""The OpenRLHF adapter on stubs of its Actor and DPOTrainer, which compute logits as OpenRLHF 0.11.2 does.

The real ones run in `make trainers` (benchmarks/trainers/openrlhf.py).
"""

from __future__ import annotations

import logging
import re
import sys
from importlib import metadata
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sdpo_kernels.integrations import openrlhf
from sdpo_kernels.integrations.causal_lm import disable_dropout, is_attached
from tests.integrations.tiny_models import VOCAB, tiny_model

PAD = 0


class Actor(nn.Module):
    """Its signatures, and its forward without packed samples."""

    def __init__(
        self, pretrain_or_model, attn_implementation="flash_attention_2", param_dtype="bf16", load_in_4bit=False,
        lora_rank=0, lora_alpha=16, lora_dropout=0, target_modules=None, ds_config=None, device_map=None,
        packing_samples=False, temperature=1.0, use_liger_kernel=False, freeze_visual_encoder=False,
        experts_implementation=None, **kwargs,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temperature, self.packing_samples = temperature, packing_samples
        self.is_vlm = kwargs.get("is_vlm", False)
        self.model = pretrain_or_model
        if lora_rank > 0:
            config = LoraConfig(r=lora_rank, target_modules=target_modules, init_lora_weights=False)
            self.model = get_peft_model(self.model, config)
        if "output_router_logits" in self.model.config.to_dict():
            self.model.config.output_router_logits = True

    def forward(
        self, sequences, action_mask=None, attention_mask=None, return_output=False, allgather_logits=False,
        return_logprobs=False, ring_attn_group=None, packed_seq_lens=None, return_entropy=False, **mm_inputs,
    ):  # fmt: skip
        position_ids = attention_mask.long().cumsum(-1) - 1
        position_ids.masked_fill_(attention_mask == 0, 1)
        output = self.model(sequences, attention_mask=attention_mask, position_ids=position_ids, **mm_inputs)
        output["logits"] = output["logits"].to(torch.float32) / self.temperature
        every = output["logits"].log_softmax(-1)
        if return_entropy:
            output.entropy = -(every.exp() * every).sum(-1)[:, :-1]
        if action_mask is None and not return_logprobs:
            return output

        log_probs = every.gather(-1, sequences.roll(-1, 1)[..., None])[..., 0][:, :-1]
        if action_mask is not None:
            log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
        return (log_probs, output) if return_output else log_probs


class DPOTrainer:
    """Its `concatenated_forward` and what that calls."""

    def concatenated_forward(self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        length = max(chosen_ids.shape[1], reject_ids.shape[1])
        ids, masks = (
            torch.cat([nn.functional.pad(part, (0, length - part.shape[1]), value=value) for part in parts])
            for parts, value in (((chosen_ids, reject_ids), PAD), ((c_mask, r_mask), 0))
        )
        log_probs, output = model(
            ids, attention_mask=masks, return_output=True, return_logprobs=True, ring_attn_group=None
        )
        scored = masks.clone().bool()
        for row, prompt in zip(scored, prompt_id_lens * 2, strict=True):
            row[:prompt] = False
        scored = scored[:, 1:]
        sums = (log_probs * scored).sum(-1)
        n = len(chosen_ids)
        aux_loss = output.aux_loss if "aux_loss" in output else []
        return sums[:n], sums[n:], aux_loss, -(sums / scored.sum(-1))[:n].mean()


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """OpenRLHF, installed; the classes are as they were after each test."""
    stubs = {"openrlhf.models.actor": {"Actor": Actor}, "openrlhf.trainer.dpo_trainer": {"DPOTrainer": DPOTrainer}}
    for name in ("openrlhf", "openrlhf.models", "openrlhf.trainer", *stubs):
        module = ModuleType(name)
        vars(module).update(stubs.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)

    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.11.2" if name == "openrlhf" else version(name))
    openrlhf._warn_once.cache_clear()
    own = methods()
    yield
    openrlhf.unpatch()
    assert methods() == own


def methods():
    return Actor.__init__, Actor.forward, DPOTrainer.concatenated_forward


def actor(family="llama", **options):
    model = tiny_model(family)
    disable_dropout(model)
    return Actor(model, **options)


def pairs():
    """Chosen and rejected, padded on the right to different lengths, and the prompts' lengths."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randint(3, VOCAB, (3, n), generator=generator) for n in (9, 7))
    masks = torch.ones_like(chosen), torch.ones_like(rejected)
    masks[0][1, 6:] = masks[1][2, 5:] = 0
    return chosen * masks[0], masks[0], rejected * masks[1], masks[1], [2, 4, 1]


def rollout():
    """Prompts padded on the left, answers on the right, and the mask [B, 5] of the actions."""
    ids = torch.randint(3, VOCAB, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, -2:] = 0
    return ids * mask, mask, mask[:, 1:][:, -5:].clone()


def same(found, wanted, **tolerance):
    """Two results of `concatenated_forward` for a model without experts."""
    assert found[2] == wanted[2] == []
    for index in (0, 1, 3):
        torch.testing.assert_close(found[index], wanted[index], **tolerance)


def compare(ours, theirs, run):
    """`run(actor)` -> tensors and a loss; both actors' values and gradients."""
    calls = []
    head = ours.model.get_output_embeddings()
    head.register_forward_hook(lambda *args: calls.append(1))
    assert is_attached(ours.model)
    found = run(ours)
    openrlhf.unpatch()
    wanted = run(theirs)
    assert not calls

    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    found[-1].backward()
    wanted[-1].backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=2e-5 * float(q.grad.abs().max()), msg=name)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("mixtral", {}),
        ("llama", {"lora_rank": 2, "target_modules": ["q_proj", "lm_head"]}),
    ],
    ids=["llama", "softcap", "experts", "LoRA"],
)
def test_dpo(family, options):
    theirs = actor(family, **options)
    openrlhf.patch()
    ours = actor(family, **options)
    ours.load_state_dict(theirs.state_dict())

    def run(model):
        chosen, rejected, aux_loss, nll = DPOTrainer().concatenated_forward(model, *pairs())
        assert isinstance(aux_loss, list) == (family != "mixtral")
        loss = chosen.sum() - 2 * rejected.sum() + 0.3 * nll + (0.1 * aux_loss if family == "mixtral" else 0.0)
        return (chosen, rejected, nll, loss)

    compare(ours, theirs, run)


def test_dpo_scores_answers_only(monkeypatch):
    seen = []
    token_logps = openrlhf.token_logps

    def spy(model, labels, **options):
        seen.append(labels)
        return token_logps(model, labels, **options)

    monkeypatch.setattr(openrlhf, "token_logps", spy)
    openrlhf.patch()
    DPOTrainer().concatenated_forward(actor(), *pairs())
    # lengths 9, 6, 9 and 7, 7, 5 without prompts of 2, 4, 1
    assert (seen[0] != -100).sum(1).tolist() == [7, 2, 8, 5, 3, 4]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_actions_of_ppo(family, temperature):
    theirs = actor(family, temperature=temperature)
    openrlhf.patch()
    ours = actor(family, temperature=temperature)
    ids, mask, actions = rollout()

    def run(model):
        alone = model(ids, actions, mask)
        logps, output = model(ids, actions, attention_mask=mask, return_output=True, return_entropy=True)
        assert logps.shape == actions.shape
        torch.testing.assert_close(alone, logps)
        assert output.entropy.shape == (3, 9)
        entropy = output.entropy[:, -5:] * actions
        aux_loss = output.aux_loss if "aux_loss" in output else torch.zeros(())
        return logps, entropy, aux_loss, (logps * torch.linspace(-1, 1, 5)).sum() + entropy.sum() + aux_loss

    compare(ours, theirs, run)


@pytest.mark.parametrize("end", ["real", "one late"])
def test_every_token_of_sft(end):
    """OpenRLHF's mask of several turns may count the first token of the padding, too."""
    theirs = actor()
    openrlhf.patch()
    ours = actor()
    ids, mask, _ = rollout()
    counted = mask[:, 1:] if end == "real" else mask[:, :-1]

    def run(model):
        logps = model(ids, attention_mask=mask, return_logprobs=True)
        assert logps.shape == (3, 9)
        logps = logps * counted  # OpenRLHF's caller does so
        return logps, logps.sum()

    compare(ours, theirs, run)


def test_logits_that_are_asked_for():
    openrlhf.patch()
    ours = actor()
    ids, mask, _ = rollout()
    output = ours(ids, attention_mask=mask, return_output=True, return_entropy=True)
    openrlhf.unpatch()
    wanted = ours(ids, attention_mask=mask, return_output=True, return_entropy=True)
    assert torch.equal(output.logits, wanted.logits)
    assert torch.equal(output.entropy, wanted.entropy)


def tiny_llama():
    return tiny_model("llama")


def two_layers():
    """A model whose head is more than one linear layer."""
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    return model


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"packing_samples": True}, r"packed samples \(--ds.packing_samples\) and ring attention cannot be served"),
        ({"is_vlm": True}, "vision-language models cannot be served"),
        ({"ds_config": {"zero_optimization": {"stage": 3}}}, "DeepSpeed ZeRO-3, which partitions the head"),
        ({"ds_config": {"tensor_parallel": {"autotp_size": 2}}}, r"tensor parallelism \(--ds.tensor_parallel_size\)"),
        ({"ds_config": {"compile": {"deepcompile": True}}}, r"DeepCompile \(--ds.deepcompile\)"),
        ({}, "must be one linear layer"),
    ],
    ids=["packed", "images", "ZeRO-3", "tensor parallel", "DeepCompile", "head"],
)
def test_what_is_not_served_stays_openrlhfs_own(options, reason, caplog):
    make = two_layers if reason == "must be one linear layer" else tiny_llama
    wanted = DPOTrainer().concatenated_forward(Actor(make(), **options), *pairs())
    openrlhf.patch()
    for _ in range(2):  # the policy and its reference
        ours = Actor(make(), **options)
        assert not is_attached(ours.model)
        same(DPOTrainer().concatenated_forward(ours, *pairs()), wanted, rtol=0, atol=0)

    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith("openrlhf: an Actor stays OpenRLHF's own, which computes logits: ")
    assert re.search(reason, warning.getMessage())


def test_configs_that_are_served(caplog):
    openrlhf.patch()
    config = {"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 1}, "compile": {}}
    assert is_attached(actor(ds_config=config).model)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_an_actor_made_before_and_a_subclass_keep_their_own_forward():
    class Other(Actor):
        def forward(self, sequences, attention_mask, return_output, return_logprobs, ring_attn_group):
            return super().forward(sequences, None, attention_mask, return_output, return_logprobs=return_logprobs)

    before = actor()
    wanted = DPOTrainer().concatenated_forward(before, *pairs())
    openrlhf.patch()
    other = Other(tiny_model("llama"))
    assert not is_attached(before.model)
    for model in (before, other):
        same(DPOTrainer().concatenated_forward(model, *pairs()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("owner", "name"), [(Actor, "__init__"), (Actor, "forward"), (DPOTrainer, "concatenated_forward")]
)
def test_another_versions_parameters_are_refused(owner, name, monkeypatch):
    def newer(self, batch):
        raise NotImplementedError

    with monkeypatch.context() as change:
        change.setattr(owner, name, newer)
        before = methods()
        with pytest.raises(RuntimeError, match=rf"0.11.2's {owner.__name__}.{name} was one of \(self, batch\), must"):
            openrlhf.patch()
        assert methods() == before


def test_plain_calls(caplog):
    own = methods()
    openrlhf.unpatch()  # nothing to do
    with caplog.at_level(logging.INFO):
        openrlhf.patch(backend="eager", stash_bytes=0, grad_tol=0.01, grad_tol_relative=True)
    assert caplog.messages == [
        "openrlhf 0.11.2: replaced Actor.__init__, Actor.forward, "
        "DPOTrainer.concatenated_forward, to score tokens without logits"
    ]
    first = actor()
    assert first.model._sdpo_fused.grad_tol == 0.01
    assert first.model._sdpo_fused.grad_tol_relative

    # the second call replaces the first: one unpatch() restores what was there
    openrlhf.patch()
    second = actor()
    assert [(m.model._sdpo_fused.backend, m.model._sdpo_fused.stash_bytes) for m in (first, second)] == [
        ("eager", 0),
        ("auto", "auto"),
    ]
    openrlhf.unpatch()
    assert methods() == own

    with openrlhf.patch():
        assert all(a is not b for a, b in zip(methods(), own, strict=True))
    assert methods() == own
    openrlhf.unpatch()
    assert methods() == own


def test_wrong_settings_are_refused_at_once():
    own = methods()
    with pytest.raises(ValueError, match="backend: was 'cuda'"):
        openrlhf.patch(backend="cuda")
    with pytest.raises(ValueError, match="stash_bytes: was -1, must be"):
        openrlhf.patch(stash_bytes=-1)
    assert methods() == own


def test_without_openrlhf(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r"openrlhf: is not installed, must be 0\.11\.2"):
        openrlhf.patch()


def test_the_command_line_of_openrlhf(monkeypatch):
    ran = []

    def run_module(name, **options):
        ran.append((name, options, sys.argv[1:], Actor.forward.__module__))

    monkeypatch.setattr(openrlhf.runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", ["openrlhf", "--local_rank=1", "train_dpo", "--model.beta", "0.2"])
    monkeypatch.setenv("RANK", "1")
    openrlhf.main()
    options = {"run_name": "__main__", "alter_sys": True}
    assert ran == [("openrlhf.cli.train_dpo", options, ["--local_rank=1", "--model.beta", "0.2"], openrlhf.__name__)]

    with pytest.raises(SystemExit, match=r"command: was 'train_rm', must be train_dpo or train_sft"):
        openrlhf.main(["train_rm"])
    with pytest.raises(SystemExit, match="command: was None"):
        openrlhf.main(["--help"])
