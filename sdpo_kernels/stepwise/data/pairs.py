"""Reads preference pairs from data sources and validates them: TRL's schema, one error line per bad row.

    data = read_pairs(["data/a.jsonl", "org/name:train"], on_bad_row="error")
    data.pairs[0].prompt, data.pairs[0].chosen, data.pairs[0].where          # ..., 'data/a.jsonl:1'

`prompt`, `chosen` and `rejected` are all strings or all lists of {role, content} messages; shapes.py brings other
schemas into this one. A conversation without `prompt` starts with the messages that chosen and rejected share. `tools`
and `chat_template_kwargs` of a row are passed to the chat template, as in TRL; all other columns are listed as unused.
A pair whose answers are equal is a bad row, because it teaches nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.units import counted
from sdpo_kernels.stepwise.data.raw_rows import Row, read_rows
from sdpo_kernels.stepwise.data.shapes import BadRow, Shape, clean, has_null_arguments, unused
from sdpo_kernels.stepwise.settings.types import is_json_source

Message = dict[str, Any]
Text = str | list[Message]


@dataclass(frozen=True)
class PairSource:
    """A data file or Hub dataset, and how its rows are read."""

    path: str
    shape: Shape = field(default_factory=Shape)

    @property
    def prompt_shape(self) -> Shape:
        """How its rows are read if only their prompts are wanted: columns of answers need not be there."""
        return replace(self.shape, columns=self.shape.columns.model_copy(update={"chosen": None, "rejected": None}))


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair with its location `where`; `score` is chosen minus rejected of a score column."""

    prompt: Text
    chosen: Text
    rejected: Text
    where: str
    score: float | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def is_conversational(self) -> bool:
        """Whether the texts are lists of messages."""
        return not isinstance(self.chosen, str)


@dataclass(frozen=True)
class PairData:
    """The pairs of all sources in order, and 'file:line: what is wrong' for each skipped row."""

    pairs: list[Pair]
    skipped: list[str]
    unused: dict[str, list[str]] = field(default_factory=dict)  # source → columns that nothing reads
    own_names: list[str] = field(default_factory=list)  # sources that have none of the columns that settings name
    nulls: dict[str, int] = field(default_factory=dict)  # JSON file → rows with nulls in the arguments of tool calls


def read_pairs(
    sources: Sequence[str | PairSource], *, on_bad_row: Literal["error", "skip"], score_column: str | None = None
) -> PairData:
    """Read and validate all sources.

    Args:
        sources: Data files or Hub datasets, see raw_rows.py, with their shape where it is not TRL's.
        on_bad_row: 'error' raises if any row is bad, with the first bad row and the number of others in the message.
            'skip' leaves bad rows out and lists them.
        score_column: Reads a score for each pair from the columns '<name>_chosen' and '<name>_rejected', or from a
            column '<name>' that contains their difference.

    Raises UserError for bad rows as described and, with either setting, if a source cannot be read, has no rows, or has
    only bad rows.
    """
    scores = [score_column, f"{score_column}_chosen", f"{score_column}_rejected"] if score_column else []
    pairs: list[Pair] = []
    bad: list[str] = []
    ignored: dict[str, list[str]] = {}
    own_names: list[str] = []
    nulls: Counter[str] = Counter()
    for source, shape in ((found.path, found.shape) for found in map(as_source, sources)):
        good_before, bad_before, given = len(pairs), len(bad), shape
        columns: set[str] = set()
        for row in read_rows(source, sorted(shape.names | set(scores))):
            if not columns and not row.problem:  # the first row shows which columns the source has
                given, shape = shape, shape.of_source([*row.values, *row.others])
            columns.update(row.values, row.others)
            nulls[source] += is_json_source(source) and has_null_arguments(row.values)
            try:
                pairs.append(_pair_of(row, shape, score_column))
            except BadRow as problem:
                bad.append(f"{row.where}: {problem}")

        # a whole source without a pair is a mistake in the settings rather than in a few rows
        new_bad = len(bad) - bad_before
        if len(pairs) == good_before and not new_bad:
            raise UserError(f"{source}: has no rows")
        if len(pairs) == good_before and on_bad_row == "skip":
            raise UserError(
                f"{source}: none of its {counted(new_bad, 'row')} can be used; the first: {bad[bad_before]}"
            )
        check_mapped(source, shape, columns)
        if shape is not given:
            own_names.append(source)
        if names := unused(columns - set(scores), shape):
            ignored[source] = names

    if on_bad_row == "error":
        refuse_bad_rows(bad)
    return PairData(pairs, bad, ignored, own_names, dict(+nulls))


def check_mapped(source: str, shape: Shape, columns: set[str]) -> None:
    """Raises UserError if no row of `source` has a column that the settings name; `columns` are those there are.

    A system message or tools need not be there where the settings are those of other data.
    """
    absent = shape.mapped - columns
    if shape.columns_optional:
        absent -= shape.may_lack
    if absent:
        there = ", ".join(sorted(columns)) or "none"
        raise UserError(f"{source}: columns: no row has the column {min(absent)!r}, which they name; there are {there}")


def as_source(source: str | PairSource) -> PairSource:
    """A path alone as a source in TRL's schema."""
    return PairSource(source) if isinstance(source, str) else source


def refuse_bad_rows(bad: Sequence[str], total: int | None = None) -> None:
    """Raises UserError if there are bad rows, with the first of them and the number of others in the message.

    `total`: how many rows there are. If all of them are bad, leaving them out is no help.
    """
    if bad:
        more = f" (and {counted(len(bad) - 1, 'more bad row')})" if len(bad) > 1 else ""
        hint = "" if len(bad) == total else "; set on_bad_row: skip to leave bad rows out"
        raise UserError(f"{bad[0]}{more}{hint}")


def shared_pairs(named: dict[str, list[Pair]]) -> list[str]:
    """A warning for every two lists of pairs that share pairs (equal in prompt, chosen and rejected), with counts.

    The keys of `named` are names of stages; "eval_data" stands for the evaluation pairs and is never a stage's name.
    """
    # sets, because a pair that occurs twice in one stage is not shared
    keys = {name: {_key(pair) for pair in pairs} for name, pairs in named.items()}

    warnings = []
    for (first, first_keys), (second, second_keys) in itertools.combinations(keys.items(), 2):
        shared = len(first_keys & second_keys)
        if shared and second == "eval_data":
            warnings.append(
                f"{shared} of eval_data's {len(second_keys)} distinct pairs are also trained on in stage {first!r}: "
                "scores on eval_data will be too high"
            )
        elif shared:
            warnings.append(
                f"stages {first!r} and {second!r} share {shared} of their {len(first_keys)} and {len(second_keys)} "
                "distinct pairs: the reference of the later stage was trained on them"
            )
    return warnings


def _key(pair: Pair) -> bytes:
    text = json.dumps([pair.prompt, pair.chosen, pair.rejected], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def _pair_of(row: Row, shape: Shape, score_column: str | None) -> Pair:
    if row.problem:
        raise BadRow(row.problem)
    values = shape.read(row.values, row.others)
    return Pair(
        *_texts(values),
        where=row.where,
        score=None if score_column is None else _score(row.values, score_column),
        tools=read_tools(values),
        chat_template_kwargs=read_template_options(values),
    )


_DRIVERS_OPTIONS = (
    "tokenize", "tools", "return_dict", "return_tensors", "return_assistant_tokens_mask", "add_generation_prompt",
    "continue_final_message",
)  # fmt: skip


def read_template_options(values: dict[str, Any]) -> dict[str, Any] | None:
    """The row's further arguments for the chat template. Raises BadRow for those that the driver sets."""
    options = _mapping(values, "chat_template_kwargs")
    for name in _DRIVERS_OPTIONS:
        if options is not None and name in options:
            raise BadRow(f"chat_template_kwargs: {name!r} is set by the driver; remove it")
    return clean(options)


def _texts(values: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The row's (prompt, chosen, rejected).

    1. Check that the columns have the right types, all of the same kind.
    2. Check that the answers are not empty and not equal.
    3. Without a prompt, take the common prefix of the answers.

    Raises BadRow if they do not make a preference pair.
    """
    # prompt and answers will be concatenated, so they must be of one kind
    names = [name for name in ("prompt", "chosen", "rejected") if name in values]
    kinds = {name: check_text(name, values[name]) for name in names}
    if len(set(kinds.values())) > 1:
        mixed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise BadRow(f"{mixed}; all must be strings or all lists of messages")

    chosen, rejected = values["chosen"], values["rejected"]
    for name in ("chosen", "rejected"):
        if _is_blank(values[name]):
            raise BadRow(f"{name!r} is empty")
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are equal; the pair teaches nothing")

    prompt, chosen, rejected = (
        (values["prompt"], chosen, rejected) if "prompt" in values else _split_prompt(chosen, rejected)
    )

    # an empty string is a valid prompt, but a chat template needs at least one message
    if isinstance(prompt, list) and not prompt:
        reason = "'prompt' has no messages" if "prompt" in values else "'chosen' and 'rejected' share no first message"
        raise BadRow(f"{reason}; a conversation needs at least one before the answers")
    _refuse_repeated_prompt(prompt, {"chosen": chosen, "rejected": rejected})
    return prompt, chosen, rejected


def _refuse_repeated_prompt(prompt: Text, answers: dict[str, Text]) -> None:
    """Raises BadRow if answers start with the last messages of the prompt; in plain text that may be meant.

    An assistant's message alone is not a repetition: the answers continue it.
    """
    if isinstance(prompt, str):
        return

    repeating = [
        repr(name)
        for name, answer in answers.items()
        for count in range(1, len(prompt) + 1)
        if prompt[-count:] == answer[:count] and prompt[-count]["role"] != "assistant"
    ]
    if repeating:
        verb = "repeats" if len(repeating) == 1 else "repeat"
        raise BadRow(
            f"{' and '.join(repeating)} {verb} the messages of 'prompt'; leave them out of the answers, or leave out "
            "'prompt'"
        )


def check_text(name: str, value: Any) -> str:
    """The kind of a text: 'a string' or 'a list of messages'. Raises BadRow for anything else."""
    if isinstance(value, str):
        _check_unicode(name, value)
        return "a string"
    if not isinstance(value, list):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise BadRow(f"{name!r} is {kind}, must be a string or a list of messages")
    for index, message in enumerate(value):
        _check_message(f"{name}[{index}]", message)
    return "a list of messages"


def _check_message(name: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise BadRow(f"{name!r} is of type {type(message).__name__}, must be a message with role and content")

    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise BadRow(f"{name!r} has no role, must have one such as user or assistant")

    # a message that only calls tools has no content
    if isinstance(content, str):
        _check_unicode(name, content)
    elif content is not None:
        raise BadRow(f"'{name}.content' is of type {type(content).__name__}, must be a string (text only)")
    elif not message.get("tool_calls"):
        raise BadRow(f"{name!r} has no content, must have a string")


def _check_unicode(name: str, text: str) -> None:
    """Raises BadRow for half of a surrogate pair, which a JSON escape can contain but no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{name!r} is not Unicode text: half a surrogate pair at character {error.start}") from None


def _is_blank(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return not any((message.get("content") or "").strip() or message.get("tool_calls") for message in text)


def _split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split off the common prefix (characters or whole messages) as the prompt, like TRL's `extract_prompt`.

    Each answer keeps at least its last element. A space before the answers becomes part of them, because tokenizers
    join it with the word that follows.
    """
    longest = min(len(chosen), len(rejected)) - 1
    start = next((i for i in range(longest + 1) if chosen[i] != rejected[i]), longest)
    differs = chosen[start] != rejected[start]
    if differs and start > 0 and chosen[start - 1] == " ":
        start -= 1
    return chosen[:start], chosen[start:], rejected[start:]


def _score(values: dict[str, Any], column: str) -> float:
    if column in values:
        return _number(values, column)
    names = (f"{column}_chosen", f"{column}_rejected")
    if not all(name in values for name in names):
        raise BadRow(f"score_column {column!r}: needs {names[0]!r} and {names[1]!r}, or {column!r}")
    return _number(values, names[0]) - _number(values, names[1])


def _number(values: dict[str, Any], name: str) -> float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadRow(f"{name!r} is {value!r:.40}, must be a finite number")
    return float(value)


def read_tools(values: dict[str, Any]) -> list[Any] | None:
    """The row's tools: a list, or a list as JSON text, because Parquet columns cannot contain mixed structures.

    An empty list and none are the same to a template.
    """
    tools = values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(f"'tools' is broken JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"'tools' is of type {type(tools).__name__}, must be a list")
    return clean(tools) or None


def _mapping(values: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = values.get(name)
    if value is not None and not isinstance(value, dict):
        raise BadRow(f"{name!r} is of type {type(value).__name__}, must be an object")
    return value
