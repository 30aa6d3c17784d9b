"""Prompts and answers as the tokenizer gets them: plain strings, or conversations through the chat template.

    plain_ids([prompt, prompt + ended(answer, tokenizer)], tokenizer)
    rendered = render_chat(prompt, {"chosen": chosen, "rejected": rejected}, tokenizer, {"tools": None}, "d.jsonl:1")
    rendered.prompt, rendered.answers                               # text of the prompt, texts of prompt + answer

Nothing goes missing and nothing is written twice: a message that the template drops is an error (`dropped.py`), and BOS
and EOS are not added where the text has its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.dropped import USUAL_ROLES, Dropped, dropped, is_changed, one_line, renaming
from sdpo_kernels.stepwise.data.template_clock import apply_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

THINK_START, THINK_END = "<think>", "</think>"
# structures of conversations that a tokenizer's templates write whole, see dropped.py
_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, set[Hashable]] = WeakKeyDictionary()

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


class RowError(UserError):
    """A row that the chat template cannot render as it should; the message starts with where the row is."""


@dataclass(frozen=True)
class RenderedChat:
    """Texts of a prompt and of prompt + answer for each answer, in the order in which the answers were given."""

    prompt: str
    answers: list[str]
    lost_reasoning: bool  # whether the reasoning of an answer is missing from its text
    changed: bool  # whether an answer is there in another form only, although its reasoning is not missing
    lost_call_text: bool  # whether a text of the prompt next to a tool call is missing
    ignored_tools: bool  # whether the template does not write the row's tools


@dataclass(frozen=True)
class _Template:
    """The tokenizer's chat template with the options of one row."""

    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any]
    where: str

    @property
    def form(self) -> _Form:
        """What the template that this row gets wants: its own, or one of several."""
        text = self.tokenizer.get_chat_template(self.options.get("chat_template"), self.options.get("tools"))
        return _form(self.tokenizer, text)

    def render(self, messages: Messages, ending: Mapping[str, Any]) -> str:
        """The text of a conversation; `ending` says what comes after the last message."""
        try:
            messages = _in_parts(messages) if self.form.parts else messages
            return str(apply_template(self.tokenizer, messages, tokenize=False, **ending, **self.options))
        except Exception as error:  # a template is a program, which may raise anything
            reason = (str(error).splitlines() or [""])[0]
            odd = next((m["role"] for m in messages if m["role"] in USUAL_ROLES), None)
            hint = f"; its message of role {odd!r}: {renaming(odd)}" if odd and "role" in reason.lower() else ""
            raise RowError(
                f"{self.where}: the tokenizer's chat template failed: {type(error).__name__}: {reason}{hint}"
            ) from error


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

    1. If the prompt ends with an assistant's message (a prefill), the first message of each answer continues it, unless
       the answers start with another role.
    2. Render the prompt up to where the answer starts, and each whole conversation.
    3. If BOS or EOS came out twice, because messages have their own, render again without those of the messages.
    4. Look for every message in the text.

    `options` go to the template; `template_time` is the time that it reads, None: now. Raises RowError, which names
    `where`: the template fails or drops a message, or an answer cannot continue the prefill.
    """
    template = _Template(tokenizer, {**options, "template_time": template_time}, where)
    continued = _is_continued(prompt, answers, where)
    whole = [_joined(prompt, answer, name, where) if continued else prompt + answer for name, answer in answers.items()]
    conversations = [prompt, *whole]

    after_prompt = {"continue_final_message": True} if continued else {"add_generation_prompt": not is_prefill(prompt)}
    endings: list[dict[str, bool]] = [after_prompt, *({} for _ in whole)]

    def render(conversations: Sequence[Messages]) -> list[str]:
        return [template.render(messages, ending) for messages, ending in zip(conversations, endings, strict=True)]

    conversations, texts = _without_doubles(conversations, render(conversations), tokenizer, render)

    # the whole conversations contain the prompt; without answers, it is all there is to check
    lost_call_text = False
    known = _KNOWN.setdefault(tokenizer, set())
    for place, (name, answer) in enumerate(answers.items(), start=1) if answers else [(0, ("", []))]:
        messages, again = conversations[place], partial(template.render, ending=endings[place])
        missing = dropped(messages, texts[place], again, known, {**options, "template": tokenizer.chat_template})
        n_prompt = len(messages) - len(answer)
        lost_call_text |= _refuse_dropped(messages, missing, n_prompt, name, texts[0] if answers else "", where)

    whole_texts = list(zip(conversations[1:], texts[1:], answers.values(), strict=True))
    lost = any(_loses_reasoning(messages[-1], text) for messages, text, _ in whole_texts)
    changed = not lost and any(
        is_changed(message.get("content") or "", text)
        for messages, text, answer in whole_texts
        for message in messages[len(messages) - len(answer) :]
    )
    ignored_tools = bool(options.get("tools")) and template.form.no_tools
    return RenderedChat(texts[0], texts[1:], lost, changed, lost_call_text, ignored_tools)


def chat_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts that a chat template has made, which contain their special tokens."""
    found: Any = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return found


def is_prefill(prompt: Messages) -> bool:
    """Whether `prompt` ends with an assistant's message, which may be the start of the answer."""
    return bool(prompt) and prompt[-1]["role"] == "assistant"


def _is_continued(prompt: Messages, answers: Mapping[str, Messages], where: str) -> bool:
    """Whether the answers continue the last message of the prompt. RowError if some do and others do not."""
    if not is_prefill(prompt):
        return False
    if not answers and prompt[-1].get("tool_calls"):
        raise RowError(f"{where}: 'prompt' ends with a tool call, must end with the tool's result or a user's message")
    others = {
        name: answer[0]["role"] for name, answer in answers.items() if answer and answer[0]["role"] != "assistant"
    }
    if others and len(others) < len(answers):
        name, role = next(iter(others.items()))
        raise _no_continuation(where, f"{name!r} starts with the role {role!r}")
    return not others


def _joined(prompt: Messages, answer: Messages, name: str, where: str) -> Messages:
    """`prompt` and `answer` as one conversation, where a prefill and the answer's first message are one message."""
    if not answer:
        return prompt
    start, first = prompt[-1], answer[0]

    if start.get("tool_calls") or start.get("content") is None:
        raise _no_continuation(where, "that message calls a tool")
    both = [key for key in start if key not in ("role", "content") and start[key] != first.get(key, start[key])]
    if both:
        raise _no_continuation(where, f"it and the first message of {name!r} have different {both[0]!r}")

    content = start["content"] + (first.get("content") or "")
    return [*prompt[:-1], {**start, **first, "content": content}, *answer[1:]]


def _no_continuation(where: str, reason: str) -> RowError:
    return RowError(
        f"{where}: 'prompt' ends with an assistant's message, which the answers must continue, but {reason}; end the "
        "prompt with the user's message, or start the answers with the assistant's"
    )


class _Form(NamedTuple):
    """What a chat template wants contents to be."""

    parts: bool  # lists of parts, as the templates of vision models (SmolVLM, Idefics 3, LLaVA-NeXT)
    no_tools: bool  # tools are not written, so a model would not see them


@lru_cache(maxsize=16)
def _form(tokenizer: PreTrainedTokenizerBase, template: str) -> _Form:
    """The form of contents that a template writes, found by trying."""

    def writes(*messages: dict[str, Any], tools: Any = None) -> bool:
        try:
            text = tokenizer.apply_chat_template(list(messages), tools=tools, chat_template=template, tokenize=False)
            return "Hello" in str(text)
        except Exception:  # a template is a program, which may raise anything
            return False

    user = {"role": "user", "content": "Hi"}
    parts = not writes(user | {"content": "Hello"}) and writes(user | {"content": [{"type": "text", "text": "Hello"}]})

    tool = {"name": "Hello", "description": "Hello", "parameters": {"type": "object", "properties": {}}}
    tools = writes(user, tools=[{"type": "function", "function": tool}])
    return _Form(parts, not tools)


def _in_parts(messages: Messages) -> Messages:
    return [
        m | {"content": [{"type": "text", "text": m["content"]}]} if m.get("content") is not None else m
        for m in messages
    ]


def _refuse_dropped(
    messages: Messages, missing: Sequence[Dropped], n_prompt: int, name: str, prompt_text: str, where: str
) -> bool:
    """RowError for what the template drops of `messages`: `n_prompt` of the prompt, then those of the answer `name`.

    A text of the prompt next to a tool call is no error, since many templates write only the call: returns whether
    there is one. But if the prompt alone has it, the answer would start at the call.
    """
    for index, what in missing:
        message, in_prompt = messages[index], index < n_prompt
        at = f"prompt[{index}]" if in_prompt else f"{name}[{index - n_prompt}]"
        if what == "call":
            raise RowError(
                f"{where}: the chat template drops a tool call or its arguments ({at}); use a template that writes them"
            )
        if not message.get("tool_calls"):
            raise RowError(
                f"{where}: the chat template drops the message of role {message['role']!r} ({at}); "
                f"{renaming(message['role'])} or change the template"
            )
        if not in_prompt or message["content"].strip() in prompt_text:
            raise RowError(
                f"{where}: the chat template drops the text next to the tool call ({at}); leave it out or change the "
                "template"
            )
    return bool(missing)


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


# ---- reasoning ----


def _loses_reasoning(message: dict[str, Any], text: str) -> bool:
    """Whether the reasoning of an answer's last message is missing from `text`."""
    before, end, _ = (message.get("content") or "").rpartition(THINK_END)
    parts = [before.rpartition(THINK_START)[2]] if end else []
    parts += [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)]
    return any(one_line(part) not in one_line(text) for part in parts)
