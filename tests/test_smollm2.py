"""The example on a real model: its pairs, its measurement with a tiny model, and its page."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from benchmarks import real, smollm2, smollm2_data, smollm2_page
from benchmarks.smollm2_data import STAGES, divide, heldout_files
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.settings.run_file import load_config
from tests.stepwise import runs

ROOT = Path(__file__).resolve().parents[1]


def chat_rows(count, seed):
    return [
        {
            "prompt": [{"role": "user", "content": f"{row['prompt']} word{i % 16}"}],
            **{side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")},
        }
        for i, row in enumerate(runs.make_rows(count, seed))
    ]


def test_both_runs_have_the_same_pairs_and_all_held_out_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path / "runs/smollm2")
    (tmp_path / "runs/real/smollm2/model").mkdir(parents=True)
    stepwise, whole = (load_config(smollm2.EXAMPLE, smollm2.overrides(name, 42)) for name in ("sDPO", "DPO"))
    assert stepwise == load_config(smollm2.EXAMPLE)
    files = tuple(str(smollm2.FOLDER / f"data/{name}.jsonl") for name in STAGES)
    assert tuple(file for stage in stepwise.stages for file in stage.data) == files
    assert [stage.data for stage in whole.stages] == [files]
    assert stepwise.eval_data == tuple(map(str, heldout_files(smollm2.FOLDER / "data")))
    assert stepwise.max_length == smollm2_data.LONGEST
    assert stepwise.model == str(tmp_path / "runs/real/smollm2/model")
    assert real.RUNS == ROOT / "runs/real"
    assert stepwise.output_dir != whole.output_dir


def test_no_prompt_is_trained_on_and_held_out():
    rows = [{"prompt": f"p{i // 3}", "chosen": str(i)} for i in range(90)]
    trained, held_out = divide(rows, 20, 10)
    assert len(trained) == 20
    assert len(held_out) == 10
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in held_out}
    assert len({row["chosen"] for row in trained}) == 20


def test_kl_is_torchs_own():
    torch.manual_seed(0)
    lengths, head = torch.tensor([3, 200, 2, 95]), torch.randn(50, 8)
    hidden, before = torch.randn(300, 8), torch.randn(300, 8)
    targets = torch.zeros(300, dtype=torch.int64)
    sums, tokens = smollm2.kl_sums(real.Real(hidden, head, targets, lengths), real.Real(before, head, targets, lengths))
    right = kl_divergence(*(Categorical(logits=h.double() @ head.double().T) for h in (hidden, before)))

    # the chosen answers of two pairs, then their rejected ones
    a, b, c, d = (part.sum() for part in right.split(lengths.tolist()))
    torch.testing.assert_close(sums, torch.stack([a + c, b + d]), rtol=1e-5, atol=0)
    assert tokens.tolist() == [5, 295]


def test_an_interval_is_that_of_a_mean():
    values = torch.cat([torch.ones(60), torch.zeros(40)]).double()
    found = smollm2.interval(values)
    assert found["mean"] == pytest.approx(0.6)
    assert found["low"] == pytest.approx(0.6 - 1.96 * 0.049, abs=0.015)  # √(0.6 · 0.4 / 100) = 0.049
    assert found["high"] == pytest.approx(0.6 + 1.96 * 0.049, abs=0.015)
    assert smollm2.interval(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.5]))["mean"] == pytest.approx(2.0)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny chat model and data in the places of the real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "RUNS", tmp_path / "runs/real")
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path / "runs/smollm2")
    monkeypatch.setattr(smollm2_data, "DATA", tmp_path / "data")
    for name, count in (("TRAINED", 8), ("HELD_OUT", 4), ("EVAL", 4)):
        monkeypatch.setattr(smollm2_data, name, count)
    monkeypatch.setattr(smollm2, "KL_PAIRS", 2)

    folder = runs.make_model(tmp_path / "runs/real/smollm2/model")
    runs.make_tokenizer(chat_template=runs.CHAT).save_pretrained(folder)
    (tmp_path / "data/full").mkdir(parents=True)
    for seed, name in enumerate((*STAGES, "eval")):
        with gzip.open(tmp_path / f"data/full/{name}.jsonl.gz", "wt") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in chat_rows(40, seed)))
    return tmp_path


@pytest.mark.slow
def test_it_trains_both_and_judges_every_model(tiny, monkeypatch):
    genuine, scored = Scorer.score, []
    monkeypatch.setattr(Scorer, "score", lambda *given: scored.append(given[3]) or genuine(*given))
    command = ["--seeds", "42", "43", "--json", "found.json"]
    assert smollm2.main(command) == 0
    found = json.loads((tiny / "found.json").read_text())
    rows = {(row["run"], row["stage"]): row for row in found["results"]}
    stages = ("orca-gsm8k", "ultrafeedback", "human-chat")
    assert list(rows) == [("", "initial model"), *(("sDPO", stage) for stage in stages), ("DPO", "all")]
    assert found["pairs"] == dict.fromkeys(stages, 8) | {"all": 24}

    assert scored.count("initial model: evaluation") == 1

    # what the runs themselves say
    for run, name in (("sDPO", "sdpo"), ("DPO", "dpo")):
        folders = [tiny / f"runs/smollm2/{name}{seed}" for seed in ("", "-43")]
        for both in zip(*(json.loads((f / "manifest.json").read_text())["stages"] for f in folders), strict=True):
            row = rows[run, both[0]["name"]]
            accuracies = [stage["eval"]["pair_accuracy"] for stage in both]
            assert row["pair_accuracy"]["seeds"] == pytest.approx(accuracies)
            assert row["pair_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
            margins = [stage["eval"]["reward_margin"] for stage in both]
            assert margins[0] != margins[1]
            assert row["reward_margin"]["mean"] == pytest.approx(sum(margins) / 2, rel=1e-5)
            assert row["kl"]["mean"] > 0

    # nothing is trained again, and the page says the same
    before = (tiny / "runs/smollm2/dpo/manifest.json").stat().st_mtime_ns
    assert smollm2.main(command) == 0
    assert (tiny / "runs/smollm2/dpo/manifest.json").stat().st_mtime_ns == before
    assert smollm2_page.main(["--results", "found.json", "--docs", str(tiny)]) == 0
    page = (tiny / "smollm2.md").read_text()
    assert f"| DPO, after all | {smollm2_page.shown(rows['DPO', 'all']['pair_accuracy'], 100, 1)} |" in page
    assert "on 24 short pairs" in page
    assert (tiny / "smollm2.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    assert smollm2_page.main(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / "smollm2.md").read_text() == (ROOT / "docs/smollm2.md").read_text()
