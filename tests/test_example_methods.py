"""The run files of examples/methods: each has the loss it is named after, and trains to the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.demo.setup import Settings
from examples.methods.compare import METHODS, start_folder, summary, table, train_and_judge, write_results
from examples.methods.judges import letters_in_place, share_in_place
from examples.methods.prepare import prepare
from sdpo_kernels.stepwise import run as run_module
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.settings.run_file import load_config
from tests.stepwise.sources.bubblewrap import needs_bubblewrap

pytestmark = pytest.mark.xdist_group("methods")
FOLDER = Path(__file__).resolve().parents[1] / "examples" / "methods"
LOSSES = {
    "minor_dpo": "minor_dpo",
    "length_dpo": "length_dpo",
    "dpop": "dpop",
    "mpo": "0.8 sigmoid + 0.2 bco_pair + 1 sft",
    "ld_dpo": "ld_dpo",
    "wpo": "wpo",
    "simpo": "simpo",
}
TINY = Settings(warmup_steps=130, pairs=24, heldout_pairs=8, heldout_prompts=8)


@pytest.mark.parametrize("name", LOSSES)
def test_run_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are relative to it; the model comes from another command
    (tmp_path / "runs/methods/start/start").mkdir(parents=True)
    path = FOLDER / f"{name}.yaml"
    config = load_config(path)
    assert config.loss_sum.label == LOSSES[name]
    assert config.output_dir.endswith(f"runs/methods/{name}")
    assert [stage.name for stage in config.stages] == ["short", "medium", "long"]
    assert "arXiv" in path.read_text().splitlines()[0]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A folder with a small warm start."""
    folder = tmp_path_factory.mktemp("methods")
    prepare(start_folder(folder, TINY.seed), TINY, Reporter(quiet=True))
    return folder


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=needs_bubblewrap if name == "execution" else ()) for name in METHODS]
)
def test_every_method_trains_and_is_judged(method, output, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])  # the checker in execution.yaml has a relative path
    monkeypatch.setattr(run_module, "write_report", lambda folder: [])  # drawing takes as long as a stage
    row = train_and_judge(output, TINY.seed, method, TINY)
    assert 0 <= row["exactly_right"] <= 1
    assert row["prompts"] == 24
    assert (row["pairs"] > 0) == (method != "sft")
    assert train_and_judge(output, TINY.seed, method, TINY) == row  # kept, not repeated


def test_the_comparison_has_a_line_per_method_with_gains_over_dpo_of_the_same_seed(tmp_path):
    rows = [
        {"method": method, "seed": seed, "exactly_right": right, "ranked_right": 0.5, "pairs": 10, "seconds": 1.0}
        | {"prompts": 24}
        for method, rights in {"dpo": (0.5, 0.7), "sdpo": (0.6, 0.7)}.items()
        for seed, right in zip((1, 2), rights, strict=True)
    ]
    lines = summary(rows)
    assert [line["method"] for line in lines] == ["dpo", "sdpo"]
    assert lines[1]["gain"]["mean"] == pytest.approx(0.05)
    assert "| `sdpo` | 65.0 (60.0 … 70.0) | +5.0 (+0.0 … +10.0) | 50.0 (50.0 … 50.0) | 10 |" in table(lines)
    write_results(tmp_path, rows, tmp_path)
    assert (tmp_path / "methods.png").stat().st_size > 5000
    assert "the seeds 1, 2;" in (tmp_path / "methods_results.md").read_text()


def test_letters_in_place():
    rows = [{"answer": "abcd"}] * 4
    assert letters_in_place(rows, ["abcd", "abdc", "abcde", ""]) == [1.0, 0.5, 0.8, 0.0]
    assert share_in_place("", "") == 0.0
