"""The adapter for LLaMA-Factory on a stub of its trainers, against their own way through logits."""

from __future__ import annotations

import copy
import logging
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sdpo_kernels.integrations import llamafactory as fused
from sdpo_kernels.integrations.causal_lm import attach_fused_head, disable_dropout, is_attached
from sdpo_kernels.integrations.lm_head import unwrap
from tests.integrations.test_dpo_step import batch as pair_batch
from tests.integrations.tiny_models import VOCAB, tiny_model

FACTORY = "sdpo_kernels.integrations.llamafactory"


def answers_logps(model, inputs, labels, ld_alpha=None):
    """Logits, sums and lengths as LLaMA-Factory's get_batch_logps defines them, one answer at a time, in float64."""
    logits = model(**inputs, return_dict=True, use_cache=False).logits
    per_answer = []
    for row, wanted in zip(logits.double(), labels, strict=True):
        scored = (wanted[1:] != -100).nonzero()[:, 0]
        per_answer.append(row[scored].log_softmax(-1)[torch.arange(len(scored)), wanted[1:][scored]])
    lengths = [len(logps) for logps in per_answer]
    if ld_alpha is not None:
        shorter = [min(pair) for pair in zip(lengths[: len(lengths) // 2], lengths[len(lengths) // 2 :], strict=True)]
        cuts = zip(per_answer, shorter * 2, strict=True)
        per_answer = [torch.cat([logps[:cut], ld_alpha * logps[cut:]]) for logps, cut in cuts]
    return logits, torch.stack([logps.sum() for logps in per_answer]), torch.tensor(lengths)


class CustomDPOTrainer:
    """A stub of LLaMA-Factory's, with its parameters and its way through logits."""

    def __init__(self, model, ref_model, finetuning_args, processor, disable_dropout=True, **kwargs):
        self.model, self.ref_model = model, ref_model
        self.loss_type, self.ld_alpha = finetuning_args.pref_loss, finetuning_args.ld_alpha
        self.were_attached = [is_attached(each) for each in (model, ref_model) if each is not None]

    def concatenated_forward(self, model, batch, is_ref_model=False):
        batch = dict(batch)
        labels = batch.pop("labels")
        self.saw = batch.pop("pixel_values", None)
        logits, sums, lengths = answers_logps(model, batch, labels, None if is_ref_model else self.ld_alpha)
        logps = sums / lengths if self.loss_type in ("ipo", "orpo", "simpo") else sums
        chosen_logps, rejected_logps = logps.split(len(logps) // 2)
        chosen_logits, rejected_logits = logits.split(len(logits) // 2)
        return {
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "chosen_logits": chosen_logits,
            "rejected_logits": rejected_logits,
            "chosen_logps_avg": (sums / lengths)[: len(sums) // 2],
        }


class CustomKTOTrainer:
    """A stub of LLaMA-Factory's, with its parameters and its way through logits."""

    def __init__(self, model, ref_model, finetuning_args, processor, disable_dropout=True, **kwargs):
        self.model, self.ref_model = model, ref_model

    def forward(self, model, batch, prefix=""):
        self.saw = batch.get("pixel_values")
        inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
        logits, sums, lengths = answers_logps(model, inputs, batch[f"{prefix}labels"])
        return logits, sums, sums / lengths


REPLACED = {CustomDPOTrainer: ("__init__", "concatenated_forward"), CustomKTOTrainer: ("__init__", "forward")}
OWN = {(cls, name): vars(cls)[name] for cls, names in REPLACED.items() for name in names}


def untouched():
    return all(vars(cls)[name] is method for (cls, name), method in OWN.items())


@pytest.fixture(autouse=True)
def factory(monkeypatch):
    """A package `llamafactory`, version 0.9.5, whose trainers are the stubs; unpatched afterwards."""
    names = ("", ".launcher", ".cli", ".train", ".train.tuner", ".train.dpo", ".train.dpo.trainer", ".train.kto",
             ".train.kto.trainer")  # fmt: skip
    modules = {name: ModuleType(f"llamafactory{name}") for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"llamafactory{name}", module)
    modules[".train.dpo.trainer"].CustomDPOTrainer = CustomDPOTrainer
    modules[".train.kto.trainer"].CustomKTOTrainer = CustomKTOTrainer

    versions, version = {"llamafactory": "0.9.5"}, metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or version(name))
    for name in (*fused.ELSEWHERE, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    fused._warn_once.cache_clear()
    yield SimpleNamespace(modules=modules, versions=versions)
    fused.unpatch()
    assert untouched()


def twins(family="llama", **options):
    """Two equal models."""
    model = tiny_model(family, **options)
    disable_dropout(model)
    return model, copy.deepcopy(model)


def make(model, ref_model=None, loss="sigmoid", ld_alpha=None, cls=CustomDPOTrainer, use_liger_kernel=False):
    settings = SimpleNamespace(pref_loss=loss, ld_alpha=ld_alpha)
    args = SimpleNamespace(use_liger_kernel=use_liger_kernel)
    return cls(model=model, ref_model=ref_model, finetuning_args=settings, processor=None, args=args, tokenizer=None)


def pairs(seed=0):
    """Two pairs: the chosen answer of the first is the longer one, and the rejected of the second."""
    ids, labels, mask = (rows[[0, 3, 2, 1]] for rows in pair_batch(seed))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def answers():
    kl = pairs(seed=1)
    return pairs() | {f"kl_{name}": value for name, value in kl.items()} | {"kto_tags": torch.tensor([True, False] * 2)}


def assert_equal_gradients(found, wanted, models):
    """Of one number that weighs every log-prob differently; the models are twins."""
    for logps in (found, wanted):
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    assert found.grad_fn is not None
    for (name, ours), own in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (ours.grad is None) == (own.grad is None), name
        if own.grad is not None:
            largest = float(own.grad.abs().max())
            torch.testing.assert_close(ours.grad, own.grad, rtol=2e-3, atol=2e-5 * largest, msg=name)


def assert_equal_pairs(found, wanted, labels):
    """All that concatenated_forward returns; the logits are of scored tokens."""
    assert found.keys() == wanted.keys()
    for name in ("chosen_logps", "rejected_logps", "chosen_logps_avg"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-5, atol=1e-5)
    for name, half in zip(("chosen_logits", "rejected_logits"), labels.chunk(2), strict=True):
        scored = wanted[name][:, :-1][half[:, 1:] != -100]
        torch.testing.assert_close(found[name].mean(), scored.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_pairs_have_the_values_and_gradients_of_the_trainers_own_way(family, loss, ld_alpha):
    model, twin = twins(family)
    batch = pairs()
    assert (batch["labels"] != -100).sum(1).tolist() == [4, 5, 3, 6]  # ld_alpha changes either half
    wanted = make(twin, loss=loss, ld_alpha=ld_alpha).concatenated_forward(twin, batch)

    heads = []
    with fused.patch():
        trainer = make(model, loss=loss, ld_alpha=ld_alpha)
        model.get_output_embeddings().register_forward_hook(lambda *_: heads.append(1))
        found = trainer.concatenated_forward(model, batch)
    assert heads == []
    assert_equal_pairs(found, wanted, batch["labels"])
    both = [torch.cat([out["chosen_logps"], out["rejected_logps"]]) for out in (found, wanted)]
    assert_equal_gradients(*both, (model, twin))


@pytest.mark.parametrize("loss", ["ipo", "orpo", "hinge", "kto_pair"])
def test_every_loss_gets_the_sums_or_means_that_it_is_defined_on(loss):
    model, twin = twins()
    wanted = make(twin, loss=loss).concatenated_forward(twin, pairs())
    with fused.patch():
        found = make(model, loss=loss).concatenated_forward(model, pairs())
    assert_equal_pairs(found, wanted, pairs()["labels"])


def test_ld_alpha_is_not_for_the_reference_and_the_batch_stays_whole():
    model, twin = twins()
    batch = pairs()
    with fused.patch():
        trainer = make(model, copy.deepcopy(model), ld_alpha=0.3)
        policy = trainer.concatenated_forward(model, batch)["chosen_logps"]
        found = trainer.concatenated_forward(trainer.ref_model, batch, is_ref_model=True)
    assert trainer.were_attached == [True, True]
    assert batch.keys() == pairs().keys()
    wanted = make(twin, ld_alpha=0.3).concatenated_forward(twin, batch, is_ref_model=True)
    assert_equal_pairs(found, wanted, batch["labels"])
    assert not torch.equal(policy, found["chosen_logps"])


def test_equal_models_have_equal_log_probs_to_the_bit():
    model, twin = twins()
    with fused.patch():
        trainer = make(model, twin)
        policy = trainer.concatenated_forward(model, pairs())
        with torch.no_grad():
            reference = trainer.concatenated_forward(twin, pairs(), is_ref_model=True)
    assert torch.equal(policy["chosen_logps"], reference["chosen_logps"])


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_lora_and_its_reference_without_the_adapter(targets):
    model, twin = twins()
    torch.manual_seed(1)
    lora = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    other = copy.deepcopy(lora)
    wanted = make(other).concatenated_forward(other, pairs())
    base = make(twin).concatenated_forward(twin, pairs())
    with fused.patch():
        trainer = make(lora)
        found = trainer.concatenated_forward(lora, pairs())
        with torch.no_grad(), lora.disable_adapter():
            reference = trainer.concatenated_forward(lora, pairs(), is_ref_model=True)
    assert is_attached(lora)
    assert_equal_pairs(found, wanted, pairs()["labels"])
    assert_equal_pairs(reference, base, pairs()["labels"])
    assert_equal_gradients(found["chosen_logps"], wanted["chosen_logps"], (lora, other))


@pytest.mark.parametrize("prefix", ["", "kl_"])
def test_answers_have_the_values_and_gradients_of_the_trainers_own_way(prefix):
    model, twin = twins()
    batch = answers()
    own_logits, own_sums, own_means = make(twin, cls=CustomKTOTrainer).forward(twin, batch, prefix)
    with fused.patch():
        logits, sums, means = make(model, cls=CustomKTOTrainer).forward(model, batch, prefix)
    torch.testing.assert_close(sums.double(), own_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means.double(), own_means, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(sums, own_sums, (model, twin))

    # the trainer takes the examples of a tag and logs the sum of their logits
    scored = batch[f"{prefix}labels"][:, 1:] != -100
    wanted = (own_logits[:, :-1] * scored[..., None])[batch["kto_tags"]].sum()
    torch.testing.assert_close(logits[batch["kto_tags"]].nansum(), wanted, rtol=1e-4, atol=1e-4)


def test_the_auxiliary_loss_of_a_mixture_of_experts_is_not_computed(monkeypatch):
    model, twin = twins("mixtral", output_router_logits=True)
    wanted = make(twin).concatenated_forward(twin, pairs())

    def refuse(*_):
        raise AssertionError("computed")

    module = sys.modules[type(model).__module__]
    with fused.patch():
        trainer = make(model)
        monkeypatch.setattr(module, "load_balancing_loss_func", refuse)
        assert_equal_pairs(trainer.concatenated_forward(model, pairs()), wanted, pairs()["labels"])


@pytest.mark.parametrize(
    ("cls", "method", "batch"),
    [(CustomDPOTrainer, "concatenated_forward", pairs), (CustomKTOTrainer, "forward", answers)],
)
def test_a_batch_with_pictures_goes_the_trainers_own_way_with_one_warning(cls, method, batch, caplog):
    model, _ = twins()
    batch = batch() | {"pixel_values": torch.ones(1)}
    with fused.patch():
        trainer = make(model, cls=cls)
        for _ in range(2):
            found = getattr(trainer, method)(model, batch)
    logits = found["chosen_logits"] if cls is CustomDPOTrainer else found[0]
    assert trainer.saw is batch["pixel_values"]
    assert logits.shape[-1] == VOCAB
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        "llamafactory: the trainer keeps its own way, with logits. batch: had pixel_values, must have text only"
    )


def quantized(model):
    model.lm_head.weight = nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)


def partitioned(model):
    weight = nn.Parameter(torch.empty(0))
    weight.ds_shape = torch.Size((VOCAB, 32))
    model.lm_head.weight = weight


@pytest.mark.parametrize(
    ("spoil", "reason"), [(quantized, "torch.int8 weight"), (partitioned, "ZeRO-3 has partitioned")]
)
def test_a_reference_that_cannot_be_served_leaves_both_models_as_they_were(spoil, reason, caplog):
    model, reference = twins()
    spoil(reference)
    with fused.patch():
        trainer = make(model, reference)
        found = trainer.concatenated_forward(model, pairs())
    assert trainer.were_attached == [False, False]
    assert "forward" not in vars(model)
    assert found["chosen_logits"].shape[-1] == VOCAB
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "the trainer keeps its own way, with logits. model: its head was a Linear" in warning
    assert reason in warning


def test_transformers_own_liger_option_is_left_to_it(caplog):
    model, _ = twins()
    with fused.patch():
        trainer = make(model, use_liger_kernel=True)
        assert trainer.concatenated_forward(model, pairs())["chosen_logits"].shape[-1] == VOCAB
    assert trainer.were_attached == [False]
    assert caplog.text.count("use_liger_kernel: was true, must be false") == 1


def test_zero3_is_left_to_the_trainer_before_it_partitions_the_head(monkeypatch, caplog):
    monkeypatch.setattr(fused, "is_deepspeed_zero3_enabled", lambda: True)
    model, _ = twins()
    with fused.patch():
        trainer = make(model)
        assert trainer.concatenated_forward(model, pairs())["chosen_logits"].shape[-1] == VOCAB
    assert trainer.were_attached == [False]
    assert caplog.text.count("DeepSpeed: was ZeRO-3, which partitions the head, must be ZeRO-2 or less") == 1


class FullyShardedDataParallel(nn.Module):
    """As FSDP1's: it hides the attributes of the model inside."""

    def __init__(self, module):
        super().__init__()
        self.inside = [module]

    def forward(self, **inputs):
        return self.inside[0](**inputs)


def test_a_wrapper_that_hides_the_head_and_a_trainer_made_before_go_their_own_way(caplog):
    model, twin = twins()
    early = make(twin)
    with fused.patch():
        late = make(model)
        wrapped = FullyShardedDataParallel(model)
        assert late.concatenated_forward(wrapped, pairs())["chosen_logits"].shape[-1] == VOCAB
        assert early.concatenated_forward(twin, pairs())["chosen_logits"].shape[-1] == VOCAB
    for name in ("FullyShardedDataParallel", "LlamaForCausalLM"):
        assert f"model: was a {name} without a fused head: made before patch(), or wrapped by FSDP1" in caplog.text


def test_one_model_as_policy_and_reference_and_one_that_has_a_head_already():
    model, twin = twins()
    with fused.patch():
        assert make(model, model).were_attached == [True, True]  # as in LLaMA-Factory's evaluation
        attach_fused_head(twin)
        assert make(twin, model).were_attached == [True, True]


def test_replaced_methods_are_named_and_restored(caplog):
    with caplog.at_level(logging.INFO):
        adapter = fused.patch()
    assert caplog.messages == [
        "llamafactory 0.9.5: replaced CustomDPOTrainer.__init__, "
        "CustomDPOTrainer.concatenated_forward, CustomKTOTrainer.__init__, CustomKTOTrainer.forward, "
        "to score tokens without logits"
    ]
    assert not any(vars(cls)[name] is method for (cls, name), method in OWN.items())

    # a trainer made in between goes on, with logits, on the model that has the head
    model, _ = twins()
    trainer = make(model)
    fused.unpatch()
    assert untouched()
    assert trainer.concatenated_forward(model, pairs())["chosen_logits"].shape[-1] == VOCAB
    fused.unpatch()
    assert untouched()
    with adapter:
        pass
    assert untouched()


def test_a_second_patch_has_its_own_settings():
    """For a model that an earlier trainer had, too."""
    model, _ = twins()
    tolerance = {"grad_tol": 0.01, "grad_tol_relative": True}
    for settings in ({"stash_bytes": 7}, {"backend": "eager", "stash_bytes": 0, **tolerance}):
        fused.patch(**settings)
        make(model)
    assert (unwrap(model)._sdpo_fused.backend, unwrap(model)._sdpo_fused.stash_bytes) == ("eager", 0)
    assert unwrap(model)._sdpo_fused.grad_tol == 0.01
    assert unwrap(model)._sdpo_fused.grad_tol_relative
    assert not untouched()
    fused.unpatch()
    assert untouched()


@pytest.mark.parametrize(
    ("cls", "name", "other"),
    [
        (CustomDPOTrainer, "__init__", lambda self, model, ref_model, **kwargs: None),
        (CustomDPOTrainer, "concatenated_forward", lambda self, model, batch: None),
        (CustomKTOTrainer, "__init__", lambda self, model, **kwargs: None),
        (CustomKTOTrainer, "forward", lambda self, model, batch: None),
    ],
)
def test_another_versions_parameters_are_refused_and_nothing_stays_replaced(cls, name, other, monkeypatch):
    fused.patch()
    fused.unpatch()
    with monkeypatch.context() as changed:
        changed.setattr(cls, name, other)
        with pytest.raises(
            RuntimeError, match=rf"llamafactory: 0.9.5's {cls.__name__}.{name} was one of \(self, model"
        ):
            fused.patch()
        assert vars(cls)[name] is other
    assert untouched()


def test_a_version_without_the_trainer_or_not_tried_or_not_installed(factory, monkeypatch, caplog):
    factory.versions["llamafactory"] = "0.9.6"
    with fused.patch():
        assert "llamafactory 0.9.6 is untested with sdpo_kernels (tried: 0.9.5)" in caplog.text

    del factory.modules[".train.kto.trainer"].CustomKTOTrainer
    with pytest.raises(RuntimeError, match=r"llamafactory: train.kto.trainer.CustomKTOTrainer was missing"):
        fused.patch()
    assert untouched()

    del factory.versions["llamafactory"]
    with pytest.raises(ImportError, match=r"llamafactory: is not installed, must be 0\.9\.5"):
        fused.patch()


def test_wrong_settings_and_other_trainers_are_refused_before_anything_is_replaced(monkeypatch):
    with pytest.raises(ValueError, match="backend: was 'cuda'"):
        fused.patch(backend="cuda")
    with pytest.raises(ValueError, match="stash_bytes: was -1, must be"):
        fused.patch(stash_bytes=-1)
    for name in ("USE_RAY", "USE_MCA", "USE_V1"):
        with monkeypatch.context() as changed:
            changed.setenv(name, "True")
            with pytest.raises(RuntimeError, match=f"{name}: was True, must be 0: .*"):
                fused.patch()
    assert untouched()


def test_the_command_trains_patched(factory, monkeypatch):
    seen = []
    factory.modules[".cli"].main = lambda: seen.append(("cli", sys.argv[1:], untouched()))
    factory.modules[".train.tuner"].run_exp = lambda: seen.append(("run_exp", sys.argv[1:], untouched()))
    factory.modules[".launcher"].__file__ = "launcher.py"
    monkeypatch.setattr(sys, "argv", ["llamafactory", "train", "run.yaml", "max_steps=2"])
    fused.main()
    assert seen == [("cli", ["train", "run.yaml", "max_steps=2"], False)]

    # its launcher formats this command, and splits it at spaces
    command = "torchrun --nproc_per_node 2 {file_name} run.yaml".format(
        file_name=sys.modules["llamafactory.launcher"].__file__
    )
    assert command.split()[3:] == ["-m", FACTORY, "train", "run.yaml"]

    # in a process of torchrun
    monkeypatch.setenv("LOCAL_RANK", "0")
    fused.main()
    assert seen[1:] == [("run_exp", ["run.yaml", "max_steps=2"], False)]


@pytest.mark.parametrize("arguments", [[], ["webui"], ["run.yaml"]])
def test_other_commands_are_refused(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["llamafactory", *arguments])
    with pytest.raises(SystemExit, match=f"usage: python -m {FACTORY} train run.yaml"):
        fused.main()
    assert untouched()
