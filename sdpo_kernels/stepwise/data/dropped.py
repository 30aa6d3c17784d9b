"""Messages and tool calls that a chat template drops, for example because it does not know their role.

    dropped(messages, text, render, known, options)      # [Dropped(0, "message")]: the first one is not in the text

A template may write a content otherwise than it is given: stripped, escaped, somewhere else, without its reasoning or
without flags such as SmolLM3's `/no_think`. So it is not enough to look for contents in the text. And what is found
there may have been written by the template itself. So the first conversation of each structure (its roles, and who
calls tools) is rendered twice, the second time with a mark in each message: what is written has its mark.
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
    """What is missing: the content of message `at`, or its tool call."""

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
    turns = [(m["role"], bool(_content(m)), len(m.get("tool_calls") or ())) for m in messages]
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
    parts += [Dropped(at, "call") for at, message in enumerate(messages) if _first_name(message) is not None]
    try:
        text = render(_marked(messages, parts))
        return sorted(part for part in parts if _mark(part) not in text)
    except UserError:
        pass

    # a template that reads some content (JSON, for example) may refuse it with a mark: then it does not pass it over
    missing = []
    for part in parts:
        try:
            if _mark(part) not in render(_marked(messages, [part])):
                missing.append(part)
        except UserError:
            continue
    return sorted(missing)


def _marked(messages: Messages, parts: Sequence[Dropped]) -> list[dict[str, Any]]:
    """`messages` with marks at the end of contents and of the names of tools."""
    marked = list(messages)
    for part in parts:
        message, mark = marked[part.at], _mark(part)
        if part.what == "message":
            marked[part.at] = message | {"content": message["content"] + mark}
            continue
        first, *others = message["tool_calls"]
        if "function" in first:
            first = first | {"function": first["function"] | {"name": first["function"]["name"] + mark}}
        else:
            first = first | {"name": first["name"] + mark}
        marked[part.at] = message | {"tool_calls": [first, *others]}
    return marked


def _first_name(message: Mapping[str, Any]) -> str | None:
    """The name of the first tool that a message calls, if it has the usual form."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls or not isinstance(calls[0], dict):
        return None
    function = calls[0].get("function", calls[0])
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _mark(part: Dropped) -> str:
    """Letters and digits, which no template escapes."""
    return f"sdpo{part.at}{part.what}"
