"""examples/quickstart.ipynb: every cell runs, in its own kernel and without network, and the stage is trained."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="needs the extra docs")
pytest.importorskip("ipykernel", reason="needs the extra docs")

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def outputs(notebook: nbformat.NotebookNode) -> list[list[nbformat.NotebookNode]]:
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its `pip install` finds everything there, as it does for whoever has installed a checkout."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    *_, accuracies, picture = outputs(notebook)
    before, after = map(float, accuracies[0]["text"].removeprefix("pair accuracy ").split(" -> "))
    assert before < 0.6
    assert after > 0.9
    assert "image/png" in picture[0]["data"]
    manifest = json.loads((tmp_path / "runs/quickstart/manifest.json").read_text())
    assert manifest["stages"][0]["state"] == "done"


def test_it_is_stored_with_its_last_picture_alone():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    *others, (picture,) = outputs(notebook)
    assert not any(others)
    assert "image/png" in picture["data"]
    assert NOTEBOOK.stat().st_size < 80_000
    assert not [cell for cell in notebook.cells if cell.get("execution_count")]


def test_its_links_lead_somewhere():
    text = "".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "markdown")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(links) >= 3
    assert all((NOTEBOOK.parent / link).exists() for link in links)
