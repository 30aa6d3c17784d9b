"""Two answers of one prompt in one row, [prompt, chosen, rejected]: the prompt goes through the model once.

    row = shared_row([(chosen_ids, chosen_targets, rejected_ids, rejected_targets), …])
    out = model(input_ids=…, position_ids=…, logp_targets=row.targets, logp_source=row.source)
    out.logps[row.expand]                        # the log-probs of all scored tokens, sequence by sequence

What the two sequences of a pair share is the longest common prefix of their token ids, whatever the prompt was. The
chosen sequence is whole; the rejected one is a branch that begins at the position where it departs, so that its
position ids say what it continues (`attention_by_sequence.py`). Pairs without a common prefix are two sequences.

The head's rows differ from the row's: the last shared token predicts the first token of both answers, so its hidden
state is scored for two targets; a token that both answers have at a shared position is scored once and counts in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows

Ints = NDArray[np.int64]
# input ids [T] and targets [T] (what each position predicts, −100: not scored) of the chosen, then of the rejected
PairIds = tuple[NDArray[np.integer], Ints, NDArray[np.integer], Ints]


class SharedRow(NamedTuple):
    """B pairs in one row of N tokens; M different (position, target) are scored, E tokens of the 2B sequences."""

    input_ids: Ints  # [N]
    position_ids: Ints  # [N]
    targets: Ints  # [M] what is scored
    source: Ints  # [M] the place in the row whose hidden state predicts it
    expand: Ints  # [E] which of the M each scored token is: all chosen sequences, then all rejected ones
    segment: Ints  # [E] the sequence of each, 0 … 2B-1


def shared_row(pairs: Sequence[PairIds]) -> SharedRow:
    """Lay out the pairs, one after another."""
    ids: list[NDArray[np.integer]] = []
    positions, targets, source = list[Ints](), list[Ints](), list[Ints]()
    chosen_places, rejected_places = list[Ints](), list[Ints]()  # in targets
    begin = scored = 0
    for chosen, chosen_targets, rejected, rejected_targets in pairs:
        shared = common_prefix(chosen, rejected)
        ids += [chosen, rejected[shared:]]
        positions += [np.arange(len(chosen)), np.arange(shared, len(rejected))]

        # the chosen sequence's own rows
        rows = np.flatnonzero(chosen_targets != IGNORE_INDEX)
        place_of = np.full(len(chosen), -1)
        place_of[rows] = scored + np.arange(len(rows))
        chosen_places.append(place_of[rows])
        targets.append(chosen_targets[rows])
        source.append(begin + rows)
        scored += len(rows)

        # of the rejected sequence: shared rows lie in the chosen one, and those with the same target are scored there
        rows = np.flatnonzero(rejected_targets != IGNORE_INDEX)
        own = np.where(rows < shared, rows, rows + len(chosen) - shared)
        twin = rows[rows < shared]
        same = np.zeros(len(rows), dtype=bool)
        same[: len(twin)] = chosen_targets[twin] == rejected_targets[twin]
        places = np.empty(len(rows), dtype=np.int64)
        places[same] = place_of[rows[same]]
        places[~same] = scored + np.arange(np.count_nonzero(~same))
        rejected_places.append(places)
        targets.append(rejected_targets[rows[~same]])
        source.append(begin + own[~same])
        scored += np.count_nonzero(~same)
        begin += len(chosen) + len(rejected) - shared

    expand = [*chosen_places, *rejected_places]
    return SharedRow(
        input_ids=_joined(ids),
        position_ids=_joined(positions),
        targets=_joined(targets),
        source=_joined(source),
        expand=_joined(expand),
        segment=np.repeat(np.arange(len(expand)), [len(places) for places in expand]),
    )


class SharedBatch(NamedTuple):
    """A padded batch of B pairs as one row, on the batch's device."""

    inputs: dict[str, Tensor]  # the model's arguments
    expand: Tensor  # [E] which of the model's results each scored token is
    rows: ScoredRows  # of the expanded results


def share_prefixes(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None) -> SharedBatch:
    """The row of a batch [2B, T], chosen half first, padded on either side; waits for the device to read its ids.

    Raises:
        ValueError: padding between the tokens of a sequence.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    held = [t.cpu().numpy() for t in (input_ids, labels, mask.bool())]
    sequences = []
    for number, (ids, targets, is_token) in enumerate(zip(*held, strict=True)):
        if np.count_nonzero(np.diff(is_token)) > 2 or (is_token[0] and is_token[-1] and not is_token.all()):
            raise ValueError(
                f"attention_mask: sequence {number} had padding between its tokens, must have it at an end"
            )

        # the last token predicts nothing
        sequences.append((ids[is_token][:-1], targets[is_token][1:]))
    half = len(sequences) // 2
    row = shared_row([(*c, *r) for c, r in zip(sequences[:half], sequences[half:], strict=True)])

    parts = {name: torch.from_numpy(part).to(input_ids.device) for name, part in row._asdict().items()}
    inputs = {"input_ids": parts["input_ids"][None], "position_ids": parts["position_ids"][None]}
    inputs |= {"logp_targets": parts["targets"], "logp_source": parts["source"]}
    counts = torch.from_numpy(np.bincount(row.segment, minlength=2 * half)).to(input_ids.device)
    index = torch.arange(len(row.expand), device=input_ids.device)
    return SharedBatch(inputs, parts["expand"], ScoredRows(index, parts["segment"], counts))


def common_prefix(a: NDArray[np.integer], b: NDArray[np.integer]) -> int:
    """How many first ids two sequences have in common."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _joined(parts: Sequence[NDArray[np.integer]]) -> Ints:
    return np.concatenate(parts).astype(np.int64)
