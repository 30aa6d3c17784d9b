"""How the columns of a data file are read: `columns` and `prompt` of a run, a stage or one data entry.

columns: {prompt: question, system: system}          # the file's names for the parts of a pair
data: [a.jsonl, {path: b.jsonl, columns: {prompt: [instruction, input]}}]
prompt: implicit                                     # no prompt column: the prompt is the start both answers share
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

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
