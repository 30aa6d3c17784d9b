"""What a source gets to generate a stage's pairs, and the JSON lines in which it keeps them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.settings.source import Sampling

PairRow = dict[str, Any]  # prompt, chosen, rejected, in TRL's schema


@dataclass(frozen=True)
class SourceContext:
    """One stage's prompts, the models it may use, and the folders for what the source keeps."""

    name: str  # of the stage
    settings: Sampling
    prompts: Sequence[PromptRow]
    policy: str  # the newest model, which generates
    initial: str  # M_0
    beta: float
    folder: Path  # where the source keeps its files; stays with the stage
    before: Path | None  # that folder of the last stage before with the same kind of source, if any
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    reporter: Reporter
    template_time: datetime | None = None  # what chat templates read as now; None: the machine's clock
    samples: Counter[str] = field(default_factory=Counter)  # how many were "drawn", and how many "left out"
    title: str | None = None  # the stage's name in rows of progress; None: its name alone

    def label(self, what: str) -> str:
        """What a row of progress says."""
        return f"{self.title or self.name}: {what}"

    def seed(self, *parts: object) -> int:
        """A seed derived from `sample_seed` of the settings, the stage's name and `parts`."""
        text = json.dumps([self.settings.sample_seed, self.name, *parts], default=str)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, atomically."""
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_json_rows(path: Path, half_line: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSON lines file; none if it does not exist. `half_line`: drop a last line that a kill cut short."""
    if not path.exists():
        return []

    # cut the file as well: the caller appends to it, and the next row must start on a line of its own
    if half_line:
        whole = path.read_bytes().rpartition(b"\n")[0]
        with path.open("r+b") as stream:
            stream.truncate(len(whole) + bool(whole))

    # not splitlines(): it would also split at U+2028 and the like inside a row
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
