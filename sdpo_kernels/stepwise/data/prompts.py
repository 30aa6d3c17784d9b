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
from sdpo_kernels.stepwise.data.pairs import (
    Pair,
    PairSource,
    as_source,
    check_mapped,
    check_text,
    read_template_options,
    read_tools,
    refuse_bad_rows,
)
from sdpo_kernels.stepwise.data.raw_rows import Row, read_rows
from sdpo_kernels.stepwise.data.render import RenderedChat, chat_ids, ended, is_prefill, plain_ids, render_chat
from sdpo_kernels.stepwise.data.shapes import CONVERSATIONS, BadRow, Shape
from sdpo_kernels.stepwise.data.suggestions import listed, suggested


@dataclass(frozen=True)
class PromptRow:
    """One prompt, a string or messages; `values` is the whole row, which is passed to the judge.

    `template_time` is the time that a chat template reads; None: now.
    """

    prompt: Any
    values: dict[str, Any]
    where: str
    template_time: datetime | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def is_conversational(self) -> bool:
        """Whether the prompt is a list of messages."""
        return not isinstance(self.prompt, str)

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The prompt as text, up to where the answer starts."""
        if not self.is_conversational:
            return self.prompt
        return self._render(tokenizer).prompt

    @property
    def _options(self) -> dict[str, Any]:
        """What the row has for the chat template."""
        options = {"tools": self.tools, "chat_template_kwargs": self.chat_template_kwargs}
        return {name: value for name, value in options.items() if value}

    def _render(self, tokenizer: PreTrainedTokenizerBase, **answers: Any) -> RenderedChat:
        """Apply the chat template, with the row's own tools and template options."""
        options = {"tools": self.tools, **(self.chat_template_kwargs or {})}
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
        return {"prompt": self.prompt, **both, **self._options, **more}

    def pair_of(self, chosen: str, rejected: str) -> Pair:
        """The same pair as it is tokenised."""
        return Pair(self.prompt, self.completion(chosen), self.completion(rejected), self.where, **self._options)


def read_prompts(
    sources: Sequence[str | PairSource], on_bad_row: Literal["error", "skip"], template_time: datetime | None = None
) -> tuple[list[PromptRow], list[str]]:
    """The prompts of all sources in order, and 'file:line: what is wrong' for each skipped row.

    Raises UserError if a row is bad and `on_bad_row` is 'error', or if no prompt is left.
    """
    prompts: list[PromptRow] = []
    bad: list[str] = []
    for source in map(as_source, sources):
        shape, columns = source.prompt_shape, set[str]()
        for row in read_rows(source.path, None):
            if not columns and not row.problem:  # the first row shows which columns the source has
                shape = shape.of_source(row.values)
            columns.update(row.values)
            try:
                prompts.append(_read(row, shape, template_time))
            except BadRow as problem:
                bad.append(f"{row.where}: {problem}")
        check_mapped(source.path, shape, columns)

    if on_bad_row == "error":
        refuse_bad_rows(bad)
    if not prompts:
        raise UserError(f"{', '.join(as_source(source).path for source in sources)}: has no prompts")
    return prompts, bad


def prompts_hash(prompts: Sequence[PromptRow]) -> str:
    """sha256 of all rows."""
    text = json.dumps([row.values for row in prompts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(row: Row, shape: Shape, template_time: datetime | None) -> PromptRow:
    """The prompt of a row, with its tools and options as they go to the chat template. Raises BadRow."""
    if row.problem:
        raise BadRow(row.problem)
    read = shape.read_prompt(row.values)

    prompt = read.get("prompt")
    if "prompt" not in read:
        line = suggested(row.values, shape.columns, ["prompt"])
        raise BadRow(f"'prompt' is missing; the row has {listed(row.values)}. Name its column with {line}")
    if prompt is None:
        raise BadRow("'prompt' is missing: it is null")
    check_text("prompt", prompt)
    if not prompt:
        raise BadRow("'prompt' is empty")

    # the judge gets the row as it is, with the prompt under its usual name
    own = shape.columns.prompt is None and row.values.get("prompt") is not None
    if not own and shape.columns.prompt is None and is_prefill(prompt):
        raise BadRow(f"{CONVERSATIONS!r} ends with an assistant's message, must end with the user's to be a prompt")
    values = row.values if own and shape.columns.system is None else row.values | {"prompt": prompt}
    return PromptRow(prompt, values, row.where, template_time, read_tools(read), read_template_options(read))
