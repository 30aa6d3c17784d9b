"""The run files of examples/methods are files that `sdpo train` takes, each with the loss it is named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpo_kernels.stepwise.config import load_config

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


@pytest.mark.parametrize("name", LOSSES)
def test_run_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths are taken from here; the model is made by another command
    (tmp_path / "runs/methods/start/start").mkdir(parents=True)
    path = FOLDER / f"{name}.yaml"
    config = load_config(path)
    assert config.loss_sum.label == LOSSES[name]
    assert config.output_dir.endswith(f"runs/methods/{name}")
    assert [stage.name for stage in config.stages] == ["short", "medium", "long"]
    assert "arXiv" in path.read_text().splitlines()[0]
