"""Tokenises preference pairs exactly like TRL 1.16's DPOTrainer, into flat arrays.

    tokens = tokenize_pairs(pairs, tokenizer, max_length=1024, truncation="keep_start")
    tokens[0].chosen.ids, tokens[0].chosen.prompt_length        # int32 array, number of prompt tokens in it

The prompt and prompt + completion are tokenised separately; the completion starts where the two first differ. For plain
strings the tokenizer's EOS token is appended, unless it is there. Conversations go through the chat template, with the
generation prompt after the prompt; an assistant's message at the end of the prompt is continued by the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.units import counted
from sdpo_kernels.stepwise.data.pair_notes import NO_END, NO_PREFIX, PairNotes
from sdpo_kernels.stepwise.data.pairs import Pair, refuse_bad_rows
from sdpo_kernels.stepwise.data.render import RenderedChat, RowError, chat_ids, ended, plain_ids, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END = 4  # tokens at the end of a conversation among which its end token is, before line breaks
_CHUNK = 250  # pairs per call of the tokenizer, which processes the texts of a call in parallel


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
    cut             [n] bool, whether truncation cut the chosen or the rejected sequence
    lost            [n] int64, scored tokens of the pair that truncation cut off
    dropped         'file:line: why' for each pair with nothing to score, with equal sequences, or not rendered
    dropped_cut     how many of the dropped pairs were cut
    dropped_lost    how many scored tokens those had
    warnings        messages for the user; not part of `content_hash`
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    kept: NDArray[np.int64]
    cut: NDArray[np.bool_]
    lost: NDArray[np.int64]
    dropped: list[str]
    dropped_cut: int
    dropped_lost: int
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

    @property
    def scored(self) -> NDArray[np.int64]:
        """Number of scored tokens of each sequence, [n, 2]; the first token of a sequence is never scored."""
        return self.lengths - np.maximum(self.prompt_lengths, 1).reshape(-1, 2)

    @property
    def cut_pairs(self) -> int:
        """How many pairs truncation cut, those included that were dropped for it."""
        return int(self.cut.sum()) + self.dropped_cut

    @property
    def lost_tokens(self) -> int:
        """How many scored tokens truncation cost, those of pairs included that were dropped for it."""
        return int(self.lost.sum()) + self.dropped_lost

    @property
    def whole_tokens(self) -> int:
        """How many scored tokens there were before truncation."""
        return int(self.scored.sum()) + self.lost_tokens

    def take(self, indices: NDArray[np.int64], dropped_from: TokenizedPairs | None = None) -> TokenizedPairs:
        """The pairs at `indices`, in that order, without warnings; the dropped pairs are those of `dropped_from`."""
        sequences = [sequence for index in indices for sequence in self[int(index)]]
        chosen = np.asarray(indices, dtype=np.int64)
        return TokenizedPairs(
            **_flat(sequences),
            kept=self.kept[chosen],
            cut=self.cut[chosen],
            lost=self.lost[chosen],
            dropped=list(dropped_from.dropped) if dropped_from else [],
            dropped_cut=dropped_from.dropped_cut if dropped_from else 0,
            dropped_lost=dropped_from.dropped_lost if dropped_from else 0,
            warnings=[],
        )

    @staticmethod
    def concatenate(parts: Sequence[TokenizedPairs]) -> TokenizedPairs:
        """The pairs of all `parts`, in order. `kept` counts from 0, as there is no common list it could refer to."""
        sequences = [
            sequence for part in parts for pair in map(part.__getitem__, range(len(part))) for sequence in pair
        ]
        return TokenizedPairs(
            **_flat(sequences),
            kept=np.arange(len(sequences) // 2),
            cut=np.concatenate([np.zeros(0, np.bool_), *(part.cut for part in parts)]),
            lost=np.concatenate([np.zeros(0, np.int64), *(part.lost for part in parts)]),
            dropped=[text for part in parts for text in part.dropped],
            dropped_cut=sum(part.dropped_cut for part in parts),
            dropped_lost=sum(part.dropped_lost for part in parts),
            warnings=[],
        )

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
    chat: RenderedChat | None = None  # None: plain text


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: Literal["keep_start", "keep_end"],
    drop_equal: bool = True,
    on_bad_row: Literal["error", "skip"] = "error",
    template_time: datetime | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> TokenizedPairs:
    """Tokenise `pairs`. `template_time` is the time that a chat template reads; None: now. `on_progress` is called
    now and then with the number of pairs done, last with all of them.

    1. Tokenise prompt, prompt + chosen and prompt + rejected of each pair.
    2. The prompt ends where the three first differ.
    3. Cut both sequences to `max_length` tokens: keep their start or their end. No end token is added to a cut one.
    4. Drop and list the pair if either sequence has no scored token left, if both are equal (`drop_equal`), or if the
       chat template fails or drops a message (`on_bad_row` 'skip').

    Raises UserError if the tokenizer has no EOS token but a pair is plain text, if it has no chat template but a pair
    is a conversation, if the template fails or drops a message (`on_bad_row` 'error'), and if no pair at all is left.
    """
    _check_tokenizer(pairs, tokenizer)

    # with chat templates another token than EOS may end a turn
    ends = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends |= set(tokenizer.all_special_ids)

    made = _Made()
    notes = PairNotes()
    refused: list[str] = []  # by the chat template
    for index, raw in enumerate(_raw_pairs(pairs, tokenizer, template_time)):
        pair = pairs[index]
        if (index + 1) % _CHUNK == 0 or index + 1 == len(pairs):
            on_progress(index + 1)
        if isinstance(raw, RowError):
            refused.append(str(raw))
            made.dropped.append(str(raw))
            continue

        # both sides share one prompt length, as in TRL
        prompt_length = min(_common_prefix(raw.prompt, raw.chosen), _common_prefix(raw.prompt, raw.rejected))
        notes.look_at(pair, raw.chat)
        if prompt_length < len(raw.prompt):
            notes.add(pair, NO_PREFIX)
        if raw.chat is not None and not all(ends & {*ids[-_END:]} for ids in raw[1:3]):
            notes.add(pair, NO_END)

        whole = [TokenizedSequence(np.asarray(ids, dtype=np.int32), prompt_length) for ids in raw[1:3]]
        cut = [_truncate(sequence, max_length, truncation) for sequence in whole]
        reason = _unscored(cut, whole, max_length)
        if reason is None and drop_equal:
            reason = _equal(cut, whole, max_length)
        made.add(index, whole, cut, reason and f"{pair.where}: {reason}")

    if on_bad_row == "error":
        refuse_bad_rows(refused, len(pairs))
    if pairs and not made.kept:
        cause = f"max_length: was {max_length}, which leaves none" if made.dropped_cut else "nothing to learn in any"
        raise UserError(f"{cause} of {counted(len(pairs), 'pair')}; first: {made.dropped[0]}")
    return made.tokenized(notes.warnings(len(pairs)))


class _Made:
    """Collects pairs as they are tokenised, see TokenizedPairs."""

    def __init__(self) -> None:
        self.sequences: list[TokenizedSequence] = []
        self.kept: list[int] = []
        self.cut: list[bool] = []
        self.lost: list[int] = []
        self.dropped: list[str] = []
        self.dropped_cut = 0
        self.dropped_lost = 0

    def add(
        self, index: int, whole: list[TokenizedSequence], cut: list[TokenizedSequence], drop_reason: str | None
    ) -> None:
        """Add a pair before and after truncation, or drop it."""
        is_cut = _is_cut(cut, whole)
        scored = sum(map(_scored, whole))

        # truncation costs a pair that is dropped for it all its tokens
        if drop_reason:
            self.dropped.append(drop_reason)
            self.dropped_cut += is_cut
            self.dropped_lost += scored if is_cut else 0
        else:
            self.kept.append(index)
            self.sequences += cut
            self.cut.append(is_cut)
            self.lost.append(scored - sum(map(_scored, cut)))

    def tokenized(self, warnings: list[str]) -> TokenizedPairs:
        """All that was added."""
        return TokenizedPairs(
            **_flat(self.sequences),
            kept=np.array(self.kept, dtype=np.int64),
            cut=np.array(self.cut, dtype=np.bool_),
            lost=np.array(self.lost, dtype=np.int64),
            dropped=self.dropped,
            dropped_cut=self.dropped_cut,
            dropped_lost=self.dropped_lost,
            warnings=warnings,
        )


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
) -> Iterable[_RawPair | RowError]:
    """Token ids of each pair, in order, or why it has none; the tokenizer gets `_CHUNK` pairs at a time."""
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        raw: dict[int, _RawPair | RowError] = {}

        # the two kinds need different options of the tokenizer, so a call for each
        plain = [i for i, pair in enumerate(chunk) if not pair.is_conversational]
        ids = plain_ids([text for i in plain for text in _plain_texts(chunk[i], tokenizer)], tokenizer)
        for place, i in enumerate(plain):
            prompt, chosen, rejected = ids[3 * place : 3 * place + 3]
            raw[i] = _RawPair(prompt, chosen, rejected)

        chats: dict[int, RenderedChat] = {}
        for i, pair in enumerate(chunk):
            if pair.is_conversational:
                try:
                    chats[i] = _rendered(pair, tokenizer, template_time)
                except RowError as error:
                    raw[i] = error
        ids = chat_ids([text for chat in chats.values() for text in (chat.prompt, *chat.answers)], tokenizer)
        for place, (i, chat) in enumerate(chats.items()):
            prompt, chosen, rejected = ids[3 * place : 3 * place + 3]
            raw[i] = _RawPair(prompt, chosen, rejected, chat)

        yield from (raw[i] for i in range(len(chunk)))


def _plain_texts(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of prompt, prompt + chosen and prompt + rejected."""
    prompt = str(pair.prompt)
    return [prompt, *(prompt + ended(str(answer), tokenizer) for answer in (pair.chosen, pair.rejected))]


def _rendered(pair: Pair, tokenizer: PreTrainedTokenizerBase, template_time: datetime | None) -> RenderedChat:
    """The same three texts through the chat template."""
    prompt: Any = pair.prompt
    answers: dict[str, Any] = {"chosen": pair.chosen, "rejected": pair.rejected}
    options = {"tools": pair.tools, **(pair.chat_template_kwargs or {})}
    return render_chat(prompt, answers, tokenizer, options, pair.where, template_time=template_time)


def _common_prefix(ids: list[int], other: list[int]) -> int:
    """Length of the common prefix of two lists of tokens."""
    if other[: len(ids)] == ids:  # nearly always, and the comparison runs in C
        return len(ids)
    return next((at for at, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))


def _truncate(
    whole: TokenizedSequence, max_length: int, truncation: Literal["keep_start", "keep_end"]
) -> TokenizedSequence:
    """`whole` cut to `max_length` tokens; only what was there is kept, so a cut answer is not taught to end."""
    ids, prompt_length = whole
    excess = max(0, len(ids) - max_length)
    if truncation == "keep_start":
        return TokenizedSequence(ids[:max_length], min(prompt_length, max_length))
    return TokenizedSequence(ids[excess:], max(0, prompt_length - excess))


def _scored(sequence: TokenizedSequence) -> int:
    """How many tokens are scored. The first token of a sequence never is: nothing predicts it."""
    return max(0, len(sequence.ids) - max(1, sequence.prompt_length))


def _unscored(cut: list[TokenizedSequence], whole: list[TokenizedSequence], max_length: int) -> str | None:
    """Why a pair has nothing to score, or None."""
    for name, sequence, before in zip(("chosen", "rejected"), cut, whole, strict=True):
        if _scored(sequence):
            continue

        # did truncation cause it, or was the completion empty from the start?
        if _scored(before):
            return f"max_length {max_length} leaves nothing of {name} after a prompt of {before.prompt_length} tokens"
        return f"{name} has no token to score after its prompt of {before.prompt_length} tokens"
    return None


def _is_cut(cut: list[TokenizedSequence], whole: list[TokenizedSequence]) -> bool:
    return any(len(after.ids) < len(before.ids) for after, before in zip(cut, whole, strict=True))


def _equal(cut: list[TokenizedSequence], whole: list[TokenizedSequence], max_length: int) -> str | None:
    """Why chosen and rejected are the same tokens, or None if they differ."""
    if not np.array_equal(cut[0].ids, cut[1].ids):
        return None
    if _is_cut(cut, whole):
        return f"max_length {max_length} leaves equal tokens of chosen and rejected; the pair teaches nothing"
    return "chosen and rejected are equal tokens; the pair teaches nothing"


def _flat(sequences: Sequence[TokenizedSequence]) -> dict[str, Any]:
    """`ids`, `offsets` and `prompt_lengths` of sequences."""
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(sequence.ids) for sequence in sequences], out=offsets[1:])

    # the empty array makes concatenate work without any sequences
    return {
        "ids": np.concatenate([np.zeros(0, np.int32), *(sequence.ids for sequence in sequences)], dtype=np.int32),
        "offsets": offsets,
        "prompt_lengths": np.array([sequence.prompt_length for sequence in sequences], dtype=np.int32),
    }
