"""Warnings about pairs that can be trained on, but perhaps not as their author meant: one of each kind, with a count.

notes = PairNotes()
notes.look_at(pair)
notes.warnings(total)       # ["2 of 100 pairs (first: d.jsonl:3): both answers begin with the prompt, …"]
"""

from __future__ import annotations

from typing import Any

from sdpo_kernels.stepwise.data.pairs import Pair
from sdpo_kernels.stepwise.data.render import RenderedChat

NO_PREFIX = (
    "the tokenised prompt is not a prefix of the tokenised prompt + completion. The completion starts where they "
    "differ, so the model is trained on a context that differs from the one at inference. End the prompt on a token "
    "boundary, or fix the chat template"
)
LOST_REASONING = "the chat template leaves out the reasoning of an answer, which is not trained; change the template"
CHANGED = (
    "the chat template changes an answer (it leaves out a part of it, or escapes it), so other text is trained on than "
    "the data has"
)
LOST_CALL_TEXT = "the chat template leaves out the text next to a tool call of the prompt"
IGNORED_TOOLS = "the chat template does not write the row's tools, so the model does not see them; change the template"
NO_END = (
    "the chat template writes no end token after the answer, so the model does not learn to stop; change the template"
)
REPEATED_PROMPT = (
    "both answers begin with the prompt, which is then trained on as a part of them; remove it from the answers, or "
    "drop the column prompt and set prompt: implicit"
)
OTHER_ROLE = (
    "the answers have messages of role {!r}, which are trained on like the assistant's; move them into the prompt if "
    "that is not meant"
)


class PairNotes:
    """Collects where pairs deserve a warning."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}  # warning → where the pairs are

    def add(self, pair: Pair, warning: str) -> None:
        """Note that `warning` is about `pair`, too."""
        self._places.setdefault(warning, []).append(pair.where)

    def look_at(self, pair: Pair, chat: RenderedChat | None) -> None:
        """Note what can be seen before a pair is tokenised; `chat` is what the template made of a conversation."""
        if chat is not None:
            found = {
                LOST_REASONING: chat.lost_reasoning,
                CHANGED: chat.changed,
                LOST_CALL_TEXT: chat.lost_call_text,
                IGNORED_TOOLS: chat.ignored_tools,
            }
            for warning in (text for text, holds in found.items() if holds):
                self.add(pair, warning)
        if _repeats_prompt(pair):
            self.add(pair, REPEATED_PROMPT)
        if role := _other_role(pair):
            self.add(pair, OTHER_ROLE.format(role))

    def warnings(self, total: int) -> list[str]:
        """One warning of each kind, with the number of pairs and the first of them."""
        return [f"{len(at)} of {total} pairs (first: {at[0]}): {warning}" for warning, at in self._places.items()]


def _repeats_prompt(pair: Pair) -> bool:
    """Whether both answers of a plain pair begin with its prompt. Of conversations pairs.py finds it."""
    if pair.is_conversational:
        return False
    prompt = str(pair.prompt).strip()
    return bool(prompt) and all(str(answer).lstrip().startswith(prompt) for answer in (pair.chosen, pair.rejected))


def _other_role(pair: Pair) -> str | None:
    """The role of the first message of the answers that is not the assistant's; None if all are."""
    if not pair.is_conversational:
        return None
    messages: list[Any] = [*pair.chosen, *pair.rejected]
    return next((message["role"] for message in messages if message["role"] != "assistant"), None)
