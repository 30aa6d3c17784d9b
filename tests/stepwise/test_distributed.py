"""Runs on two ranks with gloo: the same numbers as one process, one log, and no hang whatever fails."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.stepwise import ranks_of_a_run as faults
from tests.stepwise import runs
from tests.stepwise.ranks_of_a_run import Ranks

pytestmark = pytest.mark.xdist_group("distributed")

SIZES = (13, 9)  # at 4 pairs a step the last steps have 1 pair, so one rank has none


def yaml_of(folder: Path, model: Path, batch: int, **settings) -> Path:
    """Settings with `batch` pairs per rank and micro-batch, on the same data in the same folder."""
    trainer = {"per_device_train_batch_size": batch, "save_steps": 2} | settings.pop("trainer", {})
    return runs.write_settings(folder, model, SIZES, trainer=trainer, **settings).rename(folder / f"{batch}.yaml")


def one_process(yaml: Path, run: Path, *overrides: str) -> Path:
    child = runs.Child(run.parent, "train", yaml, f"output_dir={run}", "--quiet", *overrides, fault=_quick)
    assert child.wait() == 0, child.text
    return run


def _quick() -> None:
    faults.run_module.write_report = lambda folder: []


def two(yaml: Path, run: Path, fault=None, options=(), quiet: bool = True) -> Ranks:
    return Ranks(run.parent, "train", yaml, f"output_dir={run}", *["--quiet"] * quiet, fault=fault, options=options)


def largest_deviation(a: Path, b: Path) -> float:
    """The largest difference between two runs' weights, over all stages."""
    names = sorted(path.relative_to(a) for path in a.glob("stage-*/model.safetensors"))
    assert len(names) == len(SIZES)
    pairs = [(load_file(a / name), load_file(b / name)) for name in names]
    assert all(x.keys() == y.keys() for x, y in pairs)
    return max(float((x[key] - y[key]).abs().max()) for x, y in pairs for key in x)


def assert_same_figures(a: Path, b: Path, tolerance: float = 2e-5) -> None:
    ours, theirs = runs.metrics(a), runs.metrics(b)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()

        # where policy and reference are one model, rounding alone decides which of two equal rewards is higher, if any
        tie = max(abs(line["rewards/margins"]) for line in (mine, other)) < tolerance if "loss" in mine else False
        for name, value in mine.items():
            if tie and name in ("rewards/accuracies", "rewards/ties"):
                continue
            if isinstance(value, float):
                assert value == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
            else:
                assert value == other[name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model):
    """A run of one process, with evaluations, at 4 pairs a step."""
    folder = tmp_path_factory.mktemp("distributed")
    settings = {"eval_data": str(runs.write_rows(folder / "eval.jsonl", runs.make_rows(5, seed=9)))}
    settings["trainer"] = {"eval_strategy": "steps", "eval_steps": 2}
    one, halves = yaml_of(folder, model, 4, **settings), yaml_of(folder, model, 2, **settings)
    return folder, one, halves, one_process(one, folder / "whole")


def test_two_ranks_train_the_same_as_one(whole):
    folder, _, halves, expected = whole
    (folder / "hashes").mkdir()
    ranks = two(halves, folder / "two", faults.note_weights, [folder / "hashes"], quiet=False)
    assert ranks.wait() == [0, 0], ranks.text
    run = folder / "two"
    assert largest_deviation(run, expected) < 2e-6
    assert_same_figures(run, expected)
    caches = [*expected.glob("*stage-1-s1/*_logps.safetensors"), expected / "eval_logps.safetensors"]
    for path in caches:
        mine, other = load_file(run / path.relative_to(expected)), load_file(path)
        for key in other:
            if path.name.startswith("reference") or path.parent == expected:
                assert mine[key].equal(other[key]), (path, key)  # bit for bit: the batches are those of one process
            assert mine[key].allclose(other[key], atol=1e-4)
    for stage in ("s1", "s2"):
        first, second = ((folder / "hashes" / f"{stage}-{rank}").read_text() for rank in (0, 1))
        assert first == second
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["environment"]["world_size"] == 2
    assert [stage["state"] for stage in manifest["stages"]] == ["done", "done"]
    assert runs.leftovers(run) == []
    assert ranks.texts[1] == ""  # only rank 0 logs
    assert ranks.texts[0].count("stage 1 of 2 s1: references  13/13") == 1


@pytest.mark.parametrize("victims", [(1,), (0, 1)])
def test_a_killed_run_resumes(whole, victims):
    """A run killed at step 4 of stage 1 has a checkpoint of step 2; it resumes on two ranks or on one."""
    folder, one, halves, expected = whole
    run = folder / f"killed{len(victims)}"
    killed = two(halves, run, faults.die_at, ["s1", 4, victims])
    codes = killed.wait()
    assert all(codes[victim] == -9 for victim in victims), (codes, killed.text)
    assert "Traceback" not in killed.text
    if victims == (1,):
        assert "another process of this run has ended" in killed.texts[0]
        again = two(halves, run)
        assert again.wait() == [0, 0], again.text
    else:
        child = runs.Child(folder, "train", one, f"output_dir={run}", fault=_quick)
        assert child.wait() == 0, child.text
        assert "world_size 2 -> 1" in child.text
        assert "resuming at step 2" in child.text
        assert "was saved with another number of processes, so its RNG states are ignored" in child.text
    assert json.loads((run / "manifest.json").read_text())["stages"][0]["resumed_at_step"] == 2
    assert largest_deviation(run, expected) < 2e-6
    assert_same_figures(run, expected)


def test_a_run_of_one_process_resumes_on_two_ranks(whole):
    folder, one, halves, expected = whole
    run = folder / "grown"
    child = runs.Child(folder, "train", one, f"output_dir={run}", "--quiet", fault=_die_alone)
    assert child.wait() == -9
    again = two(halves, run)
    assert again.wait() == [0, 0], again.text
    assert largest_deviation(run, expected) < 2e-6
    assert_same_figures(run, expected)
    doubled = two(one, run)  # the same number of pairs per rank is twice as many per step
    assert doubled.wait()[0] == 2
    assert "trainer.per_device_train_batch_size: 2 -> 4" in doubled.text


def scored(folder: Path) -> list[int]:
    """The pairs with scores in the reference file of a stage's folder."""
    chosen = load_file(folder / "reference_logps.safetensors")["chosen"]
    return (~chosen.isnan()).nonzero().flatten().tolist()


def drops_last(folder: Path, model: Path, batch: int, **trainer: Any) -> Path:
    """Settings of one stage of 15 pairs whose epochs leave out their last batch."""
    data = runs.write_rows(folder / "d.jsonl", runs.make_rows(15))
    stages = [{"name": "s1", "data": str(data)}]
    return yaml_of(folder, model, batch, stages=stages, trainer={"dataloader_drop_last": True} | trainer)


def test_two_ranks_score_the_pairs_they_train_on(tmp_path, model):
    """They are those of one process, and stay the same if the run resumes in the middle of its second epoch."""
    options = {"max_steps": 5, "save_steps": 4}
    one, halves = (drops_last(tmp_path, model, batch, **options) for batch in (4, 2))
    expected, run = one_process(one, tmp_path / "whole"), tmp_path / "run"
    seen = []
    for killed_at in (5, 0):  # an epoch has 3 steps
        notes = tmp_path / f"{killed_at}"
        notes.mkdir()
        ranks = two(halves, run, faults.note_pairs, [notes, killed_at])
        assert (ranks.wait() == [0, 0]) == (killed_at == 0), ranks.text
        seen += [json.loads((notes / f"{rank}.json").read_text()) for rank in (0, 1)]

    assert [len(pairs) for pairs in seen] == [10, 10, 2, 2]
    used = sorted({pair for pairs in seen for pair in pairs})
    record = json.loads((run / "manifest.json").read_text())["stages"][0]
    assert (record["resumed_at_step"], record["pairs_used"]) == (4, len(used))
    assert scored(run / "stage-1-s1") == scored(expected / "stage-1-s1") == used != list(range(15))
    mine, other = (load_file(folder / "stage-1-s1/model.safetensors") for folder in (run, expected))
    assert max(float((mine[key] - other[key]).abs().max()) for key in mine) < 2e-6


def test_other_processes_score_what_they_need_and_one_process_did_not(tmp_path, model):
    """An epoch of one process drops 3 of 15 pairs at 4 pairs a batch; that of two ranks drops 1 at 2 a batch."""
    one, quarters = (drops_last(tmp_path, model, batch) for batch in (4, 1))
    run = tmp_path / "run"
    child = runs.Child(tmp_path, "train", one, f"output_dir={run}", "--quiet", fault=_die_at_step_3)
    assert child.wait() == -9
    before = scored(run / ".stage-1-s1")
    ranks = two_with(quarters, run, "trainer.gradient_accumulation_steps=2")
    assert ranks.wait() == [0, 0], ranks.text
    after = scored(run / "stage-1-s1")
    assert (len(before), len(after)) == (12, 14)
    assert set(before) < set(after)
    assert "reference_logps.safetensors: 2 more pairs are scored" in ranks.texts[0]


def _die_at_step_3() -> None:
    _quick()
    faults.die_at(0, "s1", 3, (0,))


def _die_alone() -> None:
    _quick()
    faults.die_at(0, "s1", 4, (0,))


def test_an_error_on_one_rank_is_printed_once_and_ends_both(whole):
    folder, _, halves, _ = whole
    ranks = two(halves, folder / "stale", faults.stale_in, [1])
    assert ranks.wait()[0] == 2, ranks.text
    assert ranks.text.count("error:") == 1
    assert "the reference cache holds" in ranks.texts[0]
    assert "Traceback" not in ranks.text


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_what_is_not_what_was_trained_is_not_published_by_any_rank(whole, sharded):
    """The next start saves the last checkpoint without training, and the run ends as one that never failed."""
    folder, _, halves, expected = whole
    run, options = folder / f"wrong{sharded}", ["trainer.fsdp=true"] * sharded
    ranks = two_with(halves, run, *options, fault=faults.saves_wrongly, options=[sharded])
    assert ranks.wait()[0] == 2, ranks.text
    assert ranks.text.count("error: stage s1: what was saved is not what was trained") == 1
    assert f"the trained weights are in {run}/.stage-1-s1/checkpoint-4" in ranks.texts[0].replace("\n", "")
    assert "Traceback" not in ranks.text
    assert not (run / "stage-1-s1").exists()

    again = two_with(halves, run, *options, fault=faults.fsdp_on_cpu if sharded else None, options=[0] * sharded)
    assert again.wait() == [0, 0], again.text
    assert json.loads((run / "manifest.json").read_text())["stages"][0]["resumed_at_step"] == 4
    assert largest_deviation(run, expected) < 2e-6


def test_lora_and_a_following_reference_and_accumulation(tmp_path, model):
    """Every rank keeps the average and the adapter; a step's pairs have the same weight in all micro-batches."""
    settings = {"reference": "ema", "ema": {"decay": 0.5, "sync_steps": 1}, "lora": {"r": 2}}
    one, halves = yaml_of(tmp_path, model, 4, **settings), yaml_of(tmp_path, model, 1, **settings)
    expected = one_process(one, tmp_path / "whole")
    ranks = two_with(halves, tmp_path / "two", "trainer.gradient_accumulation_steps=2")
    assert ranks.wait() == [0, 0], ranks.text
    assert largest_deviation(tmp_path / "two", expected) < 5e-6


def two_with(yaml: Path, run: Path, *overrides: str, fault=None, options=()) -> Ranks:
    return Ranks(run.parent, "train", yaml, f"output_dir={run}", "--quiet", *overrides, fault=fault, options=options)


def test_fsdp2_trains_the_same_as_one_process(whole, tmp_path, model):
    """On gloo, without accelerate's check that refuses FSDP on CPUs: the same code path as on several GPUs."""
    _, _, halves, expected = whole
    killed = two_with(halves, tmp_path / "sharded", "trainer.fsdp=true", fault=faults.fsdp_on_cpu, options=[4])
    assert -9 in killed.wait(), killed.text
    ranks = two_with(halves, tmp_path / "sharded", "trainer.fsdp=true", fault=faults.fsdp_on_cpu)
    assert ranks.wait() == [0, 0], ranks.text
    assert largest_deviation(tmp_path / "sharded", expected) < 2e-6
    assert_same_figures(tmp_path / "sharded", expected)
    manifest = json.loads((tmp_path / "sharded" / "manifest.json").read_text())
    assert manifest["stages"][0]["resumed_at_step"] == 2


def test_a_loss_that_becomes_nan_is_said_once(whole, tmp_path):
    """Both ranks find it at the same step."""
    ranks = two_with(whole[2], tmp_path / "run", "trainer.learning_rate=1e30", fault=faults.no_grace)
    assert ranks.wait() == [2, 2], ranks.text
    assert ranks.text.count("error: stage s1: the l") == ranks.text.count("error:") == 1


def test_ranks_with_other_settings_are_an_error(whole, tmp_path):
    ranks = two(whole[2], tmp_path / "run", faults.other_beta_in, [1])
    assert ranks.wait()[0] == 2, ranks.text
    assert ranks.text.count("error:") == 1
    assert "beta: was 0.2 on rank 1 and 0.1 on rank 0" in ranks.texts[0]


@pytest.mark.parametrize("place", ["scoring", "training", "saving"])
def test_a_rank_that_dies_ends_the_other(whole, tmp_path, place):
    """Each forward of a cut model needs all ranks, and so does each piece of a weight that is written."""
    ranks = two_with(whole[2], tmp_path / "run", "trainer.fsdp=true", fault=faults.die_in, options=[1, place])
    assert ranks.wait()[1] == -9, ranks.text
    assert ranks.texts[0].count("another process of this run has ended") == 1
    assert "Traceback" not in ranks.text


@pytest.mark.parametrize("command", ["check", "score", "report"])
def test_a_command_of_one_process_is_done_once(whole, command):
    """The other rank waits, prints nothing and ends with the same code."""
    folder, one, two, expected = whole

    def run(config: Path, count: int) -> Ranks:
        of = {"check": [config], "score": [config, f"output_dir={expected}", "--json"], "report": [expected]}
        return Ranks(folder, command, *of[command], count=count, fault=faults.no_grace)

    # with half the batch a process, two take as many steps; the plan of the memory is that of as many as there are
    alone, ranks = run(one, 1), run(two, 2)
    assert [child.wait() for child in [*alone.children, *ranks.children]] == [0, 0, 0], ranks.text
    assert ranks.texts[1] == ""
    assert _of_one(ranks.texts[0]) == _of_one(alone.texts[0])
    assert ("with the steps of 2 processes" in ranks.texts[0]) == (command == "check")


def _of_one(text: str) -> str:
    text = re.sub(r"^memory .*\n( .*\n)*", "", text, flags=re.MULTILINE)
    return text.replace(", with the steps of 2 processes", "")


def test_a_command_that_fails_says_so_once(whole):
    folder, one, _, expected = whole
    ranks = Ranks(folder, "check", one, f"output_dir={expected}", "beta=0.2", fault=faults.no_grace)
    assert [child.wait() for child in ranks.children] == [2, 2], ranks.text
    assert ranks.texts[0].count("error:") == ranks.texts[0].count("beta: 0.1 -> 0.2") == 1
    assert ranks.texts[1] == ""


def test_fsdp_that_would_be_plain_ddp_is_an_error(whole, tmp_path):
    ranks = two_with(whole[2], tmp_path / "run", "trainer.fsdp=true")
    assert ranks.wait()[0] == 2, ranks.text
    assert "fsdp: needs several GPUs" in ranks.texts[0]
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert {stage["state"] for stage in stages} == {"pending"}  # so that the setting can be corrected


def test_fsdp_with_whole_checkpoints_is_an_error(whole, tmp_path):
    options = ["trainer.fsdp=true", "trainer.fsdp_config={state_dict_type: FULL_STATE_DICT}"]
    ranks = two_with(whole[2], tmp_path / "run", *options, fault=faults.fsdp_on_cpu)
    assert ranks.wait()[0] == 2, ranks.text
    assert "fsdp_config.state_dict_type: was FULL_STATE_DICT, must be SHARDED_STATE_DICT" in ranks.texts[0]


def test_a_stage_published_just_before_a_crash_is_recorded_on_every_rank(tmp_path, model):
    """The next stage reads the earlier one's steps from the manifest that each rank has in memory."""
    yaml, run = yaml_of(tmp_path, model, 2), tmp_path / "run"
    ranks = two(yaml, run)
    assert ranks.wait() == [0, 0], ranks.text

    # as if killed between the rename of stage 1 and the manifest's last write
    manifest = json.loads((run / "manifest.json").read_text())
    for stage in manifest["stages"]:
        for key in ("steps", "first_loss", "last_loss", "resumed_at_step", "seconds", "peak_memory_bytes"):
            del stage[key]
        stage |= {"eval": None, "state": "training" if stage["index"] == 1 else "pending"}
    for key in ("reference_hash", "gamma_reference", "score_seconds"):
        del manifest["stages"][1][key]
    (run / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(run / "stage-2-s2")

    again = two(yaml, run)
    assert again.wait() == [0, 0], again.text
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert [stage["state"] for stage in stages] == ["done", "done"]
    assert all(stage["steps"] > 0 for stage in stages)
