"""What a source is given to make a stage's pairs with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    """One stage's prompts, the models there are, and folders to keep things in."""

    name: str  # of the stage
    settings: Sampling
    prompts: Sequence[PromptRow]
    policy: str  # the newest model: what generates
    initial: str  # M_0
    beta: float
    folder: Path  # what the source leaves behind; kept with the stage
    before: Path | None  # the same of the last finished stage, if there was one of the same kind
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    reporter: Reporter

    def label(self, what: str) -> str:
        """The name of a progress bar."""
        return f"{self.name}: {what}"

    def seed(self, *parts: object) -> int:
        """A seed that depends on the settings' own, the stage and `parts`."""
        text = json.dumps([self.settings.sample_seed, self.name, *parts], default=str)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as JSON lines, atomically."""
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_json_rows(path: Path, half_line: bool = False) -> list[dict[str, Any]]:
    """What `write_rows` wrote; nothing where there is no file. `half_line`: a kill may have cut the last one short."""
    if not path.exists():
        return []
    if half_line:
        whole = path.read_bytes().rpartition(b"\n")[0]
        with path.open("r+b") as stream:
            stream.truncate(len(whole) + bool(whole))
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
