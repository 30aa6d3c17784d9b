"""Batches of preference pairs: packed end to end without padding, or padded where a model cannot keep them apart.

Both collators make the same keys; `Batch` reads them. A sequence of T tokens gives T − 1 rows: its last token predicts
nothing, so it is left out of the input. All chosen sequences come first, then the rejected ones in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows
from sdpo_kernels.stepwise.tokenize import TokenizedPairs, TokenizedSequence

Collator = Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]


class PairDataset(Dataset):
    """Tokenised pairs with the reference's summed log-probs [n, 2] (chosen, rejected) beside them."""

    def __init__(self, tokens: TokenizedPairs, ref_logps: Tensor) -> None:
        if ref_logps.shape != (len(tokens), 2):
            raise ValueError(f"ref_logps: was of shape {list(ref_logps.shape)}, must be [{len(tokens)}, 2]")
        self.tokens = tokens
        self.ref_logps = ref_logps

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.tokens[index]
        return {"index": index, "chosen": pair.chosen, "rejected": pair.rejected, "ref_logps": self.ref_logps[index]}


@dataclass(frozen=True)
class Batch:
    """One batch of B pairs as a model and a loss want it."""

    pair_index: Tensor  # [B] places in the data set
    ref_logps: Tensor  # [2B]
    rows: ScoredRows  # of the flattened input
    model_inputs: dict[str, Tensor]

    @classmethod
    def of(cls, inputs: dict[str, Tensor]) -> Batch:
        """Read what a collator made, after Trainer has moved it to the device."""
        rows = ScoredRows(inputs["rows_index"], inputs["rows_segment"], inputs["rows_counts"])
        names = ("input_ids", "position_ids", "attention_mask", "logp_targets")
        model_inputs = {name: inputs[name] for name in names if name in inputs}
        return cls(inputs["pair_index"], inputs["ref_logps"], rows, model_inputs)

    def logps(self, model: torch.nn.Module) -> Tensor:
        """Summed log-probs [2B] under `model`, which has its fused head attached."""
        from sdpo_kernels.dpo import sequence_logps

        token_logps = model(**self.model_inputs, logp_rows=self.rows, use_cache=False).logps
        return sequence_logps(token_logps, self.rows)


def collate_packed(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """One row [1, N] that holds all 2B sequences; `position_ids` restart with each; no attention mask."""
    sequences = _sequences(examples)
    lengths = np.array([len(s.ids) - 1 for s in sequences])
    ids = np.concatenate([s.ids[:-1] for s in sequences])
    targets = np.concatenate([_targets(s) for s in sequences])
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    index = np.flatnonzero(targets != IGNORE_INDEX)
    segment = np.repeat(np.arange(len(sequences)), lengths)[index]
    return {
        **_common(examples, index, segment, len(sequences)),
        "input_ids": _tensor(ids)[None],
        "position_ids": _tensor(positions)[None],
        "logp_targets": _tensor(targets)[None],
    }


def make_collate_padded(pad_token_id: int) -> Collator:
    """[2B, T] padded on the right to the longest sequence of the batch, with an attention mask."""

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = _sequences(examples)
        width = max(len(s.ids) for s in sequences) - 1
        ids = np.full((len(sequences), width), pad_token_id)
        targets = np.full((len(sequences), width), IGNORE_INDEX)
        mask = np.zeros((len(sequences), width), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            length = len(sequence.ids) - 1
            ids[row, :length] = sequence.ids[:-1]
            targets[row, :length] = _targets(sequence)
            mask[row, :length] = 1
        index = np.flatnonzero(targets != IGNORE_INDEX)
        return {
            **_common(examples, index, index // width, len(sequences)),
            "input_ids": _tensor(ids),
            "attention_mask": _tensor(mask),
            "logp_targets": _tensor(targets),
        }

    return collate


def _sequences(examples: Sequence[dict[str, Any]]) -> list[TokenizedSequence]:
    return [example[side] for side in ("chosen", "rejected") for example in examples]


def _targets(sequence: TokenizedSequence) -> np.ndarray:
    """[T − 1]: the next token where that is part of the completion, else −100."""
    targets = sequence.ids[1:].astype(np.int64)
    targets[: max(0, sequence.prompt_length - 1)] = IGNORE_INDEX
    return targets


def _common(
    examples: Sequence[dict[str, Any]], index: np.ndarray, segment: np.ndarray, n_sequences: int
) -> dict[str, Tensor]:
    refs = torch.stack([example["ref_logps"] for example in examples])  # [B, 2]
    return {
        "pair_index": torch.tensor([example["index"] for example in examples]),  # first: its length is the batch size
        "ref_logps": refs.T.reshape(-1),
        "rows_index": _tensor(index),
        "rows_segment": _tensor(segment),
        "rows_counts": _tensor(np.bincount(segment, minlength=n_sequences)),
    }


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
