"""`benchmarks.stages --betas`: its statistics against cases by hand, its KL against float64, and a tiny sweep."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import betas, betas_statistics, betas_tasks, stages
from benchmarks.betas_tasks import Start, Task, kl_from, split_by_prompt
from tests.stepwise import runs


def row(method, seed, beta, right, kl=0.1):
    about = {"task": "t", "method": method, "seed": seed, "beta": beta}
    return about | {"exactly_right": right, "pair_accuracy": 0.5, "kl": kl}


def test_an_interval_is_students():
    # standard deviation 1, t(2) = 4.303: half the width is 4.303 / sqrt(3)
    found = betas_statistics.interval([1.0, 2.0, 3.0])
    assert found == pytest.approx({"mean": 2.0, "low": 2 - 2.48434, "high": 2 + 2.48434, "n": 3}, abs=1e-4)


def test_differences_are_paired_by_seed():
    """Seeds differ by 0.4, the methods by 0.1 and 0.2; unpaired, that would be lost in the seeds."""
    rows = [row("dpo", 1, 1.0, 0.3), row("dpo", 2, 1.0, 0.7)]
    rows += [row("sdpo", 1, 1.0, 0.4, kl=0.2), row("sdpo", 2, 1.0, 0.9, kl=0.2), row("sdpo", 1, 3.0, 0.5)]
    (found,) = betas_statistics.same_beta(rows, "sdpo")
    half = 12.706 * 0.1 / math.sqrt(2) / math.sqrt(2)  # standard deviation of 0.1 and 0.2: 0.1 / sqrt(2)
    assert found["accuracy"] == pytest.approx({"mean": 0.15, "low": 0.15 - half, "high": 0.15 + half, "n": 2})
    assert found["log_kl"]["mean"] == pytest.approx(math.log(2))


def test_a_beta_is_compared_with_a_third_of_it():
    rows = [row("dpo", seed, 0.3, 0.5) for seed in (1, 2)] + [row("sdpo", seed, 0.9, 0.6) for seed in (1, 2)]
    (found,) = betas_statistics.same_beta(rows, "sdpo", divisor=3)
    assert (found["beta"], found["accuracy"]["mean"]) == (0.9, pytest.approx(0.1))
    assert betas_statistics.same_beta(rows, "sdpo") == []


def test_equal_distance_does_not_see_how_far_a_method_goes_at_a_beta():
    """Both are on lines in log KL, 0.05 apart, and no model of one is as far as one of the other."""

    def line(method, kls, above):
        return [
            row(method, seed, beta, 0.5 + above + 0.1 * seed + 0.02 * math.log(kl), kl)
            for seed in (1, 2)
            for beta, kl in enumerate(kls)
        ]

    rows = line("dpo", (0.4, 0.1, 0.02), 0.0) + line("sdpo", (0.9, 0.3, 0.05), 0.05)
    found = betas_statistics.same_distance(rows, "sdpo")
    assert found == pytest.approx({"mean": 0.05, "low": 0.05, "high": 0.05, "n": 2})
    apart = line("dpo", (0.1, 0.2), 0.0) + line("sdpo", (0.3, 0.4), 0.0)
    assert betas_statistics.same_distance(apart, "sdpo") is None


def test_the_best_beta_of_a_seed_is_chosen_by_the_others():
    """On seed 1 β 1 is best by far, on seeds 2 and 3 β 9; so seed 1 is judged at 9, where it is bad."""
    right = {1: {1.0: 0.9, 9.0: 0.2}, 2: {1.0: 0.5, 9.0: 0.8}, 3: {1.0: 0.4, 9.0: 0.7}}
    rows = [row("sdpo", seed, beta, value) for seed, of in right.items() for beta, value in of.items()]
    assert betas_statistics.at_best(rows, "sdpo", 1) == 0.2
    assert betas_statistics.at_best(rows, "sdpo", 2) == 0.5  # seeds 1 and 3 on the mean: 0.65 at 1, 0.45 at 9
    rows += [row("dpo", seed, beta, 0.1) for seed in right for beta in (1.0, 9.0)]
    assert betas_statistics.best_beta(rows, "sdpo")["mean"] == pytest.approx((0.2 + 0.5 + 0.4) / 3 - 0.1)


def test_held_out_pairs_share_no_prompt_with_training_pairs():
    pairs = [{"prompt": f"p{i % 7}", "chosen": f"c{i}", "rejected": "r", "id": str(i)} for i in range(50)]
    training, heldout = split_by_prompt(pairs, seed=1)
    assert {row["prompt"] for row in training}.isdisjoint({row["prompt"] for row in heldout})
    assert len({row["prompt"] for row in heldout}) == 3
    assert sorted(row["chosen"] for row in training + heldout) == sorted(row["chosen"] for row in pairs)
    assert split_by_prompt(pairs, seed=2)[1] != heldout


def test_the_kl_is_that_of_each_answer_by_itself_in_float64(tmp_path, monkeypatch):
    """Prompts of different lengths, answers that end early: neither padding nor what follows an end counts."""
    folders = [runs.make_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    model, initial = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    prompts = ["word1 word2 word3", "word4", "word5 word6"]

    # answers of three, one and two tokens; the middle one is an end token at once
    ends, answers = tokenizer.eos_token_id, [[5, 6, 7], [2], [8, 2]]
    padded = torch.tensor([answer + [0] * (3 - len(answer)) for answer in answers])
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, padded], 1))
    found, tokens = kl_from(model, initial, tokenizer, prompts, most=3)

    terms = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        both = [one.double()(torch.tensor([ids + answer])).logits[0].log_softmax(-1) for one in (model, initial)]
        for place in range(len(ids) - 1, len(ids) + len(answer) - 1):
            own, other = (logps[place] for logps in both)
            terms.append((own.exp() * (own - other)).sum().item())
    assert ends == 2
    assert tokens == len(terms) == 6
    assert found == pytest.approx(sum(terms) / 6, rel=1e-5)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A task of a few pairs, for a model of a few thousand parameters."""

    def start(folder, seed, quick):
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: folder / f"{name}.jsonl" for name in ("easy", "medium", "hard")}
        for number, path in enumerate(files.values()):
            runs.write_rows(path, runs.make_rows(4, seed=10 * seed + number))
        heldout = runs.make_rows(6, seed=10 * seed + 9)
        model = runs.make_model(tmp_path / f"model-{seed}", seed=seed)
        return Start(model, files, heldout, [pair["prompt"] for pair in heldout], 4, [])

    monkeypatch.setattr(betas, "TASKS", {"tiny": Task(start, 1e-2, (0.1,), batch=2)})
    monkeypatch.setattr(betas_tasks, "PROMPTS", 4)
    return tmp_path


def test_a_sweep_trains_every_method_from_the_same_start_and_is_not_repeated(tiny, monkeypatch):
    command = ["--betas", "--seeds", "1", "2", f"--output={tiny / 'out'}", f"--json={tiny / 'found.json'}"]
    assert stages.main(command) == 0
    report = json.loads((tiny / "found.json").read_text())
    assert report["benchmark"] == "betas"
    assert len(report["rows"]) == 2 * (1 + len(betas.METHODS))

    # M₀ is no distance from itself, and every method goes another way
    of_one = {row["method"]: row["kl"] for row in report["rows"] if row["seed"] == 1}
    assert of_one.pop("initial_model") == 0.0
    assert min(of_one.values()) > 0
    assert len(set(of_one.values())) == len(betas.METHODS)

    # a second run reads what is there, also if one cell is gone
    (tiny / "out/tiny/seed-1/guiding-0.1.json").unlink()
    trained = []
    genuine = betas.trained
    monkeypatch.setattr(betas, "trained", lambda *a: trained.append(a[1:]) or genuine(*a))
    assert stages.main(command) == 0
    again = json.loads((tiny / "found.json").read_text())
    assert trained == [("guiding", 0.1)]
    assert again["results"] == report["results"]


def test_one_seed_is_refused(tiny, capsys):
    with pytest.raises(SystemExit):
        stages.main(["--betas", "--seeds", "1", "1"])
    assert "--seeds: must be two to ten different ones" in capsys.readouterr().err
