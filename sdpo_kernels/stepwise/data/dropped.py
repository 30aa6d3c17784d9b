"""Messages and tool calls that a chat template drops, for example because it does not know their role.

    dropped(messages, text, render, known, options)      # [Dropped(0, "message")]: the first one is not in the text

A template may write a content otherwise than it is given: stripped, escaped, somewhere else, without its reasoning or
without flags such as SmolLM3's `/no_think`. So it is not enough to look for contents in the text. And what is found
there may have been written by the template itself. So the first conversation of each structure (its roles, who calls
tools, and in which form) is rendered twice, the second time with a mark in each message: what is written has its mark.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sdpo_kernels.stepwise.common.errors import UserError

# what templates call the roles of other schemas
USUAL_ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant",
    "ai": "assistant", "developer": "system", "observation": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip

Messages = Sequence[dict[str, Any]]
Render = Callable[[list[dict[str, Any]]], str]


class Dropped(NamedTuple):
    """What is missing: the content of message `at`, or a tool call of it, or a call's arguments."""

    at: int
    what: Literal["message", "call"]


def dropped(
    messages: Messages, text: str, render: Render, known: set[Hashable], options: Mapping[str, Any]
) -> list[Dropped]:
    """What of `messages` is not in `text`, which `render` made of them with `options`.

    1. If a conversation of this structure is `known` to be written whole, look for the contents in order.
    2. Otherwise, or where they are not there, render again with marks, and enter the structure in `known` if all are
       there.
    """
    structure = _structure(messages, options)
    if structure in known and _all_in_order(map(_content, messages), text):
        return []

    missing = _without_mark(messages, render)
    if not missing:
        known.add(structure)
    return missing


def renaming(role: str) -> str:
    """What to do about a role that a template does not know."""
    return f"rename the role to {USUAL_ROLES[role]!r}" if role in USUAL_ROLES else "rename the role"


def one_line(text: str) -> str:
    """`text` with all whitespace alike, which templates may change."""
    return " ".join(text.split())


def is_changed(content: str, text: str) -> bool:
    """Whether `text` has `content` only in another form, but for whitespace, or as JSON (results of tools)."""
    forms = (content, json.dumps(content, ensure_ascii=False)[1:-1])
    return not any(one_line(form) in one_line(text) for form in forms)


def _structure(messages: Messages, options: Mapping[str, Any]) -> Hashable:
    """What decides whether a template writes a message."""
    turns = [(m["role"], bool(_content(m)), [_form(call) for call in _calls(m)]) for m in messages]
    kept = {name: value for name, value in options.items() if name not in ("tools", "template_time")}
    return json.dumps([turns, bool(options.get("tools")), kept], default=str, sort_keys=True)


def _content(message: Mapping[str, Any]) -> str:
    return (message.get("content") or "").strip()


def _all_in_order(contents: Iterable[str], text: str) -> bool:
    end = 0
    for content in contents:
        at = text.find(content, end)
        if at < 0:
            return False
        end = at + len(content)
    return True


def _without_mark(messages: Messages, render: Render) -> list[Dropped]:
    """What has no mark in the text of the marked messages."""
    parts = [Dropped(at, "message") for at, message in enumerate(messages) if _content(message)]
    parts += [Dropped(at, "call") for at, message in enumerate(messages) if any(map(_form, _calls(message)))]
    try:
        marked, marks = _marked(messages, parts)
        text = render(marked)
        return sorted(part for part in parts if not all(mark in text for mark in marks[part]))
    except UserError:
        pass

    # a template that reads some content (JSON, for example) may refuse it with a mark: then it does not pass it over
    missing = []
    for part in parts:
        try:
            marked, marks = _marked(messages, [part])
            text = render(marked)
        except UserError:
            continue
        if not all(mark in text for mark in marks[part]):
            missing.append(part)
    return sorted(missing)


def _marked(messages: Messages, parts: Sequence[Dropped]) -> tuple[list[dict[str, Any]], dict[Dropped, list[str]]]:
    """`messages` with marks at the end of contents, of tools' names and in their arguments; the marks of each part.

    A mark is letters and digits, which no template escapes.
    """
    marked, marks = list(messages), dict[Dropped, list[str]]()
    for part in parts:
        message = marked[part.at]
        if part.what == "message":
            marks[part] = [f"sdpo{part.at}message"]
            marked[part.at] = message | {"content": message["content"] + marks[part][0]}
            continue
        calls = [_marked_call(call, f"sdpo{part.at}call{number}") for number, call in enumerate(message["tool_calls"])]
        marks[part] = [mark for _, own in calls for mark in own]
        marked[part.at] = message | {"tool_calls": [call for call, _ in calls]}
    return marked, marks


def _marked_call(call: Any, mark: str) -> tuple[Any, list[str]]:
    """A tool call with marks in name and arguments, and the marks; none in what has not the usual form."""
    form = _form(call)
    if form is None:
        return call, []
    function = call["function"] if form.nested else call
    marked, marks = function | {"name": f"{function['name']}{mark}name"}, [f"{mark}name"]

    # no arguments may be written as nothing at all
    if form.arguments:
        found = function["arguments"]
        one_more = (json.loads(found) if isinstance(found, str) else found) | {f"{mark}argument": "1"}
        marked["arguments"] = json.dumps(one_more, ensure_ascii=False) if isinstance(found, str) else one_more
        marks.append(f"{mark}argument")
    return (call | {"function": marked} if form.nested else marked), marks


class _CallForm(NamedTuple):
    """What decides whether a template writes a tool call."""

    nested: bool  # under "function"
    arguments: str  # "object" or "text" (of a JSON object); empty: none, or of another kind


def _calls(message: Mapping[str, Any]) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _form(call: Any) -> _CallForm | None:
    """The form of a tool call; None if it has no name where it is usual."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            kind = "text" if isinstance(found := json.loads(arguments), dict) and found else ""
        except ValueError:
            kind = ""
    else:
        kind = "object" if isinstance(arguments, dict) and arguments else ""
    return _CallForm("function" in call, kind)
