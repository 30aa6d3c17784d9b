"""What the ways of sampling answers have in common: each gets batches of prompts and returns rows for the samples file.

`engine_transformers.py`, `engine_vllm.py` and `engine_url.py` implement `Engine`; `generation.py` chooses one, keeps
its rows on disk as they come, and asks it only for those that are missing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from sdpo_kernels.stepwise.data.prompts import PromptRow

Row = Any  # one answer as it is kept in the file, such as its token ids


class Prompt(NamedTuple):
    """What is continued: token ids, which may include the start of an answer, and the row they come from."""

    ids: list[int]
    row: PromptRow | None = None


class Completion(NamedTuple):
    """New tokens without the end token, their text, and whether the model produced the end token.

    A server gives text alone: then there are no ids.
    """

    ids: list[int]
    text: str
    finished: bool


class Batch(NamedTuple):
    """Prompts that are answered together, one answer each: of a prompt with several answers there are as many in a row.

    The answers depend on `seed`, which depends on `number` and not on the other batches.
    """

    number: int
    prompts: Sequence[Prompt]
    seed: int


class Answers(NamedTuple):
    """One row for each prompt of batch `number`, and what answered, if that is not the run's own process."""

    number: int
    rows: list[Row]
    by: str | None = None


class Engine(Protocol):
    """One way of sampling. Making one loads no more than is needed to say what the answers depend on."""

    column: str  # the rows' name in the file
    size: int  # answers of a batch: what a kill loses at most, for each batch that is being worked on

    def depends_on(self) -> dict[str, Any]:
        """What the answers depend on besides the prompts and the settings of sampling; JSON."""

    def answer(self, batches: Sequence[Batch]) -> Generator[Answers, None, None]:
        """Answer the batches, in any order, each as soon as it is there; with none, start nothing.

        UserError if one cannot be answered.
        """
        ...

    def completion(self, prompt: Prompt, row: Row) -> Completion:
        """The completion that a row of the file stands for."""

    def record(self, by: Sequence[str]) -> dict[str, Any] | None:
        """What the manifest says about the answers, given every different `by` of them; None: nothing."""


def token_completion(prompt: Prompt, ids: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> Completion:
    """The completion of a row of token ids, the last of which is the end token if there is one."""
    finished = bool(ids) and ids[-1] in ends
    ids = ids[:-1] if finished else ids
    return Completion(ids, text_after(tokenizer, prompt.ids, ids), finished)


def cut(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to and including the first end token; what follows is padding."""
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in ends), ids)


def end_tokens(own: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The end tokens of a model's generation config, and the one that training appends."""
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def text_after(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` after `prefix`; decoded alone, many tokenizers would drop the leading space."""
    before = str(tokenizer.decode(list(prefix), skip_special_tokens=True))
    return str(tokenizer.decode([*prefix, *ids], skip_special_tokens=True))[len(before) :]
