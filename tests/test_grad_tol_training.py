"""Training with `grad_tol`: the benchmark with a tiny model, and a vocabulary that has nothing to leave out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import grad_tol_training, grad_tol_training_page, problem, real
from examples.demo.setup import QUICK, set_up
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_file import load_config
from tests.stepwise import runs

TOLERANCES = ("0", "0.00390625", "0.015625")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny model with ten tiles of columns and pairs in the places of the real ones."""
    monkeypatch.setattr(real, "RUNS", tmp_path / "runs/real")
    monkeypatch.setattr(problem, "DATA", tmp_path / "data")
    monkeypatch.setattr(grad_tol_training, "FOLDER", tmp_path / "runs/grad-tol-training")

    # a large spread: with flat probabilities no tile is small enough to be left out
    where = tmp_path / "runs/real/smollm2/model"
    runs.make_model(where, spread=1.0, vocab_size=640, tie_word_embeddings=True)
    (tmp_path / "data/compact").mkdir(parents=True)
    rows = [row | {"prompt": f"{row['prompt']} word{i % 16}"} for i, row in enumerate(runs.make_rows(60))]
    runs.write_rows(tmp_path / "data" / grad_tol_training.FILE, rows)
    return tmp_path


def weights(folder):
    """All weights of a model in one vector, and its embedding's rows."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([part.detach().flatten() for part in model.parameters()]), model.get_input_embeddings().weight


@pytest.mark.slow
def test_it_trains_and_judges_every_tolerance(tiny, monkeypatch):
    genuine, scored = Scorer.score, []
    monkeypatch.setattr(Scorer, "score", lambda *given: scored.append(given[3]) or genuine(*given))
    command = ["--quick", "--seeds", "1", "2", "--json", str(tiny / "found.json")]
    assert grad_tol_training.main(command) == 0
    found = json.loads((tiny / "found.json").read_text())
    exact, *others = found["results"]
    assert [f"{row['grad_tol']:g}" for row in found["results"]] == list(TOLERANCES)
    assert scored.count("initial model: evaluation") == 1

    # what the runs themselves say
    folder, evals = tiny / "runs/grad-tol-training/quick", {}
    for row in found["results"]:
        places = [folder / f"tol-{row['grad_tol']:g}-seed-{seed}" for seed in (1, 2)]
        stages = [json.loads((place / "manifest.json").read_text())["stages"][0]["eval"] for place in places]
        evals[row["grad_tol"]] = [stage["reward_margin"] for stage in stages]
        assert row["pair_accuracy"]["seeds"] == pytest.approx([stage["pair_accuracy"] for stage in stages])
        assert row["reward_margin"]["seeds"] == pytest.approx(evals[row["grad_tol"]], rel=1e-4, abs=1e-9)
        assert row["losses"] == [[step["loss"] for step in runs.metrics(place)] for place in places]
        assert row["kl"]["mean"] > 0
    for row in others:
        apart = [one - other for one, other in zip(evals[row["grad_tol"]], evals[0.0], strict=True)]
        assert row["minus_exact"]["reward_margin"]["seeds"] == pytest.approx(apart, rel=1e-3, abs=1e-9)
    assert exact["losses"][0] != exact["losses"][1]

    # weights differ because something was left out, and by as much as their own difference says
    start, rows_before = weights(tiny / "runs/real/smollm2/model")
    ours, right = (weights(folder / f"tol-{tol}-seed-2" / grad_tol_training.STAGE) for tol in ("0.015625", "0"))
    of_parts = {part: found["distances"]["0.015625"][part][1] for part in grad_tol_training.PARTS}
    updates = {part: found["update_lengths"]["0"][part][1] for part in grad_tol_training.PARTS}
    total = sum((of_parts[part] * updates[part]) ** 2 for part in grad_tol_training.PARTS) ** 0.5
    assert total == pytest.approx((ours[0] - right[0]).norm().item(), rel=1e-4)
    assert total > 0
    update = sum(length**2 for length in updates.values()) ** 0.5
    assert update == pytest.approx((right[0] - start).norm().item(), rel=1e-4)

    # tokens are those of VOCABULARY at most; the others' rows are apart
    beyond = (right[1] - rows_before)[len(runs.VOCABULARY) :].norm().item()
    assert beyond <= updates["head_unseen"] < update
    assert found["seen_tokens"] <= len(runs.VOCABULARY)

    # nothing is trained again, and the page can be made of it
    before = (folder / "tol-0-seed-1/manifest.json").stat().st_mtime_ns
    assert grad_tol_training.main(command) == 0
    assert (folder / "tol-0-seed-1/manifest.json").stat().st_mtime_ns == before
    text = "\n".join(grad_tol_training_page.section(found))
    assert f"all weights, {len(exact['losses'][0])} steps on 8 pairs" in text
    assert "1 − p" not in text

    # relative runs are others, and stand beside the same exact ones
    assert grad_tol_training.main([*command, "--relative"]) == 0
    relative = json.loads((tiny / "found.json").read_text())
    assert (folder / "tol-0-seed-1/manifest.json").stat().st_mtime_ns == before
    assert relative["results"][0] == exact
    assert relative["results"][-1]["losses"] != exact["losses"]
    chosen = json.loads((folder / "tol-0.015625-relative-seed-2/manifest.json").read_text())["config"]
    assert (chosen["grad_tol"], chosen["grad_tol_relative"]) == (2**-6, True)
    text = "\n".join(grad_tol_training_page.section(relative))
    assert "| 0 |" in text
    assert "| 0.015625 · (1 − p) |" in text
    assert "length of the update, grad_tol 0.015625 · (1 − p)" in text


def test_runs_differ_in_tolerance_seed_and_folder_alone():
    sizes, folder = grad_tol_training.QUICK, Path("runs")
    one, other = (
        grad_tol_training.settings(folder, Path("m"), sizes, *given).model_dump() for given in ((0.0, 1), (2**-8, 2))
    )
    assert {key for key in one if one[key] != other[key]} == {"grad_tol", "output_dir", "trainer"}
    assert {key for key in one["trainer"] if one["trainer"][key] != other["trainer"][key]} == {"seed"}

    relative = grad_tol_training.settings(folder, Path("m"), sizes, 2**-8, 2, relative=True).model_dump()
    assert {key for key in one if relative[key] != other[key]} == {"grad_tol_relative", "output_dir"}


def test_thirds_are_all_of_a_run():
    assert grad_tol_training_page.thirds([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [1.5, 3.5, 5.5]
    assert grad_tol_training_page.smoothed([1.0] * 9 + [11.0, 1.0]) == [2.0, 2.0]


@pytest.mark.slow
def test_the_demo_has_nothing_to_leave_out(tmp_path):
    sizes = replace(QUICK, warmup_steps=40, pairs=32, heldout_pairs=2, heldout_prompts=2)
    run_file = set_up(tmp_path / "start", sizes, Reporter(quiet=True)).run_files["dpo"]
    trained = []
    for tol in TOLERANCES:
        config = load_config(run_file, [f"output_dir={tmp_path / tol}", f"grad_tol={tol}", "eval_data=null"])
        assert run(config, Reporter(quiet=True))["config"]["grad_tol"] == float(tol)
        trained.append((tmp_path / tol / "stage-1-all/model.safetensors").read_bytes())
    assert trained[0] == trained[1] == trained[2]
    assert trained[0] != (tmp_path / "start/start/model.safetensors").read_bytes()
