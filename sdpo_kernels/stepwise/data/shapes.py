"""Rows of other people's data in one shape: TRL's prompt, chosen and rejected, all strings or all lists of messages.

    shape = Shape(ColumnSettings(prompt=("question",), system="system"), implicit_prompt=False)
    shape.read({"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"})

What is read without any setting: TRL's own schema; conversations without a prompt column (the messages that both
answers start with are the prompt); ShareGPT (`conversations`, messages with `from` and `value`); an answer that is one
message; content in parts of `{type: text}`; a prompt string next to answers that are conversations (UltraFeedback
binarized); transcripts of `\n\nHuman:` and `\n\nAssistant:` (HH-RLHF). Plain strings under other names need `columns`,
since a column that is only guessed to be the prompt would be trained on without anyone noticing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdpo_kernels.stepwise.data.suggestions import listed, suggested
from sdpo_kernels.stepwise.settings.columns import ColumnSettings

PARTS = ("prompt", "chosen", "rejected", "system", "tools")
OPTIONS = "chat_template_kwargs"
CONVERSATIONS = "conversations"  # ShareGPT's name for the messages before the answers

MEDIA = ("image", "images", "video", "videos", "audio", "audios")

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class BadRow(Exception):
    """What is wrong with one row."""


@dataclass(frozen=True)
class Shape:
    """How the rows of one source are read."""

    columns: ColumnSettings = field(default_factory=ColumnSettings)
    implicit_prompt: bool = False
    columns_optional: bool = False  # a source with none of the columns that the settings name may have TRL's

    @property
    def names(self) -> set[str]:
        """Every column that may be read."""
        own = {OPTIONS, CONVERSATIONS, *MEDIA, *PARTS} - {"system"}
        for part in PARTS:
            own |= set(_names(self.columns, part))
        return own

    @property
    def mapped(self) -> set[str]:
        """The columns that the settings name."""
        return {
            name for part in PARTS if getattr(self.columns, part) is not None for name in _names(self.columns, part)
        }

    @property
    def may_lack(self) -> set[str]:
        """Those of `mapped` that a row can do without."""
        return {
            name
            for part in ("system", "tools")
            if getattr(self.columns, part) is not None
            for name in _names(self.columns, part)
        }

    def of_source(self, columns: Iterable[str]) -> Shape:
        """This shape, or TRL's if the columns are optional and none of `columns`, the source's, is named by them.

        By the columns of prompt and answers alone: rows may lack a system message or tools.
        """
        wanted = {
            name
            for part in ("prompt", "chosen", "rejected")
            if getattr(self.columns, part) is not None
            for name in _names(self.columns, part)
        }
        is_other = self.columns_optional and wanted and not wanted & set(columns)
        return Shape(implicit_prompt=self.implicit_prompt) if is_other else self

    def read(self, row: dict[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
        """`row` in TRL's schema; what its texts hold is checked by `pairs.py`. BadRow if it cannot be read.

        `others` are columns of its source that were not loaded: an error lists them, too.

        1. Rename the columns, join a prompt of several.
        2. Normalise messages: ShareGPT's keys, one message instead of a list, content in parts, nulls.
        3. Find the prompt where there is no column of it.
        4. Make conversations of plain strings next to a system message or to messages.

        A row of prompts has no answers: `read_prompt`.
        """
        _refuse_media(row)
        there = row | dict.fromkeys(others, "")
        values = self._renamed(row, there)
        if absent := [part for part in ("chosen", "rejected") if part not in values]:
            raise BadRow(
                f"{absent[0]!r} is missing; the row has {listed(there)}. Name its columns with "
                f"{suggested(there, self.columns, absent)}"
            )
        for part in ("prompt", "chosen", "rejected"):
            if part in values:
                values[part] = _normalised(part, values[part])
        if values.get("prompt", "") is None and isinstance(values.get("chosen"), list):
            del values["prompt"]  # a null next to conversations, which may contain it
        if "prompt" not in values:
            values = self._with_prompt(values, there)
        return _same_kind(values, self.columns.system is not None)

    def read_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` with its prompt, tools and options as `read` would give them; its other columns stay as they are."""
        _refuse_media(row)

        # answers may be there, and are not looked at
        values = self._renamed({name: value for name, value in row.items() if name not in ("chosen", "rejected")}, row)
        if "prompt" in values:
            values["prompt"] = _normalised("prompt", values["prompt"])
        return {**row, **_same_kind(values, self.columns.system is not None)}

    def _renamed(self, row: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
        """The parts of `row` under TRL's names; `there` has all columns of its source, for an error."""
        values = {name: row[name] for name in (OPTIONS,) if name in row}
        for part in PARTS:
            names = _names(self.columns, part)
            # a row may lack what can be empty: a system message, tools, Alpaca's input
            missing = [name for name in (names[:1] if part == "prompt" else names) if name not in row]
            if missing and part in ("system", "tools"):
                continue
            if missing and getattr(self.columns, part) is not None:
                raise BadRow(f"columns.{part}: the row has no column {missing[0]!r}; it has {listed(there)}")
            if missing or not names:
                continue
            values[part] = row[names[0]] if len(names) == 1 else _joined(part, names, row)

        if values.get("prompt") is None and isinstance(row.get(CONVERSATIONS), list):
            values["prompt"] = row[CONVERSATIONS]
        return values

    def _with_prompt(self, values: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
        """`values` with the prompt that both answers start with, if the row allows one to be found there."""
        chosen, rejected = values.get("chosen"), values.get("rejected")
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            return values  # conversations: pairs.py takes the messages that both start with
        if self.implicit_prompt:
            return values
        if (found := _split_transcript(chosen, rejected)) is not None:
            return values | found
        raise BadRow(
            f"'prompt' is missing; the row has {listed(there)}. Name its columns with "
            f"{suggested(there, self.columns, ['prompt'])}, or set prompt: implicit to take the text that both answers "
            "start with"
        )


def unused(names: Iterable[str], shape: Shape) -> list[str]:
    """Of the columns that a source has, those that are not read."""
    return sorted(set(names) - shape.names)


def clean(value: Any) -> Any:
    """`value` without the nulls of the objects in it.

    Parquet gives every row all the argument names of the others, as nulls, and so do JSON lines that were written from
    it; a null that was meant looks the same (docs/data.md). Empty lists stay: in arguments and schemas they mean
    something.
    """
    if isinstance(value, dict):
        return {key: clean(below) for key, below in value.items() if below is not None}
    return [clean(below) for below in value] if isinstance(value, list) else value


def has_null_arguments(row: dict[str, Any]) -> bool:
    """Whether a tool call in one of a row's conversations has a null among its arguments, which `clean` leaves out."""
    messages = [message for value in row.values() if isinstance(value, list) for message in value]
    lists = [message.get("tool_calls") for message in messages if isinstance(message, dict)]
    calls = [call for found in lists if isinstance(found, list) for call in found]
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    arguments = [function.get("arguments") for function in functions if isinstance(function, dict)]
    return any(isinstance(given, dict) and clean(given) != given for given in arguments)


def _names(columns: ColumnSettings, part: str) -> tuple[str, ...]:
    """The file's names of `part`; a system message is read only if it is asked for."""
    given = getattr(columns, part)
    if given is None:
        return () if part == "system" else (part,)
    return given if isinstance(given, tuple) else (given,)


def _joined(part: str, names: tuple[str, ...], row: dict[str, Any]) -> str:
    texts = [row.get(name) or "" for name in names]
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise BadRow(f"columns.{part}: {name!r} is of type {type(text).__name__}, must be a string to be joined")
    return "\n".join(text for text in texts if text)


def _normalised(part: str, value: Any) -> Any:
    if isinstance(value, dict):  # one message
        value = [value]
    if not isinstance(value, list):
        return value
    return [_message(f"{part}[{index}]", clean(message)) for index, message in enumerate(value)]


def _message(name: str, message: Any) -> Any:
    if not isinstance(message, dict):
        return message

    # to a template an empty list of tool calls is the same as none
    message = {key: value for key, value in message.items() if value != []}
    if "from" in message and "value" in message and "role" not in message:
        role = message["from"]
        if isinstance(role, str):
            role = SHAREGPT_ROLES.get(role, role)
        message = {"role": role, "content": message["value"]}
    if message.get("content") is None and message.get("tool_calls"):
        message = message | {"content": ""}
    if isinstance(message.get("content"), list):
        message = message | {"content": "".join(_text_of(name, part) for part in message["content"])}
    return message


def _text_of(name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"'{name}.content' has a part of type {kind!r}; only text can be trained on here")
    return part["text"]


def _split_transcript(chosen: str, rejected: str) -> dict[str, str] | None:
    """prompt, chosen and rejected of two HH-RLHF transcripts; None if they are not, or part before the last turn."""
    if not (chosen.startswith(HUMAN) and rejected.startswith(HUMAN)):
        return None
    end = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT) or chosen[:end] != rejected[:end]:
        return None
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _same_kind(values: dict[str, Any], with_system: bool) -> dict[str, Any]:
    """Conversations of plain strings, where a system column or one of the other parts makes the row a conversation."""
    parts = {part: values[part] for part in ("prompt", "chosen", "rejected") if part in values}
    system = values.pop("system", None)
    if system is not None and not isinstance(system, str):
        raise BadRow(f"'system' is of type {type(system).__name__}, must be a string")
    kinds = {part: isinstance(value, list) for part, value in parts.items()}
    if not with_system and (not any(kinds.values()) or kinds.get("chosen") != kinds.get("rejected")):
        return values  # plain strings, or a mixture that pairs.py refuses

    for part, value in parts.items():
        if isinstance(value, str):
            values[part] = [{"role": "user" if part == "prompt" else "assistant", "content": value}]
    if isinstance(parts.get("prompt"), str) and "chosen" in parts and "rejected" in parts:
        values = _without_repeated_prompt(values, parts["prompt"])
    if not system:
        return values

    if "prompt" not in values and not (kinds.get("chosen") and kinds.get("rejected")):
        raise BadRow("columns.system: needs a prompt column, to stand before its messages")
    if "prompt" not in values and values["chosen"][:1] != values["rejected"][:1]:
        raise BadRow("'chosen' and 'rejected' share no first message; a conversation needs at least one before them")

    # without a prompt column the messages that both answers start with are the prompt
    for beginning in ["prompt"] if "prompt" in values else ["chosen", "rejected"]:
        messages = values[beginning]
        if not isinstance(messages, list) or not messages:
            continue  # pairs.py refuses it
        if isinstance(messages[0], dict) and messages[0].get("role") == "system":
            raise BadRow(f"columns.system: {beginning!r} has a system message of its own")
        values = values | {beginning: [{"role": "system", "content": system}, *messages]}
    return values


def _without_repeated_prompt(values: dict[str, Any], prompt: str) -> dict[str, Any]:
    """UltraFeedback binarized has the prompt as a string and again in the messages that both answers start with.

    BadRow if the answers start with other messages than an assistant's: prompt and messages would both be trained on.
    """
    chosen, rejected = values["chosen"], values["rejected"]
    if not all(isinstance(answer, list) and answer for answer in (chosen, rejected)):
        return values
    if all(
        isinstance(answer[0], dict) and answer[0].get("role") in ("assistant", "tool") for answer in (chosen, rejected)
    ):
        return values

    shared = [one for one, other in zip(chosen, rejected, strict=False) if one == other]
    users = [m["content"] for m in shared if isinstance(m, dict) and m.get("role") == "user" and "content" in m]
    if not prompt.strip() or prompt.strip() in [str(content).strip() for content in users]:
        return {name: value for name, value in values.items() if name != "prompt"}
    raise BadRow(
        "'prompt' is a string, and the answers are conversations that do not contain it; leave out the column "
        "prompt, or start the answers with the assistant's message"
    )


def _refuse_media(row: dict[str, Any]) -> None:
    for name in MEDIA:
        if row.get(name):
            raise BadRow(f"{name!r} is set; only text can be trained on here")
