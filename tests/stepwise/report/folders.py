"""Hand-written run folders, and a reader of the pages made from them."""

from __future__ import annotations

import io
import json
import math
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rich.console import Console

from sdpo_kernels.stepwise.report.run_report import stage_table


def scores(place: int) -> dict[str, Any]:
    return {
        "pairs": 50,
        "pair_accuracy": 0.6124 + 0.05 * min(place, 7),
        "pair_accuracy_per_token": 0.55,
        "gamma": -12.3 + place,
        "reward_accuracy": 0.7 if place else None,
        "reward_margin": 0.25 * place if place else None,
    }


def stage(index: int, name: str, **changes: Any) -> dict[str, Any]:
    """A finished stage's entry in the manifest."""
    done = {"name": name, "index": index, "state": "done", "pairs": 1234, "dropped": 0, "loss": "sigmoid", "steps": 8}
    done |= {"first_loss": 0.693147, "last_loss": 0.4321, "seconds": 75.0, "peak_memory_bytes": 790 * 2**20}
    return done | {"gamma_reference": -38.6 + 20 * index, "eval": scores(index)} | changes


def pending(index: int, name: str, state: str = "pending") -> dict[str, Any]:
    """The entry of a stage that is not done."""
    empty = dict.fromkeys(["first_loss", "last_loss", "seconds", "peak_memory_bytes", "gamma_reference", "eval"])
    return stage(index, name, state=state, **empty)


def line(index: int, step: int, **values: Any) -> dict[str, Any]:
    """One logged step of a run whose stages have eight steps each."""
    place = {"stage/index": index, "step": step, "stage/global_step": 8 * (index - 1) + step}
    margin = 0.1 * (step - 1)
    logged = {"loss": math.log1p(math.exp(-margin)), "rewards/margins": margin, "rewards/accuracies": step / 10}
    return place | (values or logged)


def write_run(
    folder: Path, stages: list[dict[str, Any]], lines: list[dict[str, Any]], **changes: Any
) -> dict[str, Any]:
    """Write a run folder as the driver leaves it; returns its manifest."""
    folder.mkdir(exist_ok=True)
    manifest = {"version": "0", "model": "models/tiny", "created": "2026-01-02", "environment": {"seed": 7}}
    manifest |= {"initial_eval": scores(0), "stages": stages} | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    (folder / "config.yaml").write_text("model: models/tiny # a < b & c\n")
    return manifest


def all_lines(stages: int) -> list[dict[str, Any]]:
    return [line(index, step) for index in range(1, stages + 1) for step in range(1, 9)]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG; fails on anything else."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


class Page(HTMLParser):
    """Collects the parts of a page that the tests check: tags, addresses and the table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def printed(manifest: dict[str, Any], width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(stage_table(manifest))
    return stream.getvalue()
