"""How the columns of a data file are read: `columns` and `prompt` of a run, a stage or one data entry.

columns: {prompt: question, system: system}          # the file's names for the parts of a pair
data: [a.jsonl, {path: b.jsonl, columns: {prompt: [instruction, input]}}]
prompt: implicit                                     # no prompt column: the prompt is the start both answers share
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from sdpo_kernels.stepwise.settings.mistakes import SettingErrors, show
from sdpo_kernels.stepwise.settings.types import Section, Text


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


PromptColumns = Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
PromptMode = Literal["column", "implicit"]


class ColumnSettings(Section):
    """The names that a file has for the parts of a pair; a part that is not set keeps its own name.

    Args:
        prompt: One column, or several whose texts are joined by line breaks (Alpaca's instruction and input).
        chosen: The preferred answer.
        rejected: The other answer.
        system: The system message. Rows of plain strings become conversations with it, rendered by the chat template.
        tools: The tools that a chat template is given.
    """

    prompt: PromptColumns | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    system: Text | None = None
    tools: Text | None = None

    @model_validator(mode="after")
    def _one_part_a_column(self) -> ColumnSettings:
        """A column that is read as two parts would be trained on twice, or be its own answer."""
        parts_of: dict[str, str] = {}
        for part in ("chosen", "rejected", "tools", "prompt", "system"):
            given = getattr(self, part)
            for name in given if isinstance(given, tuple) else (given or part,):
                if part == "system" and given is None:
                    continue  # a system message is read only if it is named
                if name in parts_of:
                    raise SettingErrors([_read_twice(self, part, parts_of[name], name)])
                parts_of[name] = part
        return self


def _read_twice(columns: ColumnSettings, part: str, other: str, name: str) -> tuple[str, str]:
    """The mistake of a column that is read as two parts, at one that is set."""
    if part == other:
        return part, f"was {show(list(columns.prompt or ()))}, must name each column once"
    at, unset = (part, other) if getattr(columns, part) is not None else (other, part)
    given = getattr(columns, at)
    was = show(list(given) if isinstance(given, tuple) and len(given) > 1 else name)
    return at, f"was {was}, but the column {name!r} is also read as {unset}; a column can be one part of a row only"


class DataEntry(Section):
    """One entry of `data` or `eval_data` with columns of its own.

    Args:
        path: A data file or Hub dataset.
        columns: As `columns` of the stage, which it replaces as a whole.
        prompt: As `prompt` of the stage.
    """

    path: Text
    columns: ColumnSettings | None = None
    prompt: PromptMode | None = None


def _entry_kind(value: Any) -> str:
    return "<entry>" if isinstance(value, (dict, DataEntry)) else "<path>"


def _as_entries(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict, DataEntry)) else value


Entry = Annotated[
    Annotated[Text, Tag("<path>")] | Annotated[DataEntry, Tag("<entry>")],
    Discriminator(_entry_kind),
]
DataSources = Annotated[tuple[Entry, ...], Field(min_length=1), BeforeValidator(_as_entries)]


def entry_path(entry: str | DataEntry) -> str:
    """The data file or Hub dataset of an entry."""
    return entry if isinstance(entry, str) else entry.path
