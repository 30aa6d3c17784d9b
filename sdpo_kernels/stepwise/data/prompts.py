"""Prompts for generated pairs: rows of a data file with `prompt` and whatever else a judge needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.pairs import BadRow, check_text, refuse_bad_rows
from sdpo_kernels.stepwise.data.raw_rows import Row, read_rows
from sdpo_kernels.stepwise.data.render import RenderedChat, chat_ids, ended, plain_ids, render_chat


@dataclass(frozen=True)
class PromptRow:
    """One prompt, a string or messages; `values` is the whole row, which is passed to the judge.

    `template_time` is the time that a chat template reads; None: now.
    """

    prompt: Any
    values: dict[str, Any]
    where: str
    template_time: datetime | None = None

    @property
    def is_conversational(self) -> bool:
        """Whether the prompt is a list of messages."""
        return not isinstance(self.prompt, str)

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The prompt as text, up to where the answer starts."""
        if not self.is_conversational:
            return self.prompt
        return self._render(tokenizer).prompt

    def _render(self, tokenizer: PreTrainedTokenizerBase, **answers: Any) -> RenderedChat:
        """Apply the chat template, with the row's own tools and template options."""
        options = {"tools": self.values.get("tools"), **(self.values.get("chat_template_kwargs") or {})}
        return render_chat(self.prompt, answers, tokenizer, options, self.where, template_time=self.template_time)

    def whole_ids(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
        """Token ids of the prompt followed by a whole answer and, if the tokenizer has one, an end token."""
        if self.is_conversational:
            return chat_ids(self._render(tokenizer, answer=self.completion(answer)).answers, tokenizer)[0]
        return plain_ids([self.prompt + ended(answer, tokenizer)], tokenizer)[0]

    def ids(self, tokenizer: PreTrainedTokenizerBase, answer: str = "") -> list[int]:
        """Token ids of the prompt followed by `answer`, the start of an answer."""
        encode = chat_ids if self.is_conversational else plain_ids
        return encode([self.text(tokenizer) + answer], tokenizer)[0]

    def completion(self, text: str) -> Any:
        """An answer in the form of the row: a string or a list of messages."""
        return [{"role": "assistant", "content": text}] if self.is_conversational else text

    def pair(self, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
        """A row of a data file of pairs, in TRL's schema."""
        both = {"chosen": self.completion(chosen), "rejected": self.completion(rejected)}
        template = {name: self.values[name] for name in ("tools", "chat_template_kwargs") if self.values.get(name)}
        return {"prompt": self.prompt, **both, **template, **more}


def read_prompts(
    sources: Sequence[str], on_bad_row: Literal["error", "skip"], template_time: datetime | None = None
) -> tuple[list[PromptRow], list[str]]:
    """The prompts of all sources in order, and 'file:line: what is wrong' for each skipped row.

    Raises UserError if a row is bad and `on_bad_row` is 'error', or if no prompt is left.
    """
    prompts: list[PromptRow] = []
    bad: list[str] = []
    for source in sources:
        for row in read_rows(source, None):
            problem = row.problem or _problem(row)
            if problem:
                bad.append(f"{row.where}: {problem}")
            else:
                prompts.append(PromptRow(row.values["prompt"], row.values, row.where, template_time))

    if on_bad_row == "error":
        refuse_bad_rows(bad)
    if not prompts:
        raise UserError(f"{', '.join(sources)}: has no prompts")
    return prompts, bad


def prompts_hash(prompts: Sequence[PromptRow]) -> str:
    """sha256 of all rows."""
    text = json.dumps([row.values for row in prompts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _problem(row: Row) -> str | None:
    prompt = row.values.get("prompt")
    if prompt is None:
        return "'prompt' is missing"
    try:
        check_text("prompt", prompt)
    except BadRow as problem:
        return str(problem)
    return None if prompt else "'prompt' is empty"
