"""Tokenises preference pairs exactly like TRL 1.16's DPOTrainer, into flat arrays.

    tokens = tokenize_pairs(pairs, tokenizer, max_length=1024, truncation="keep_start")
    tokens[0].chosen.ids, tokens[0].chosen.prompt_length        # int32 array, number of prompt tokens in it

The prompt and prompt + completion are tokenised separately; the completion starts where the two first differ. For plain
strings the tokenizer's EOS token is appended. Conversations go through the chat template, with the generation prompt
after the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.pairs import Pair
from sdpo_kernels.stepwise.data.template_clock import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # pairs per call of the tokenizer, which processes the texts of a call in parallel


class TokenizedSequence(NamedTuple):
    """A prompt with one completion: `ids` [T] int32, the first `prompt_length` of which are not scored."""

    ids: NDArray[np.int32]
    prompt_length: int


class TokenizedPair(NamedTuple):
    """The two sequences of a pair."""

    chosen: TokenizedSequence
    rejected: TokenizedSequence


@dataclass(frozen=True, eq=False)
class TokenizedPairs:
    """Tokenised pairs as flat arrays. Sequence 2i is the chosen and 2i + 1 the rejected one of pair i.

    ids             [tokens] int32
    offsets         [2n + 1] int64, where each sequence starts in `ids`
    prompt_lengths  [2n] int32, after truncation
    kept            [n] int64, index of each pair in the list that was tokenised
    dropped         'file:line: why' for each pair that truncation left without a scored token
    warnings        messages for the user; not part of `content_hash`
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    kept: NDArray[np.int64]
    dropped: list[str]
    warnings: list[str]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> TokenizedPair:
        """The pair at `index` (a negative one counts from the end); its arrays are views."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: was {index}, must be below {len(self)}")
        first = 2 * (int(index) % len(self))
        return TokenizedPair(self._sequence(first), self._sequence(first + 1))

    def _sequence(self, number: int) -> TokenizedSequence:
        start, end = self.offsets[number], self.offsets[number + 1]
        return TokenizedSequence(self.ids[start:end], int(self.prompt_lengths[number]))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each sequence, [n, 2] (chosen, rejected)."""
        return np.diff(self.offsets).reshape(-1, 2)

    def take(self, indices: NDArray[np.int64], dropped: Sequence[str] = ()) -> TokenizedPairs:
        """The pairs at `indices`, in that order, with `dropped` as given and without warnings."""
        sequences = [sequence for index in indices for sequence in self[int(index)]]
        return _flatten(sequences, [int(self.kept[i]) for i in indices], list(dropped), [])

    @staticmethod
    def concatenate(parts: Sequence[TokenizedPairs]) -> TokenizedPairs:
        """The pairs of all `parts`, in order. `kept` counts from 0, as there is no common list it could refer to."""
        sequences = [
            sequence for part in parts for pair in map(part.__getitem__, range(len(part))) for sequence in pair
        ]
        dropped = [text for part in parts for text in part.dropped]
        return _flatten(sequences, list(range(len(sequences) // 2)), dropped, [])

    def content_hash(self) -> str:
        """sha256 of ids, offsets and prompt lengths: equal if and only if training sees the same tokens."""
        digest = hashlib.sha256()
        for array in (self.ids, self.offsets, self.prompt_lengths):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class _RawPair(NamedTuple):
    """Token ids of one pair before truncation."""

    prompt: list[int]
    chosen: list[int]  # prompt + completion
    rejected: list[int]


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: Literal["keep_start", "keep_end"],
    template_time: datetime | None = None,
) -> TokenizedPairs:
    """Tokenise `pairs`. `template_time` is the time that a chat template reads; None: now.

    1. Tokenise prompt, prompt + chosen and prompt + rejected of each pair.
    2. The prompt ends where the three first differ.
    3. Cut both sequences to `max_length` tokens: keep their start or their end.
    4. Drop and list the pair if either sequence has no scored token left.

    Raises UserError if the tokenizer has no EOS token but a pair is plain text, if it has no chat template but a pair
    is a conversation, if the template fails, and if `max_length` leaves no pair at all.
    """
    _check_tokenizer(pairs, tokenizer)

    sequences: list[TokenizedSequence] = []
    kept: list[int] = []
    dropped: list[str] = []
    diverging: list[str] = []
    for index, raw in enumerate(_raw_pairs(pairs, tokenizer, template_time)):
        pair = pairs[index]

        # both sides share one prompt length, as in TRL
        prompt_length = min(_common_prefix(raw.prompt, raw.chosen), _common_prefix(raw.prompt, raw.rejected))
        if prompt_length < len(raw.prompt):
            diverging.append(pair.where)

        cut = [_truncate(ids, prompt_length, max_length, truncation) for ids in (raw.chosen, raw.rejected)]
        reason = _unscored(cut, raw, prompt_length, max_length)
        if reason:
            dropped.append(f"{pair.where}: {reason}")
        else:
            kept.append(index)
            sequences += cut

    if pairs and not kept:
        raise UserError(f"max_length: was {max_length}, which leaves none of {len(pairs)} pairs; first: {dropped[0]}")
    return _flatten(sequences, kept, dropped, _divergence_warning(diverging, len(pairs)))


def _check_tokenizer(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> None:
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__

    plain = next((pair for pair in pairs if not pair.is_conversational), None)
    if plain is not None and tokenizer.eos_token is None:
        raise UserError(f"{plain.where}: is plain text, which needs an EOS token, but the tokenizer {name} has none")

    chat = next((pair for pair in pairs if pair.is_conversational), None)
    if chat is not None and not tokenizer.chat_template:
        raise UserError(f"{chat.where}: is a conversation, but the tokenizer {name} has no chat template")


def _raw_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, template_time: datetime | None
) -> Iterable[_RawPair]:
    """Token ids of each pair, in order; the tokenizer gets `_CHUNK` pairs at a time."""
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        raw: dict[int, _RawPair] = {}

        # the two kinds need different options of the tokenizer, so a call for each
        for conversational in (False, True):
            members = [i for i, pair in enumerate(chunk) if pair.is_conversational == conversational]
            texts = [
                text
                for i in members
                for text in (
                    _render_chat(chunk[i], tokenizer, template_time)
                    if conversational
                    else _render_plain(chunk[i], tokenizer)
                )
            ]
            if not texts:
                continue

            # a chat template adds the special tokens itself; verbose=False: no warning about model_max_length, because
            # max_length is applied later
            ids = tokenizer(texts, add_special_tokens=not conversational, verbose=False)["input_ids"]
            for place, i in enumerate(members):
                raw[i] = _RawPair(*ids[3 * place : 3 * place + 3])

        yield from (raw[i] for i in range(len(chunk)))


def _render_plain(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of prompt, prompt + chosen and prompt + rejected."""
    eos: Any = tokenizer.eos_token
    answers = [text if text.endswith(eos) else text + eos for text in (str(pair.chosen), str(pair.rejected))]
    prompt = str(pair.prompt)
    return [prompt, *(prompt + answer for answer in answers)]


def _render_chat(pair: Pair, tokenizer: PreTrainedTokenizerBase, template_time: datetime | None) -> list[str]:
    """The same three texts through the chat template."""
    options: dict[str, Any] = {"tokenize": False, "tools": pair.tools, **(pair.chat_template_kwargs or {})}
    prompt: Any = pair.prompt
    render: Any = partial(render_chat, tokenizer, template_time=template_time)

    # the prompt alone ends where the model would start to answer
    try:
        return [
            render(prompt, add_generation_prompt=True, **options),
            render(prompt + pair.chosen, **options),
            render(prompt + pair.rejected, **options),
        ]
    except Exception as error:  # a template is a program, which may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{pair.where}: the tokenizer's chat template failed: {type(error).__name__}: {reason}"
        ) from error


def _common_prefix(ids: list[int], other: list[int]) -> int:
    """Length of the common prefix of two lists of tokens."""
    if other[: len(ids)] == ids:  # nearly always, and the comparison runs in C
        return len(ids)
    return next((at for at, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))


def _truncate(
    ids: list[int], prompt_length: int, max_length: int, truncation: Literal["keep_start", "keep_end"]
) -> TokenizedSequence:
    excess = max(0, len(ids) - max_length)
    if truncation == "keep_start":
        return TokenizedSequence(np.asarray(ids[:max_length], dtype=np.int32), min(prompt_length, max_length))
    return TokenizedSequence(np.asarray(ids[excess:], dtype=np.int32), max(0, prompt_length - excess))


def _unscored(cut: list[TokenizedSequence], raw: _RawPair, prompt_length: int, max_length: int) -> str | None:
    """Why a pair has nothing to score, or None. The first token of a sequence is never scored: nothing predicts it."""
    for name, sequence, ids in zip(("chosen", "rejected"), cut, (raw.chosen, raw.rejected), strict=True):
        if len(sequence.ids) > max(1, sequence.prompt_length):
            continue

        # did truncation cause it, or was the completion empty from the start?
        if len(ids) > max(1, prompt_length):
            return f"max_length {max_length} leaves nothing of {name} after a prompt of {prompt_length} tokens"
        return f"{name} has no token to score after its prompt of {prompt_length} tokens"
    return None


def _divergence_warning(diverging: list[str], total: int) -> list[str]:
    if not diverging:
        return []

    return [
        f"{len(diverging)} of {total} pairs (first: {diverging[0]}): the tokenised prompt is not a prefix of the "
        "tokenised prompt + completion. The completion starts where they differ, so the model is trained on a context "
        "that differs from the one at inference. End the prompt on a token boundary, or fix the chat template"
    ]


def _flatten(
    sequences: list[TokenizedSequence], kept: list[int], dropped: list[str], warnings: list[str]
) -> TokenizedPairs:
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(sequence.ids) for sequence in sequences], out=offsets[1:])

    # the empty array makes concatenate work without any sequences
    return TokenizedPairs(
        ids=np.concatenate([np.zeros(0, np.int32), *(sequence.ids for sequence in sequences)], dtype=np.int32),
        offsets=offsets,
        prompt_lengths=np.array([sequence.prompt_length for sequence in sequences], dtype=np.int32),
        kept=np.array(kept, dtype=np.int64),
        dropped=dropped,
        warnings=warnings,
    )
