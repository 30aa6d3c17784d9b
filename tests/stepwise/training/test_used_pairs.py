"""References are scored for the pairs a stage trains on, and for no others: the same pairs, the same weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdpo_kernels.stepwise.data.schedule import Schedule
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.references.stage_references import REFERENCE_FILE
from sdpo_kernels.stepwise.training.trainer import StageTrainer
from tests.stepwise import runs

FEW = {"max_steps": 2}


def scored(folder) -> list[int]:
    """The pairs with scores in a folder's file."""
    columns = load_file(folder / REFERENCE_FILE)
    there = ~torch.stack([columns["chosen"], columns["rejected"]], 1).isnan()
    assert there.all(1).equal(there.any(1))
    return there.all(1).nonzero().flatten().tolist()


@pytest.fixture
def trained(monkeypatch) -> dict[str, set[int]]:
    """The pairs that each stage's steps get from Trainer's own dataloader, in all runs of a test."""
    pairs: dict[str, set[int]] = {}
    genuine = StageTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        pairs.setdefault(self.stage, set()).update(inputs["pair_index"].tolist())
        return genuine(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    return pairs


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many pairs are scored, call by call."""
    counts: list[int] = []
    genuine = Scorer.score

    def score(self, loaded, tokens, label):
        counts.append(len(tokens))
        return genuine(self, loaded, tokens, label)

    monkeypatch.setattr(Scorer, "score", score)
    return counts


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"trainer": FEW}, [8, 8]),
        ({"trainer": FEW | {"data_seed": 7}}, [8, 8]),
        ({"trainer": FEW | {"train_sampling_strategy": "sequential"}}, [8, 8]),
        ({"trainer": FEW | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}}, [12, 9]),
        ({"trainer": FEW | {"dataloader_num_workers": 1}}, [8, 8]),  # reads batches ahead
        ({"trainer": {"dataloader_drop_last": True}}, [12, 8]),
        ({"trainer": {"dataloader_drop_last": True, "max_steps": 5}}, [13, 9]),  # the second epoch has another order
        ({"trainer": FEW, "batching": "padded"}, [8, 8]),
        ({"trainer": FEW, "lora": {"r": 2}}, [8, 8]),
        ({"trainer": FEW, "reference": "initial"}, [8, 8]),
        ({"trainer": FEW, "reference": "ema", "ema": {"decay": 0.5, "sync_steps": 1}}, [8, 8]),
        ({"trainer": FEW | {"accelerator_config": {"use_seedable_sampler": False}}}, [13, 9]),  # the order is not known
    ],
)
def test_the_scored_pairs_are_those_that_are_trained_on(tmp_path, model, trained, counted, settings, counts):
    manifest = runs.train(runs.configured(tmp_path, model, sizes=(13, 9), **settings))
    assert counted == counts
    assert [stage["pairs"] for stage in manifest["stages"]] == [13, 9]
    assert [stage["pairs_used"] for stage in manifest["stages"]] == counts
    folders = [tmp_path / "run" / name for name in ("stage-1-s1", "stage-2-s2")]
    for folder, stage, count in zip(folders, ("s1", "s2"), counts, strict=True):
        if "accelerator_config" not in settings["trainer"]:
            assert scored(folder) == sorted(trained[stage])
        assert len(scored(folder)) == count


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 2}}, {"reference": "multi"}])
def test_the_weights_are_those_of_a_run_that_scores_all_pairs(tmp_path, model, monkeypatch, settings):
    if settings.get("reference") == "multi":
        settings = settings | {"multi": {"models": [str(runs.make_model(tmp_path / "other", seed=1))]}}
    folders = [tmp_path / name for name in ("few", "all")]
    for folder in folders:
        folder.mkdir()
        if folder.name == "all":
            monkeypatch.setattr(Schedule, "used", lambda self: np.arange(self.pairs))
        runs.train(runs.configured(folder, model, sizes=(13, 9), trainer=FEW, **settings))

    few, whole = (runs.fingerprint(folder / "run") for folder in folders)
    differ = {name for name in few if few[name] != whole[name]}
    assert differ == {f"stage-{i}-s{i}/{REFERENCE_FILE}" for i in (1, 2)}
    for name in differ:
        mine, other = (load_file(folder / "run" / name)["chosen"] for folder in folders)
        assert (int((~mine.isnan()).sum()), int(other.isnan().sum())) == (8, 0)
        assert mine[~mine.isnan()].equal(other[~mine.isnan()])


def test_without_a_reference_nothing_is_scored_and_the_pairs_are_counted(tmp_path, model, counted):
    manifest = runs.train(runs.configured(tmp_path, model, sizes=(13,), loss="simpo", trainer=FEW))
    assert counted == []
    assert manifest["stages"][0]["pairs_used"] == 8


def test_gamma_of_the_reference_is_that_of_the_pairs_used(tmp_path, model):
    manifest = runs.train(runs.configured(tmp_path, model, sizes=(13,), trainer=FEW))
    scores = load_file(tmp_path / "run" / "stage-1-s1" / REFERENCE_FILE)
    margins = [c - r for c, r in zip(scores["chosen"].tolist(), scores["rejected"].tolist(), strict=True) if c == c]
    assert len(margins) == 8
    assert manifest["stages"][0]["gamma_reference"] == pytest.approx(sum(margins) / 8, rel=1e-6)


def stopped(folder, model, monkeypatch, **settings):
    """The config of a run of one stage, 13 pairs, 3 steps, that has stopped after its second step, and its cache."""
    config = runs.configured(folder, model, sizes=(13,), trainer={"save_steps": 1, "max_steps": 3}, **settings)
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s1", step=3)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    return config, folder / "run" / ".stage-1-s1" / REFERENCE_FILE


def test_a_resumed_stage_scores_only_what_its_cache_lacks(tmp_path, model, monkeypatch, counted):
    """As with another number of processes, which may need other pairs."""
    config, cache = stopped(tmp_path, model, monkeypatch)
    whole = cache.read_bytes()
    first = counted.pop()
    assert (first, counted) == (12, [])

    genuine = Schedule.used
    monkeypatch.setattr(Schedule, "used", lambda self: genuine(self)[:-2])
    cache.unlink()
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage="s1", step=3)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    assert counted == [10]

    monkeypatch.setattr(Schedule, "used", genuine)
    assert runs.train(config)["stages"][0]["pairs_used"] == 12
    assert counted == [10, 2]
    assert (tmp_path / "run" / "stage-1-s1" / REFERENCE_FILE).read_bytes() == whole


def test_the_cache_of_an_earlier_version_with_all_pairs_is_read(tmp_path, model, monkeypatch, counted):
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "used", lambda self: np.arange(self.pairs))
        config, _ = stopped(tmp_path, model, monkeypatch)
    assert counted == [13]
    manifest = runs.train(config)
    assert counted == [13]
    assert manifest["stages"][0]["pairs_used"] == 12
    assert len(scored(tmp_path / "run" / "stage-1-s1")) == 13


def test_a_pair_without_scores_is_never_trained_on(tmp_path, model, monkeypatch):
    """Not even if the batches were not those that the schedule gives."""
    monkeypatch.setattr(StageTrainer, "_get_train_sampler", lambda self, data: list(range(12, -1, -1)))
    config = runs.configured(tmp_path, model, sizes=(13,), trainer=FEW | {"train_sampling_strategy": "sequential"})
    with pytest.raises(RuntimeError, match=r"stage s1: pair .*data1\.jsonl:1\d is trained on.*was not scored"):
        runs.train(config)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"][0]["state"] == "training"


def test_both_numbers_are_said(tmp_path, model, spoken, pictures):
    evaluation = runs.write_rows(tmp_path / "eval.jsonl", runs.make_rows(5, seed=9))
    stages = [
        {
            "name": f"s{size}",
            "data": str(runs.write_rows(tmp_path / f"{size}.jsonl", runs.make_rows(size))),
            "epochs": 2,
        }
        for size in (13, 5)
    ]
    config = runs.configured(tmp_path, model, stages=stages, eval_data=str(evaluation), trainer=FEW)
    runs.run(config, spoken.reporter)
    text = spoken.text
    assert text.count("stage s13: trains on 8 of 13 pairs; max_steps 2 ends it before its 2 epochs (8 steps)") == 1
    assert text.count("stage s5: max_steps 2 ends it before its 2 epochs (4 steps)") == 1
    assert text.index("stage s5: max_steps") < text.index("stage 1 of 2 s13: references  8/8")
    run = tmp_path / "run"
    assert "| pairs | 8 of 13 |" in (run / "stage-1-s13" / "README.md").read_text()
    assert "| pairs | 5 |" in (run / "stage-2-s5" / "README.md").read_text()
    assert "<td>13</td><td>8</td>" in (run / "report.html").read_text().replace("\n", "")
    assert len(load_file(run / "stage-1-s13" / "eval_logps.safetensors")["chosen"]) == 5  # all of them
