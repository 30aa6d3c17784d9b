"""What to write into run.yaml for a row that lacks a column: a `columns` line, by the names other data sets use.

    suggested({"question": "2+2?", "good": "4", "bad": "5"}, ColumnSettings(), ["chosen", "rejected"])
    # 'columns: {prompt: question, chosen: good, rejected: bad}'

A suggestion only; nothing is read by a name that was guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_kernels.stepwise.settings.columns import ColumnSettings

PROMPT_NAMES = ("question", "instruction", "query", "input", "problem", "user", "human", "context")
SYSTEM_NAMES = ("system", "system_prompt")
_ANSWER_NAMES = {
    "chosen": ("preferred", "accepted", "winner", "win", "better", "good", "best", "positive"),
    "rejected": ("dispreferred", "unpreferred", "loser", "lose", "worse", "bad", "worst", "negative"),
}
# score_chosen and chosen_prompt are not answers
_NO_TEXT = re.compile(r"score|rating|reward|logp|model|length|prompt|reason|(\b|_)id\b", re.IGNORECASE)


def listed(row: Mapping[str, Any]) -> str:
    """The columns of a row for an error line."""
    return "the columns " + ", ".join(row) if row else "no columns"


def suggested(row: Mapping[str, Any], settings: ColumnSettings, missing: Sequence[str]) -> str:
    """The `columns` line that would most likely read `row`, whose parts in `missing` were not found.

    What `settings` name stays; NAME stands where no column sounds like a part that is missing.
    """
    found: dict[str, Any] = settings.model_dump(exclude_none=True)
    for part in ("prompt", "chosen", "rejected"):
        if part in found or part in row:
            continue
        if (name := _prompt(row) if part == "prompt" else _answer(row, part)) or part in missing:
            found[part] = name or "NAME"
    if "system" not in found and (system := next((name for name in SYSTEM_NAMES if name in row), None)):
        found["system"] = system

    order = [part for part in ColumnSettings.model_fields if part in found]
    return f"columns: {{{', '.join(f'{part}: {_written(found[part])}' for part in order)}}}"


def _written(name: Any) -> str:
    names = name if isinstance(name, (list, tuple)) else (name,)
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"


def _prompt(row: Mapping[str, Any]) -> list[str] | None:
    names = [name for name in PROMPT_NAMES if isinstance(row.get(name), str)]
    if "instruction" in names and "input" in names:  # Alpaca's
        return ["instruction", "input"]
    return names[:1] or None


def _answer(row: Mapping[str, Any], part: str) -> str | None:
    """The column with a usual name of the answer `part`, else one that contains it, such as chosen_response."""
    texts = [name for name, value in row.items() if isinstance(value, (str, list, dict)) and not _NO_TEXT.search(name)]
    exact = [name for name in _ANSWER_NAMES[part] if name in texts]
    like = [name for name in texts if part.removesuffix("ed") in name.lower()]
    return next(iter(exact or like), None)
