"""axolotl's plugin on stubs of axolotl and TRL: what it patches, sets, refuses and restores."""

from __future__ import annotations

import importlib
import logging
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from sdpo_kernels.integrations.trl import LIGER_LAYERS_OFF, FusedHead, FusedHeadWithEntropy, LogitsPath
from tests.integrations import trl_stubs
from tests.integrations.test_dpo_step import batch
from tests.integrations.tiny_models import tiny_model

NAME = "sdpo_kernels.integrations.axolotl"


class RLType(str, Enum):
    """axolotl's, as it is in a validated configuration."""

    DPO = "dpo"
    IPO = "ipo"
    KTO = "kto"
    GRPO = "grpo"
    GDPO = "gdpo"
    ORPO = "orpo"


class DictDefault(dict):
    """axolotl's: a missing key is None."""

    def __getattr__(self, name):
        return self.get(name)


class BasePlugin:
    """axolotl's, with the hooks that matter here."""

    def get_input_args(self):
        """Nothing."""

    def pre_model_load(self, cfg):
        """Nothing."""

    def get_training_args(self, cfg):
        """Nothing."""

    def post_train_unload(self, cfg):
        """Nothing."""


@pytest.fixture
def plugin(monkeypatch):
    """The plugin, as axolotl makes it: `module.Class()` from the YAML's name."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME).FusedHeadPlugin()
    sys.modules.pop(NAME)


@pytest.fixture
def trl(monkeypatch):
    """A stub of TRL 1.14."""
    return trl_stubs.make_1_14(monkeypatch)


def config(rl=RLType.DPO, **keys):
    """A validated configuration: the plugin's own keys have their defaults."""
    own = {"fused_head_backend": "auto", "fused_head_stash_bytes": "auto"}
    keys = own | {"fused_head_grad_tol": 0.0, "fused_head_grad_tol_relative": False} | keys
    return DictDefault(rl=rl, **{n: DictDefault(v) if isinstance(v, dict) else v for n, v in keys.items()})


def test_axolotl_finds_the_plugins_own_keys(plugin):
    module, name = plugin.get_input_args().rsplit(".", 1)
    keys = getattr(sys.modules[module], name)
    assert keys().model_dump() == {
        "fused_head_backend": "auto", "fused_head_stash_bytes": "auto", "fused_head_grad_tol": 0.0,
        "fused_head_grad_tol_relative": False,
    }  # fmt: skip
    assert keys(fused_head_stash_bytes=0).fused_head_stash_bytes == 0


def test_the_page_has_the_plugins_name(plugin):
    page = (Path(__file__).resolve().parents[2] / "docs/integrations.md").read_text(encoding="utf-8")
    assert f"plugins: [{type(plugin).__module__}.{type(plugin).__name__}]" in page


def test_trl_is_patched_for_both_models_and_restored(plugin, trl):
    tolerance = {"fused_head_grad_tol": 0.01, "fused_head_grad_tol_relative": True}
    cfg = config(fused_head_backend="eager", fused_head_stash_bytes=0, **tolerance)
    for _ in ("model", "reference"):  # axolotl loads two
        plugin.pre_model_load(cfg)
        assert {type(held) for held in trl.bound()} == {FusedHeadWithEntropy}
        assert {(held.backend, held.stash_bytes, held.replaces) for held in trl.bound()} == {("eager", 0, trl.theirs)}
        assert {(held.grad_tol, held.grad_tol_relative) for held in trl.bound()} == {(0.01, True)}
    assert isinstance(trl.dpo.selective_log_softmax_and_entropy, LogitsPath)

    plugin.post_train_unload(cfg)
    assert all(held is trl.theirs for held in trl.bound())
    assert trl.dpo.selective_log_softmax_and_entropy is trl_stubs.from_logits


HEAD_ALONE = {"use_liger_kernel": True, "liger_kernel_config": LIGER_LAYERS_OFF}


@pytest.mark.parametrize(
    ("cfg", "arguments"),
    [
        (config(), HEAD_ALONE),
        (config(RLType.IPO), HEAD_ALONE),
        (config(RLType.KTO), HEAD_ALONE),
        (config(RLType.GRPO, trl={"beta": 0.1}), HEAD_ALONE),
        (config(RLType.GDPO), HEAD_ALONE),
        (config("dpo", dpo_use_liger_kernel=True), {"use_liger_kernel": True}),
        (config(RLType.GRPO, trl={"use_liger_loss": True}), {"use_liger_kernel": True}),
    ],
    ids=["dpo", "ipo", "kto", "grpo", "gdpo", "with Liger's layers", "grpo with Liger's layers"],
)
def test_trainers_of_trl_1_14_are_led_to_the_head(plugin, trl, cfg, arguments, caplog):
    plugin.pre_model_load(cfg)
    with caplog.at_level(logging.INFO, logger="axolotl"):
        assert plugin.get_training_args(cfg) == arguments
    (message,) = caplog.messages
    assert message.startswith("TRL 1.14 scores tokens without logits")
    assert ("the plugin has set use_liger_kernel" in message) == (arguments is HEAD_ALONE)
    plugin.post_train_unload(cfg)


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (config(RLType.ORPO), "rl: was 'orpo', must be one of dpo, ipo, kto, grpo, gdpo"),
        (config(None), "rl: was None"),
        (config(dpo_use_liger_kernel=False), "dpo_use_liger_kernel: was false, must be true or left out"),
        (config(RLType.IPO, dpo_use_liger_kernel=False), "dpo_use_liger_kernel: was false"),
        (config(RLType.GRPO, trl={"use_liger_loss": False}), r"trl\.use_liger_loss: was false"),
        (config(RLType.GRPO, trl={"async_prefetch": True}), r"trl\.async_prefetch: was true, must be false"),
        (config(RLType.GDPO, trl={"use_data_producer": True}), r"trl\.use_data_producer: was true"),
        (config(fused_head_backend="cuda"), "backend: was 'cuda'"),
        (config(fused_head_stash_bytes=-1), "stash_bytes: was -1"),
    ],
    ids=str,
)
def test_what_is_refused_leaves_trl_alone(plugin, trl, cfg, text):
    with pytest.raises(ValueError, match=text):
        plugin.pre_model_load(cfg)
    assert all(held is trl.theirs for held in trl.bound())


def test_another_option_of_the_same_name_is_not_read(plugin, trl):
    cfg = config(RLType.KTO, dpo_use_liger_kernel=False, trl={"use_liger_loss": False})
    plugin.pre_model_load(cfg)
    assert plugin.get_training_args(cfg) == HEAD_ALONE
    plugin.post_train_unload(cfg)


def test_an_older_trl_is_refused(plugin, trl):
    trl.package.__version__ = "1.13.0"
    with pytest.raises(RuntimeError, match=r"was 1\.13, must be at least 1\.14"):
        plugin.pre_model_load(config())


def test_later_versions_of_trl_need_no_option(plugin, monkeypatch):
    trl = trl_stubs.make_current(monkeypatch)
    for cfg in (config(), config(dpo_use_liger_kernel=False)):
        plugin.pre_model_load(cfg)
        assert plugin.get_training_args(cfg) is None
        assert {type(held) for held in trl.bound()} == {FusedHead}
    plugin.post_train_unload(config())
    assert all(held is trl.theirs for held in trl.bound())


def test_without_axolotl_the_import_names_it():
    assert NAME not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="axolotl") as error:
        importlib.import_module(NAME)
    assert error.value.name.split(".")[0] == "axolotl"


def dpo_loss(model, reference, ids, labels, mask, use_liger_kernel=False, liger_kernel_config=None):
    """DPOTrainer's loss in TRL 1.14, written from its description, with the names of the trainer's own module."""
    trainer = sys.modules["trl.trainer.dpo_trainer"]
    targets, scored = ids[:, 1:], labels[:, 1:] != -100

    def logps(model):
        if use_liger_kernel:
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1][scored]
            head = model.lm_head
            found, _ = trainer._ChunkedLogProbFunction.apply(
                hidden, head.weight, head.bias, targets[scored], 1.0, 16, None, 1.0
            )
            return found.new_zeros(scored.shape).masked_scatter(scored, found).sum(1)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return (trainer.selective_log_softmax_and_entropy(logits, targets)[0] * scored).sum(1)

    with torch.no_grad():
        ref = logps(reference)
    chosen, rejected = (logps(model) - ref).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def test_loss_and_gradients_are_the_stock_trainers(plugin, trl):
    model, reference = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.9)
    stock = dpo_loss(model, reference, *batch())
    stock.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    calls = []
    for each in (model, reference):
        each.lm_head.register_forward_hook(lambda *args: calls.append(args))
    plugin.pre_model_load(config())
    loss = dpo_loss(model, reference, *batch(), **plugin.get_training_args(config()))
    plugin.post_train_unload(config())
    loss.backward()
    assert not calls
    assert loss.item() == pytest.approx(stock.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[name]).abs().max() < 1e-5 * max(1.0, wanted[name].abs().max().item()), name
