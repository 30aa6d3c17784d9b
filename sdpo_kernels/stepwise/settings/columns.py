"""How the columns of a data file are read: `columns` and `prompt` of a run, a stage or one data entry.

columns: {prompt: question, system: system}          # the file's names for the parts of a pair
data: [a.jsonl, {path: b.jsonl, columns: {prompt: [instruction, input]}}]
prompt: implicit                                     # no prompt column: the prompt is the start both answers share
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sdpo_kernels.stepwise.settings.types import Section, Text


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


PromptColumns = Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
PromptMode = Literal["column", "implicit"]


class ColumnSettings(Section):
    """The names that a file has for the parts of a pair; a part that is not set keeps its own name.

    Attributes:
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
    """One entry of `data`, `prompts` or `eval_data` that reads its columns otherwise than the rest of the run."""

    path: Text
    columns: ColumnSettings | None = None
    prompt: PromptMode | None = None
