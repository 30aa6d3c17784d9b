"""Messages that a chat template drops, for example because it does not know their role.

    dropped(messages, text, render)      # [0]: the first message is not in the text

A template may write a content otherwise than it is given: stripped, escaped, somewhere else, without its reasoning or
without flags such as SmolLM3's `/no_think`. So it is not enough to look for contents in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sdpo_kernels.stepwise.common.errors import UserError

_SHORT = 12  # characters; a shorter content may be found by accident in what the template writes itself


def dropped(messages: Sequence[dict[str, Any]], text: str, render: Callable[[list[dict[str, Any]]], str]) -> list[int]:
    """The indices of the messages whose content is not in `text`, which `render` made of `messages`.

    1. Nearly always all contents are there in order, one after the other.
    2. Otherwise render again with a mark at the end of each content: what is written, in whatever form, has its mark.
    """
    contents = {at: found for at, message in enumerate(messages) if (found := (message.get("content") or "").strip())}
    if min(map(len, contents.values()), default=_SHORT) >= _SHORT and _all_in_order(contents.values(), text):
        return []

    marked = [m | {"content": m["content"] + _mark(at)} if at in contents else m for at, m in enumerate(messages)]
    try:
        again = render(marked)
    except UserError:
        # the template reads the content, JSON for example: it is not one that passes over messages
        return []
    return [at for at in contents if _mark(at) not in again]


def _all_in_order(contents: Any, text: str) -> bool:
    end = 0
    for content in contents:
        at = text.find(content, end)
        if at < 0:
            return False
        end = at + len(content)
    return True


def _mark(at: int) -> str:
    """Letters and digits, which no template escapes."""
    return f"sdpo{at}mark"
