"""A reference that follows the policy: the average, the swap, runs in each mode, kills."""

import math
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.batches import Batch
from sdpo_kernels.stepwise.models.load import load_model
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.references.ema import EMA_FILE, EMA_STATE, EmaReference, load_ema_into, swapped, trained
from sdpo_kernels.stepwise.settings.reference import EmaSettings
from sdpo_kernels.stepwise.training import checkpoints
from sdpo_kernels.stepwise.training.trainer import StageTrainer
from tests.stepwise import runs
from tests.stepwise.test_kill import quick

LN2 = math.log(2)
CPU = torch.device("cpu")


def tiny() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    return model


def moved(model: nn.Module) -> dict[str, torch.Tensor]:
    """Change the trained weights at random; returns the new values."""
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(torch.randn_like(weight))
    return {name: weight.detach().double().clone() for name, weight in trained(model).items()}


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.99])
def test_the_average_matches_a_replay_in_float64(decay):
    model = tiny()
    wanted = {name: weight.detach().double().clone() for name, weight in trained(model).items()}
    following = EmaReference(model, EmaSettings(decay=decay, sync_steps=4))
    assert set(following.average) == {"0.weight", "1.weight", "1.bias"}  # no frozen weight
    for step in range(1, 11):
        policy = moved(model)
        wanted = {name: decay * wanted[name] + (1 - decay) * policy[name] for name in policy}
        following.after_step(step)
        for name, weight in following.average.items():
            torch.testing.assert_close(weight.double(), wanted[name], rtol=1e-5, atol=1e-6)
        if step == 3:
            assert following.reference is None
        if step in (4, 8):
            synced = wanted
        if step >= 4:
            for name, weight in following.reference.items():
                torch.testing.assert_close(weight.double(), synced[name], rtol=1e-5, atol=1e-6)


def test_the_reference_becomes_the_policy_or_stays_fixed():
    model = tiny()
    following, fixed = (
        EmaReference(model, EmaSettings(mode="policy", sync_steps=2)),
        EmaReference(model, EmaSettings(mode="fixed")),
    )
    for step in range(1, 4):
        policy = moved(model)
        following.after_step(step)
        fixed.after_step(step)
        if step == 2:
            synced = policy
    assert all(torch.equal(following.reference[name].double(), synced[name]) for name in synced)
    assert fixed.reference is None
    assert all(torch.equal(fixed.average[name], following.average[name]) for name in synced)


def test_the_average_of_a_constant_policy_does_not_drift():
    model = tiny()
    following = EmaReference(model, EmaSettings(decay=0.9, sync_steps=1))
    for step in range(1, 100):
        following.after_step(step)
    assert all(torch.equal(following.average[name], weight) for name, weight in trained(model).items())


@pytest.mark.parametrize("fails", [False, True])
def test_a_swap_restores_the_same_bits_in_the_same_storage(fails):
    model = tiny()
    following = EmaReference(model, EmaSettings(decay=0.5, sync_steps=1))
    moved(model)
    following.after_step(1)
    before = {name: (w, w.data_ptr(), w.detach().clone()) for name, w in model.named_parameters()}
    other = {name: weight.clone() for name, weight in following.reference.items()}
    loss = model(torch.ones(1, 4)).sum()  # a graph that was made before is not disturbed
    try:
        with swapped(model, following.reference):
            inside = model(torch.ones(1, 4))
            assert torch.equal(model[1].weight, other["1.weight"])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    for name, weight in model.named_parameters():
        assert weight is before[name][0]
        assert weight.data_ptr() == before[name][1]
        assert torch.equal(weight, before[name][2])
    assert all(torch.equal(following.reference[name], other[name]) for name in other)
    assert not torch.equal(inside, model(torch.ones(1, 4)))
    loss.backward()
    assert torch.equal(model[1].bias.grad, torch.ones(2))


def test_an_enclosing_autocast_caches_no_cast_of_the_other_weights():
    """autocast caches its casts of weights; one made without gradient would also leave the policy without its own."""
    model = tiny()
    zeros = {name: torch.zeros_like(weight) for name, weight in trained(model).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.ones(1, 4))  # the policy's own casts are kept now
        with swapped(model, zeros), torch.no_grad():
            assert float(model(torch.ones(1, 4)).abs().sum()) == 0.0
        out = model(torch.ones(1, 4)).sum()
    out.backward()
    assert float(out.detach()) != 0.0
    assert model[1].weight.grad is not None


def test_the_state_survives_a_checkpoint_bit_for_bit(tmp_path):
    model = tiny()
    settings = EmaSettings(sync_steps=2)
    following, restored = EmaReference(model, settings), EmaReference(tiny(), settings)
    for step in range(1, 4):
        moved(model)
        following.after_step(step)
        following.save(tmp_path)
        restored.load(tmp_path)
        assert (restored.reference is None) == (step < 2)
        for part in ("average", "reference"):
            mine, theirs = getattr(following, part) or {}, getattr(restored, part) or {}
            assert set(mine) == set(theirs)
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ---- runs ----

WAYS = {
    "fp32": {},
    "bf16": {"trainer": {"bf16": True}},
    "lora": {"lora": {"r": 2}},
    "lora on bf16 weights": {"lora": {"r": 2}, "dtype": "bfloat16"},
    "checkpointing": {"trainer": {"gradient_checkpointing": True}},
    "padded": {"batching": "padded"},
    "accumulation": {"trainer": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}},
}


POLICY, NO_MEMORY = {"mode": "policy", "sync_steps": 1}, {"decay": 0.0, "sync_steps": 1}


@pytest.mark.parametrize(("way", "ema"), [*((way, POLICY) for way in WAYS), ("fp32", NO_MEMORY), ("lora", NO_MEMORY)])
def test_a_reference_that_is_the_policy_keeps_every_loss_at_ln_2(tmp_path, model, way, ema):
    """An exact case for the swap: synced after each step, the reference scores the same as the policy."""
    runs.train(runs.configured(tmp_path, model, reference="ema", ema=ema, **WAYS[way]))
    lines = runs.metrics(tmp_path / "run")
    assert len(lines) == 5
    for line in lines:
        assert line["loss"] == pytest.approx(LN2, abs=1e-6)
        assert line["grad_norm"] > 0


@pytest.mark.parametrize("trainer", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}])
def test_each_batch_is_scored_by_the_reference_of_its_step(tmp_path, model, monkeypatch, trainer):
    """Against a replay of the average in float64, from the policy's weights after each optimiser step."""
    policies, seen = [], []
    after_step, logps = EmaReference.after_step, EmaReference.logps

    def record_step(self, step):
        policies.append({name: w.detach().double().clone() for name, w in trained(self.model).items()})
        after_step(self, step)

    def record_logps(self, wrapped, batch, ld_alpha=None):
        if not policies:
            policies.append({name: w.detach().double().clone() for name, w in trained(self.model).items()})
        found = logps(self, wrapped, batch)
        seen.append((len(policies) - 1, batch, found.clone()))
        return found

    monkeypatch.setattr(EmaReference, "after_step", record_step)
    monkeypatch.setattr(EmaReference, "logps", record_logps)
    ema = {"decay": 0.7, "sync_steps": 2}
    config = runs.configured(tmp_path, model, sizes=(20,), reference="ema", ema=ema, trainer=trainer)
    runs.train(config)
    assert len(policies) == 6
    assert len(seen) == 5 * trainer.get("gradient_accumulation_steps", 1)
    average, references = policies[0], [policies[0]]
    for step, policy in enumerate(policies[1:], 1):
        average = {name: 0.7 * average[name] + 0.3 * policy[name] for name in policy}
        references.append(average if step % 2 == 0 else references[-1])
    network = load_model(str(model), config, Precision(CPU)).model.eval()
    for step, batch, found in seen:
        network.load_state_dict({name: w.float() for name, w in references[step].items()}, strict=False)
        with torch.no_grad():
            torch.testing.assert_close(found, batch.logps(network), rtol=2e-5, atol=2e-5)
    stored = load_file(tmp_path / "run/stage-1-s1" / EMA_FILE)
    assert set(stored) == set(average)
    for name in average:
        torch.testing.assert_close(stored[name].double(), average[name], rtol=1e-5, atol=1e-6)


def test_before_its_first_sync_it_costs_no_second_forward(tmp_path, model, monkeypatch):
    """And it trains like `reference: previous`, bit for bit."""
    plain = tmp_path / "plain"
    plain.mkdir()
    runs.train(runs.configured(plain, model))
    forwards = {"n": 0}
    genuine = Batch.logps

    def logps(self, network, ld_alpha=None):
        forwards["n"] += 1
        return genuine(self, network)

    monkeypatch.setattr(Batch, "logps", logps)
    counts = []
    for name, ema in (("fixed", {"mode": "fixed"}), ("late", {"sync_steps": 3}), ("at 2", {"sync_steps": 2})):
        folder = tmp_path / name
        folder.mkdir()
        forwards["n"] = 0
        runs.train(runs.configured(folder, model, reference="ema", ema=ema))
        counts.append(forwards["n"])
        same = [
            runs.digest(folder / "run" / stage / "model.safetensors")
            == runs.digest(plain / "run" / stage / "model.safetensors")
            for stage in ("stage-1-s1", "stage-2-s2")
        ]
        assert same == [name != "at 2"] * 2
    assert counts[0] == counts[1] == counts[2] - 1  # the third step of the first stage


def test_the_reference_is_scored_in_eval_mode_and_training_mode_comes_back():
    """Gradient checkpointing, and whatever else depends on the mode, must behave as when the start was scored."""

    class Spy:
        ref_logps = torch.zeros(2)

        def logps(self, network, ld_alpha=None):
            modes.append((network.training, torch.is_grad_enabled()))
            if fails:
                raise KeyboardInterrupt
            return torch.ones(2)

    model, modes = tiny(), []
    following = EmaReference(model, EmaSettings(sync_steps=1))
    following.after_step(1)
    for fails in (False, True):
        try:
            assert torch.equal(following.logps(model, Spy()), torch.ones(2))
        except KeyboardInterrupt:
            assert fails
        assert model.training
    assert modes == [(False, False)] * 2


def test_evaluations_stay_against_the_stages_start(tmp_path, model):
    """So they are comparable over a stage: against a moving reference the loss would stay near ln 2."""
    evaluation = str(runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(6, seed=9)))
    trainer = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    runs.train(
        runs.configured(
            tmp_path,
            model,
            reference="ema",
            ema={"mode": "policy", "sync_steps": 1},
            eval_data=evaluation,
            trainer=trainer,
        )
    )
    lines = [line for line in runs.metrics(tmp_path / "run") if "eval_loss" in line]
    for stage in (1, 2):
        first, *later = [line["eval_loss"] for line in lines if line["stage/index"] == stage]
        assert first == pytest.approx(LN2, abs=1e-5)
        assert all(abs(loss - LN2) > 1e-3 for loss in later)


def test_the_averaged_model_of_a_stage_can_be_loaded(tmp_path, model):
    config = runs.configured(tmp_path, model, reference="ema", ema={"decay": 0.9})
    runs.train(config)
    folder = tmp_path / "run" / "stage-1-s1"
    network = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    load_ema_into(network, folder)
    stored = load_file(folder / EMA_FILE)
    assert set(stored) == set(before)
    for name, weight in network.named_parameters():
        assert torch.equal(weight, stored[name])
    assert any(not torch.equal(before[name], stored[name]) for name in stored)
    smaller = AutoModelForCausalLM.from_pretrained(runs.make_model(tmp_path / "small", hidden_size=8))
    with pytest.raises(UserError, match="missing in the model or has another shape; load the stage's own model"):
        load_ema_into(smaller, folder)
    with pytest.raises(UserError, match=r"ema\.safetensors is missing: only stages with reference: ema write one"):
        load_ema_into(network, tmp_path)


def test_in_a_lora_stage_the_adapter_is_averaged(tmp_path, model):
    config = runs.configured(tmp_path, model, reference="ema", ema={"decay": 0.9}, lora={"r": 2})
    runs.train(config)
    folder = tmp_path / "run" / "stage-2-s2"
    stored = load_file(folder / EMA_FILE)
    assert stored
    assert all("lora_" in name for name in stored)
    network = load_model(str(folder), config, Precision(CPU)).model
    load_ema_into(network, folder)
    assert all(torch.equal(weight, stored[name]) for name, weight in trained(network).items())
    with pytest.raises(UserError, match="is missing in the model"):
        load_ema_into(AutoModelForCausalLM.from_pretrained(folder), folder)


# ---- stopped and resumed ----


@pytest.mark.parametrize(
    ("ema", "more"),
    [
        ({"sync_steps": 2}, {}),
        ({"sync_steps": 3, "mode": "policy"}, {}),
        ({"sync_steps": 2}, {"lora": {"r": 2}}),
        ({"sync_steps": 1, "decay": 0.8}, {"trainer": {"gradient_accumulation_steps": 2, "bf16": True}}),
    ],
)
def test_a_stopped_stage_resumes_to_the_same_bits(tmp_path, model, monkeypatch, ema, more):
    trainer = {"save_steps": 1} | more.get("trainer", {})
    settings = {"reference": "ema", "ema": ema, **more, "trainer": trainer}
    whole = tmp_path / "whole"
    whole.mkdir()
    runs.train(runs.configured(whole, model, sizes=(24, 16), **settings))
    config = runs.configured(tmp_path, model, sizes=(24, 16), **settings)
    for stage, step in (("s1", 3), ("s2", 2)):
        with monkeypatch.context() as patch:
            runs.stop_at(patch, stage, step)
            with pytest.raises(KeyboardInterrupt):
                runs.train(config)
    manifest = runs.train(config)
    assert manifest["stages"][1]["resumed_at_step"] == 1
    wanted = runs.fingerprint(whole / "run")
    assert f"stage-2-s2/{EMA_FILE}" in wanted
    assert runs.fingerprint(tmp_path / "run") == wanted
    assert runs.leftovers(tmp_path / "run") == []


def dies_at(call: int, after: bool) -> None:
    """kill -9 while the `call`-th checkpoint is put in its place."""
    quick()
    genuine, count = checkpoints.publish_folder, 0

    def publish_folder(*args):
        nonlocal count
        count += 1
        if count == call and not after:
            runs.die()
        genuine(*args)
        if count == call:
            runs.die()

    checkpoints.publish_folder = publish_folder


def test_a_run_that_is_killed_ends_the_same(tmp_path, model):
    """The same run killed twice, before and after a checkpoint takes its place, against one never killed."""
    trainer = {"save_steps": 2, "logging_steps": 3}
    yaml = runs.write_settings(tmp_path, model, (24, 16), reference="ema", ema={"sync_steps": 2}, trainer=trainer)

    def command(name, fault, options=()):
        arguments = ("train", yaml, f"output_dir={tmp_path / name}", "--quiet")
        return runs.Child(tmp_path, *arguments, fault=fault, options=options)

    whole, killed = command("whole", quick), command("killed", dies_at, (2, False))
    assert killed.wait() == -signal.SIGKILL, killed.text
    killed = command("killed", dies_at, (2, True))
    assert killed.wait() == -signal.SIGKILL, killed.text
    killed = command("killed", quick)
    for child in (whole, killed):
        assert child.wait() == 0, child.text
    wanted = runs.fingerprint(tmp_path / "whole")
    assert f"stage-1-s1/{EMA_FILE}" in wanted
    assert runs.fingerprint(tmp_path / "killed") == wanted


def test_a_checkpoint_without_its_averages_does_not_count(tmp_path, model, monkeypatch):
    config = runs.configured(tmp_path, model, reference="ema", ema={"sync_steps": 1}, trainer={"save_steps": 1})
    with monkeypatch.context() as patch:
        runs.stop_at(patch, "s1", 3)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    (state,) = (tmp_path / "run" / ".stage-1-s1").glob(f"checkpoint-2/{EMA_STATE}")
    state.unlink()
    assert runs.train(config)["stages"][0]["resumed_at_step"] is None


def test_a_wrong_start_is_still_an_error(tmp_path, model, monkeypatch):
    genuine = StageTrainer._rescore_without_grad
    monkeypatch.setattr(StageTrainer, "_rescore_without_grad", lambda self, m, b: genuine(self, m, b) * (1 + 1e-4))
    with pytest.raises(UserError, match=r"pair .*data1\.jsonl:\d+"):
        runs.train(runs.configured(tmp_path, model, reference="ema", ema={"sync_steps": 1}))
