"""Every loss through the driver: a tiny run end to end, stopped and resumed, and the records of its stages."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdpo_kernels import losses
from sdpo_kernels.losses import PairLogps
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.batches import Batch, PairDataset, collate_packed, make_collate_padded
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.references.cache import read_scores
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.settings.run_file import dump_config, load_config
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from sdpo_kernels.stepwise.stage import REFERENCE_FILE
from tests.stepwise import runs

NAMES = [name for name in losses.loss_names() if name != "diffusion_dpo"]
MPO = [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}, {"name": "sft", "weight": 1.0}]


def first_batch(folder, model, **settings):
    """The first batch of a run: all pairs of a stage that has one batch, so shuffling does not matter."""
    prepared = prepare(runs.configured(folder, model, sizes=(4,), **settings))
    tokens = prepared.stages[0].tokens
    scores, _ = read_scores(folder / "run" / "stage-1-s1" / REFERENCE_FILE, None, len(tokens))
    data = PairDataset(tokens, scores)
    return [data[i] for i in range(len(data))]


def own_start(folder, model, wanted, **settings):
    """The first loss computed in plain torch from the model's own logits."""
    network = AutoModelForCausalLM.from_pretrained(model).double()
    sides, counts, weights = [], [], []
    for example in first_batch(folder, model, **settings):
        answers = [example["chosen"], example["rejected"]]
        lengths = [len(s.ids) - s.prompt_length for s in answers]
        sums, agreement = [], 0.0
        for sequence, length in zip(answers, lengths, strict=True):
            ids = torch.from_numpy(sequence.ids.astype("int64"))[None]
            with torch.no_grad():
                all_logps = network(input_ids=ids).logits.log_softmax(-1)[0, -length - 1 : -1]
            logps = all_logps.gather(1, ids[0, -length:, None])[:, 0]
            agreement += float((logps - (2 * all_logps).logsumexp(-1)).mean())
            alpha = 1.0 if wanted.ld_alpha is None else wanted.ld_alpha
            sums.append(logps[: min(lengths)].sum() + alpha * logps[min(lengths) :].sum())
        sides.append(sums)
        counts.append(lengths)
        weights.append(math.exp(agreement))
    policy, n = torch.tensor(sides).T, torch.tensor(counts).T
    ref = torch.zeros_like(policy) if wanted.reference_free else policy
    pair = PairLogps(*policy, *ref, *n, torch.tensor(weights))
    return float(wanted.of(pair, 0.1).mean())


@pytest.mark.parametrize("loss", [*NAMES, MPO], ids=lambda loss: loss if isinstance(loss, str) else "mpo")
def test_a_run_with_every_loss(tmp_path, model, loss):
    manifest = runs.train(runs.configured(tmp_path, model, sizes=(4, 3), loss=loss))
    wanted = losses.loss_sum(loss)
    for stage in manifest["stages"]:
        assert stage["state"] == "done"
        assert stage["loss"] == wanted.label
        assert stage["reference"] == ("none" if wanted.reference_free else "previous")
        assert (stage["reference_hash"] is None) == wanted.reference_free
        if wanted.start_value is not None:
            assert stage["first_loss"] == pytest.approx(wanted.start_value, abs=1e-5)
    assert manifest["stages"][0]["first_loss"] == pytest.approx(own_start(tmp_path, model, wanted, loss=loss), rel=1e-4)
    first, second = (line["grad_norm"] for line in runs.metrics(tmp_path / "run"))
    assert first > 1e-6
    assert second > 1e-6


@pytest.mark.parametrize(
    "loss", ["dpop", "wpo", "ld_dpo", "simpo", MPO], ids=lambda x: x if isinstance(x, str) else "mpo"
)
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, model, monkeypatch, loss):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    settings = {"sizes": (8, 4), "loss": loss, "trainer": {"save_steps": 1}}
    runs.train(runs.configured(whole, model, **settings))
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s1", step=2)
        with pytest.raises(KeyboardInterrupt):
            runs.train(runs.configured(stopped, model, **settings))
    manifest = runs.train(runs.configured(stopped, model, **settings))
    assert manifest["stages"][0]["resumed_at_step"] == 1
    assert runs.fingerprint(stopped / "run") == runs.fingerprint(whole / "run")


def test_evaluations_use_the_same_loss(tmp_path, model):
    """ld_dpo's weighted sums and wpo's weights are also there when Trainer evaluates."""
    evaluation = str(runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(5, seed=9)))
    trainer = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    for loss in ("ld_dpo", "wpo", "simpo"):
        folder = tmp_path / loss
        folder.mkdir()
        runs.train(runs.configured(folder, model, sizes=(4,), loss=loss, eval_data=evaluation, trainer=trainer))
        lines = [line for line in runs.metrics(folder / "run") if "eval_loss" in line]
        assert len(lines) == 2
        assert lines[1]["eval_loss"] != lines[0]["eval_loss"]
        if loss == "ld_dpo":
            assert lines[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
            assert lines[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_the_terms_of_a_sum_are_logged_and_add_up_to_the_loss(tmp_path, model):
    twice = [*MPO, {"name": "sft", "weight": 0.5}]
    evaluation = str(runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(5, seed=9)))
    trainer = {"eval_strategy": "steps", "eval_steps": 3}
    runs.train(runs.configured(tmp_path, model, sizes=(12,), loss=twice, eval_data=evaluation, trainer=trainer))
    lines = runs.metrics(tmp_path / "run")
    for line in lines:
        prefix = "eval_" if "eval_loss" in line else ""
        terms = {key: value for key, value in line.items() if key.startswith(f"{prefix}loss/")}
        assert set(terms) == {f"{prefix}loss/{name}" for name in ("sigmoid", "bco_pair", "sft", "sft_2")}
        assert sum(terms.values()) == pytest.approx(line[f"{prefix}loss"], rel=1e-5)
        assert terms[f"{prefix}loss/sft_2"] == pytest.approx(terms[f"{prefix}loss/sft"] / 2)

    # each is times its weight, and at the start all pairs are ties
    assert lines[0]["loss/sigmoid"] == pytest.approx(0.8 * math.log(2))
    assert (lines[0]["rewards/ties"], lines[0]["rewards/accuracies"]) == (1.0, 0.0)
    assert lines[1]["rewards/ties"] < 1


def test_another_ld_alpha_recomputes_the_cache(tmp_path, model, monkeypatch):
    made = []
    genuine = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, *a: made.append(1) or genuine(self, *a))
    scores = []
    for alpha in (0.5, 0.5, 0.2, None):
        loss = {} if alpha is None else {"loss": "ld_dpo", "loss_options": {"ld_alpha": alpha}}
        config = runs.configured(tmp_path, model, **loss)
        prepared = prepare(config)
        args = training_arguments(config, config.stages[0], tmp_path, tmp_path)
        scorer = Scorer.of(config, args, 0, Reporter(quiet=True))
        scores.append(scorer.score_path(str(model), prepared.stages[0].tokens, "x", tmp_path / "cache.safetensors"))
    assert len(made) == 3
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[1], scores[2])
    assert bool((scores[3] <= scores[2] + 1e-6).all())  # a full sum is below one that leaves tokens out


@pytest.mark.parametrize("loss", ["ld_dpo", "wpo"])
def test_bf16_passes_the_checks_of_a_stages_start(tmp_path, model, loss):
    """References are scored without wpo's extra output, which another backend may compute."""
    manifest = runs.train(runs.configured(tmp_path, model, loss=loss, trainer={"bf16": True}))
    assert [stage["state"] for stage in manifest["stages"]] == ["done", "done"]


@pytest.mark.parametrize("loss", ["ld_dpo", "wpo"])
def test_packed_and_padded_batches_give_the_same_weights(tmp_path, model, loss):
    config = runs.configured(tmp_path, model, sizes=(9,), loss=loss)
    prepared = prepare(config)
    args = training_arguments(config, config.stages[0], tmp_path, tmp_path)
    scorer = Scorer.of(config, args, 0, Reporter(quiet=True))
    loaded = scorer.load(str(model))
    data = PairDataset(prepared.stages[0].tokens, torch.zeros(9, 2))
    examples = [data[i] for i in range(9)]
    found = []
    for collate in (collate_packed, make_collate_padded(0)):
        with torch.no_grad():
            found.append(Batch.of(collate(examples)).logps_for(loaded.model, losses.loss_sum(loss)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    if loss == "wpo":
        assert torch.allclose(found[0][1], found[1][1], rtol=1e-5)
        assert found[0][1].shape == (9,)


def test_a_list_of_losses_is_dumped_with_its_defaults(tmp_path, model):
    config = runs.configured(tmp_path, model, loss=[{"name": "dpop", "options": {"dpop_lambda": 5}}, {"name": "sft"}])
    (tmp_path / "dump.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "dump.yaml")
    assert again == config
    assert again.loss == (
        {"name": "dpop", "weight": 1.0, "options": {"dpop_lambda": 5}},
        {"name": "sft", "weight": 1.0, "options": {}},
    )
    assert config.loss_sum.label == "1 dpop + 1 sft"


def test_a_reference_free_loss_sets_the_reference_to_none(tmp_path, model):
    config = runs.configured(tmp_path, model, loss="orpo")
    assert config.reference == "none"
    assert "reference: none" in dump_config(config)
