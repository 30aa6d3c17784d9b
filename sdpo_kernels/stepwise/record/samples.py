"""Texts that a run leaves for its readers: a model's greedy answers to evaluation prompts, and generated pairs.

Both are JSON lines in a model's folder; the initial model's answers are in the run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpo_kernels.stepwise.common.files import replace_file

SAMPLES_FILE = "samples.jsonl"  # {"prompt", "answer", "ended"}: ended is whether the model produced an end token
PAIRS_FILE = "pairs.jsonl"  # {"prompt", "chosen", "rejected"} of a stage that generates its pairs

Record = dict[str, Any]


def write_samples(folder: Path, samples: Sequence[Record]) -> None:
    """Write a model's answers into its folder, in one step."""
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    replace_file(folder / SAMPLES_FILE, "".join(lines).encode("utf-8", "replace"))


def read_texts(path: Path, keys: Sequence[str], most: int) -> list[Record]:
    """The first `most` objects of a file of JSON lines that have a text under each of `keys`; [] without the file."""
    found: list[Record] = []
    if not path.is_file():
        return found
    with path.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                row = json.loads(text)
            except ValueError:
                continue
            if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys):
                found.append(row)
            if len(found) == most:
                break
    return found
