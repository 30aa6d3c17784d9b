"""Prompts and answers as the tokenizer gets them: plain strings, or conversations through the chat template.

    plain_ids([prompt, prompt + ended(answer, tokenizer)], tokenizer)
    rendered = render_chat(prompt, {"chosen": chosen, "rejected": rejected}, tokenizer, {"tools": None}, "d.jsonl:1")
    rendered.prompt, rendered.answers                               # text of the prompt, texts of prompt + answer

Nothing goes missing and nothing is written twice: every message must be found in the text that the template made of it,
and BOS and EOS are not added where the text has its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.template_clock import apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

THINK_START, THINK_END = "<think>", "</think>"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # read by templates that know reasoning


# ---- plain strings ----


def ended(answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`answer` with exactly one EOS token at its end, if the tokenizer has one."""
    if tokenizer.eos_token is None:
        return answer
    eos = str(tokenizer.eos_token)
    return re.sub(rf"(?:{re.escape(eos)}\s*)+\Z", "", answer) + eos


def plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of plain texts: at most one BOS token at the start, and at the end only what the text has itself."""
    if not texts:
        return []

    # verbose=False: no warning about model_max_length, because max_length is applied later
    found: Any = tokenizer(list(texts), verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    # the answer has to continue the prompt, and brings its own EOS token
    if any(_trailing(ids, eos) for ids in found) and _adds_eos(tokenizer):
        found = [ids[:-1] for ids in found]

    return [ids[max(0, _leading(ids, bos) - 1) :] for ids in found]


def _adds_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts the EOS token at the end of every text (`add_eos_token`)."""
    with_special: Any = tokenizer("a")["input_ids"]
    without: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    return _trailing(with_special, tokenizer.eos_token_id) > _trailing(without, tokenizer.eos_token_id)


def _leading(ids: Sequence[int], token: Any) -> int:
    """How many times in a row `token` comes first in `ids`."""
    return next((at for at, own in enumerate(ids) if own != token), len(ids))


def _trailing(ids: Sequence[int], token: Any) -> int:
    return _leading(ids[::-1], token)


# ---- conversations ----


@dataclass(frozen=True)
class RenderedChat:
    """Texts of a prompt and of prompt + answer for each answer, in the order in which the answers were given."""

    prompt: str
    answers: list[str]
    lost_reasoning: bool  # whether the reasoning of an answer is missing from its text


def render_chat(
    prompt: Messages,
    answers: Mapping[str, Messages],
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
    where: str,
    *,
    template_time: datetime | None = None,
) -> RenderedChat:
    """Apply the chat template to a prompt and to the prompt with each of `answers` (by their column).

    1. If the prompt ends with an assistant's message (a prefill), the first message of each answer continues it.
    2. Render the prompt up to where the answer starts, and each whole conversation.
    3. If BOS or EOS came out twice, because messages have their own, render again without those of the messages.
    4. Look for every message's content in the text.

    `options` go to the template; `template_time` is the time that it reads, None: now. Raises UserError, which names
    `where`: the template fails or drops a message, or an answer cannot continue the prefill.
    """
    whole = {name: _joined(prompt, answer, name, where) for name, answer in answers.items()}
    conversations = [prompt, *whole.values()]

    def render(conversations: Sequence[Messages]) -> list[str]:
        return _render_all(conversations, tokenizer, {**options, "template_time": template_time}, where)

    texts = render(conversations)
    conversations, texts = _without_doubles(conversations, texts, tokenizer, render)

    # without answers, the prompt itself is all there is to check
    checked = slice(-len(answers), None)
    for name, messages, text in zip(answers or [""], conversations[checked], texts[checked], strict=True):
        if (missing := _first_missing(messages, text)) is not None:
            first_of_answer = len(messages) - len(answers.get(name, []))
            at = f"prompt[{missing}]" if missing < first_of_answer else f"{name}[{missing - first_of_answer}]"
            raise UserError(
                f"{where}: the chat template drops the message of role {messages[missing]['role']!r} ({at}); rename "
                "the role or change the template"
            )

    lost = [_loses_reasoning(messages[-1], text) for messages, text in zip(conversations[1:], texts[1:], strict=True)]
    return RenderedChat(texts[0], texts[1:], any(lost))


def chat_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts that a chat template has made, which contain their special tokens."""
    found: Any = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return found


def is_prefill(prompt: Messages) -> bool:
    """Whether `prompt` ends with the start of the answer."""
    return bool(prompt) and prompt[-1]["role"] == "assistant"


def _joined(prompt: Messages, answer: Messages, name: str, where: str) -> Messages:
    """`prompt` and `answer` as one conversation; a prefill and the answer's first message become one message."""
    if not answer or not is_prefill(prompt):
        return prompt + answer
    start, first = prompt[-1], answer[0]

    reason = None
    if first["role"] != "assistant":
        reason = f"{name!r} starts with the role {first['role']!r}"
    elif start.get("tool_calls") or start.get("content") is None:
        reason = "that message calls a tool"
    else:
        both = [key for key in start if key not in ("role", "content") and start[key] != first.get(key, start[key])]
        reason = f"both have {both[0]!r}" if both else None
    if reason:
        raise UserError(
            f"{where}: 'prompt' ends with an assistant's message, which the answers must continue, but {reason}; end "
            "the prompt with the user's message, or start the answers with the assistant's"
        )

    content = start["content"] + (first.get("content") or "")
    return [*prompt[:-1], {**start, **first, "content": content}, *answer[1:]]


def _render_all(
    conversations: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], where: str
) -> list[str]:
    """The texts of a prompt, the first of `conversations`, and of the whole conversations after it."""
    prompt, *whole = conversations
    render: Any = partial(apply_template, tokenizer)
    ending = {"continue_final_message": True} if is_prefill(prompt) else {"add_generation_prompt": True}
    try:
        return [
            str(render(prompt, tokenize=False, **ending, **options)),
            *(str(render(messages, tokenize=False, **options)) for messages in whole),
        ]
    except Exception as error:  # a template is a program, which may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{where}: the tokenizer's chat template failed: {type(error).__name__}: {reason}") from error


# ---- BOS and EOS ----


def _without_doubles(
    conversations: list[Messages],
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    render: Callable[[Sequence[Messages]], list[str]],
) -> tuple[list[Messages], list[str]]:
    """Conversations and texts without the BOS and EOS tokens of messages where the template writes its own.

    With a template that writes none, messages keep one of theirs.
    """
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    starts, ends = rf"\A\s*(?:{re.escape(bos)})+", rf"(?:{re.escape(eos)}\s*)+\Z"

    # a BOS of any message, not only of the first: the template's is at the start
    if bos and (cut := _replaced(starts, "", conversations)) != conversations:
        again = render(cut)
        if not again[-1].startswith(bos):
            cut = _replaced(starts, bos, conversations)
            again = render(cut)
        conversations, texts = cut, again

    if eos and any(re.search(rf"{re.escape(eos)}\s*{re.escape(eos)}", text) for text in texts):
        cut = _replaced(ends, "", conversations)
        again = render(cut)
        if eos not in again[-1]:
            cut = _replaced(ends, eos, conversations)
            again = render(cut)
        conversations, texts = cut, again
    return conversations, texts


def _replaced(pattern: str, by: str, conversations: Sequence[Messages]) -> list[Messages]:
    """`conversations` with `by` in place of `pattern` in every content."""
    return [
        [m | {"content": re.sub(pattern, lambda _: by, m["content"])} if m.get("content") else m for m in messages]
        for messages in conversations
    ]


# ---- dropped messages ----


def _content(message: dict[str, Any]) -> str:
    return message.get("content") or ""


def _first_missing(messages: Messages, text: str) -> int | None:
    """The index of the first message whose content is not in `text`; None if all are there.

    1. Nearly always all contents are there in order, one after the other.
    2. Otherwise each content takes a place of its own, which no other message has taken: the longest contents first,
       so that "ok" is not found in "look"; after the messages before it if possible, else anywhere, because some
       templates move the system message.
    3. If that fails too, the same again with all whitespace alike, which templates may change.
    """
    contents = [_content(message) for message in messages]
    if _all_in_order(contents, text):
        return None
    if _first_without_place(contents, text) is None:
        return None
    return _first_without_place([_one_line(content) for content in contents], _one_line(text))


def _all_in_order(contents: Sequence[str], text: str) -> bool:
    end = 0
    for content in contents:
        bare = content.strip()
        at = text.find(bare, end)
        if at < 0:
            return False
        end = at + len(bare)
    return True


def _first_without_place(contents: Sequence[str], text: str) -> int | None:
    places: dict[int, tuple[int, int]] = {}  # by index of the message
    missing = []
    for index in sorted(range(len(contents)), key=lambda i: -len(contents[i])):
        after = max((end for other, (_, end) in places.items() if other < index), default=0)
        tried = (
            _free_place(form, text, start, places.values()) for form in _forms(contents[index]) for start in (after, 0)
        )
        place = next((found for found in tried if found is not None), None)
        if place is None:
            missing.append(index)
        else:
            places[index] = place
    return min(missing, default=None)


def _forms(content: str) -> list[str]:
    """`content` in the forms that templates give it: stripped, without its reasoning, as JSON (results of tools)."""
    rest = content.rpartition(THINK_END)[2]
    return [content.strip(), rest.strip(), json.dumps(content, ensure_ascii=False)[1:-1]]


def _free_place(form: str, text: str, start: int, taken: Collection[tuple[int, int]]) -> tuple[int, int] | None:
    """Where `form` is in `text`, from `start` on, outside of all that is `taken`."""
    at = text.find(form, start)
    while at >= 0:
        end = at + len(form)
        blocking = [stop for begin, stop in taken if begin < end and at < stop]
        if not blocking:
            return at, end
        at = text.find(form, max(blocking))
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _loses_reasoning(message: dict[str, Any], text: str) -> bool:
    """Whether the reasoning of an answer's last message is missing from `text`."""
    before, end, _ = _content(message).rpartition(THINK_END)
    parts = [before.rpartition(THINK_START)[2]] if end else []
    parts += [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)]
    return any(_one_line(part) not in _one_line(text) for part in parts)
