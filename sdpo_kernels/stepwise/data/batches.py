"""Batches of preference pairs: packed end to end without padding, with or without shared prompts, or padded.

All collators return the same keys, which `Batch` reads. A sequence of T tokens gives T - 1 rows: its last token
predicts nothing, so it is not part of the input. All chosen sequences come first, then the rejected ones in the same
order. A row with shared prompts holds each pair's common first tokens once (`integrations/shared_prefix.py`); what it
scores is put into that same order afterwards, so that nothing else sees the difference. In a padded batch, sequences of
similar length go through the model together, in groups, which avoids most of the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from sdpo_kernels.integrations.cut_weights import is_cut
from sdpo_kernels.integrations.shared_prefix import common_prefix, shared_row
from sdpo_kernels.losses import LossSum
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, sequence_logps
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs, TokenizedSequence
from sdpo_kernels.token_weights import agreement_weights, length_weights

Collator = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

PADDED_GROUP = 4  # sequences per forward of a padded batch


class PairDataset(Dataset):
    """Tokenised pairs, each with its summed reference log-probs, [n, 2] (chosen, rejected); NaN if not scored."""

    def __init__(self, tokens: TokenizedPairs, ref_logps: Tensor) -> None:
        if ref_logps.shape != (len(tokens), 2):
            raise ValueError(f"ref_logps: was of shape {list(ref_logps.shape)}, must be [{len(tokens)}, 2]")
        self.tokens = tokens
        self.ref_logps = ref_logps

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = ~index if index < 0 else index  # a negative index is a filler, see rank_batches.py
        pair = self.tokens[place]
        refs = self.ref_logps[place]
        return {"index": index, "chosen": pair.chosen, "rejected": pair.rejected, "ref_logps": refs}


class LossInputs(NamedTuple):
    """What one batch of B pairs gives the loss."""

    sums: Tensor  # [2B] log-probs, weighted as the loss asks
    weights: Tensor | None  # [B] of the pairs, if the loss weighs them
    aux_loss: Tensor | None  # scalar: of the router of a mixture of experts, if the model computes it


@dataclass(frozen=True)
class Batch:
    """One batch of B pairs, in the form that the model and the loss need."""

    pair_index: Tensor  # [B] indices of the pairs in the dataset
    ref_logps: Tensor  # [2B]
    rows: ScoredRows  # of the rows of all groups, flattened and concatenated
    groups: list[dict[str, Tensor]]  # arguments of the model, which is called once per group
    pairs: int  # B, or 0 for a filler
    unscored: list[int]  # those of pair_index whose reference was not scored
    expand: Tensor | None = None  # with shared prompts: which of the model's results each row is
    shared: int = 0  # tokens that would go through the model once more if prompts were not shared

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Batch:
        """Read a collator's output, after Trainer has moved it to the device."""
        rows = ScoredRows(inputs["rows_index"], inputs["rows_segment"], inputs["rows_counts"])
        names = ("pair_index", "ref_logps", "groups", "pairs", "unscored")
        shared = {name: inputs[name] for name in ("expand", "shared") if name in inputs}
        return cls(rows=rows, **{name: inputs[name] for name in names}, **shared)

    @property
    def n_rows(self) -> int:
        """Rows of both answers of all pairs, padding included. Shared prompts count twice: speeds stay comparable."""
        return sum(group["input_ids"].numel() for group in self.groups) + self.shared

    def logps(self, model: torch.nn.Module, ld_alpha: float | None = None) -> Tensor:
        """Summed log-probs [2B] under `model`, which must have its fused head attached.

        If `ld_alpha` is given, tokens beyond the shorter length of a pair are weighted by it.
        """
        return self._sums(self._outputs(model)["logps"], ld_alpha)

    def logps_for(self, model: torch.nn.Module, loss: LossSum) -> LossInputs:
        """The inputs of `loss`."""
        if not loss.weighs_pairs:
            found = self._outputs(model)
            return LossInputs(self._sums(found["logps"], loss.ld_alpha), None, found.get("aux_loss"))

        # the weights come from the same forward as the log-probs
        found = self._outputs(model, "log_sum_sq_probs")
        weights = agreement_weights(found["logps"], found["log_sum_sq_probs"], self.rows)
        return LossInputs(self._sums(found["logps"], loss.ld_alpha), weights, found.get("aux_loss"))

    def _sums(self, logps: Tensor, ld_alpha: float | None) -> Tensor:
        weights = None if ld_alpha is None else length_weights(self.rows, ld_alpha)
        return sequence_logps(logps, self.rows, weights)

    def _outputs(self, model: torch.nn.Module, *extras: str) -> dict[str, Tensor]:
        """Log-probs and `extras` [N] of the rows of all groups, concatenated; `aux_loss` if the model computes it."""
        options: dict[str, Any] = {"logp_outputs": extras} if extras else {}

        # with several groups, the head finds the rows of each
        rows = self.rows if len(self.groups) == 1 else None
        if self.expand is not None:
            targets = self.groups[0]["logp_targets"]
            rows = ScoredRows.every(len(targets), targets.device)

        missing = self._missing_groups(model)  # before any forward, while all ranks are at the same place

        # each group is a forward of its own; the caller sees one concatenated result, as with a packed batch
        parts = [model(**group, logp_rows=rows, use_cache=False, **options) for group in self.groups]
        found = {name: torch.cat([part[name] for part in parts]) for name in ("logps", *extras)}

        # each forward and backward of a cut model needs all ranks: the first group goes through it again, for nothing
        for _ in range(missing):
            filler = model(**self.groups[0], logp_rows=rows, use_cache=False, **options)
            found["logps"] = found["logps"] + 0 * filler["logps"].sum()
        if self.expand is not None:
            found = {name: values.index_select(0, self.expand) for name, values in found.items()}
        if parts[0].aux_loss is not None:
            found["aux_loss"] = self._mean_aux_loss([part.aux_loss for part in parts])
        return found

    def _missing_groups(self, model: torch.nn.Module) -> int:
        """How many groups more another rank has, if the model is cut; packed batches have one everywhere."""
        if "attention_mask" not in self.groups[0] or ranks.world_size() == 1 or not is_cut(model):
            return 0
        return ranks.largest(len(self.groups)) - len(self.groups)

    def _mean_aux_loss(self, losses: list[Tensor]) -> Tensor:
        """The mean over the groups, each with the weight of its tokens without padding."""
        if len(losses) == 1:
            return losses[0]
        tokens = torch.stack([group["attention_mask"].sum() for group in self.groups]).to(losses[0])
        return torch.stack(losses) @ (tokens / tokens.sum())


def collate_packed(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All 2B sequences in one row [1, N]; `position_ids` restart at each sequence, and there is no attention mask."""
    sequences = _sequences(examples)
    lengths = np.array([len(s.ids) - 1 for s in sequences])
    ids = np.concatenate([s.ids[:-1] for s in sequences])
    targets = np.concatenate([_targets(s) for s in sequences])

    # restarting positions are how the attention tells the sequences apart
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)

    group = {"input_ids": ids[None], "position_ids": positions[None], "logp_targets": targets[None]}
    segment = np.repeat(np.arange(len(sequences)), lengths)
    return _batch(examples, [group], *_scored([group], segment))


def collate_shared(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each pair as [common first tokens, rest of chosen, rest of rejected], all in one row [1, N]."""
    pairs = [(example["chosen"], example["rejected"]) for example in examples]
    row = shared_row([(c.ids[:-1], _targets(c), r.ids[:-1], _targets(r)) for c, r in pairs])
    group = {
        "input_ids": row.input_ids[None],
        "position_ids": row.position_ids[None],
        "logp_targets": row.targets,
        "logp_source": row.source,
    }
    batch = _batch(examples, [group], np.arange(len(row.segment)), row.segment)
    tokens = sum(len(c.ids) + len(r.ids) - 2 for c, r in pairs)
    return batch | {"expand": _tensor(row.expand), "shared": tokens - len(row.input_ids)}


def shared_tokens(tokens: TokenizedPairs) -> int:
    """How many tokens of the pairs go through the model once instead of twice if prompts are shared."""
    return sum(
        common_prefix(tokens[i].chosen.ids[:-1], tokens[i].rejected.ids[:-1])  # the last token predicts nothing
        for i in range(len(tokens))
    )


# those that make one row of everything, whatever the lengths
PACKED_COLLATORS = (collate_packed, collate_shared)


def make_collate_padded(pad_token_id: int) -> Collator:
    """A collator for groups [g, T] of sequences of similar length, padded on the right, with an attention mask."""

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sequences = _sequences(examples)
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))

        # a row's segment is the number of its sequence before sorting, so sums come out in the order of the batch
        groups, segments = [], []
        for first in range(0, len(by_length), PADDED_GROUP):
            members = by_length[first : first + PADDED_GROUP]
            groups.append(_pad([sequences[i] for i in members], pad_token_id))
            segments.append(np.repeat(members, groups[-1]["input_ids"].shape[1]))

        return _batch(examples, groups, *_scored(groups, np.concatenate(segments)))

    return collate


def _pad(sequences: list[TokenizedSequence], pad_token_id: int) -> dict[str, np.ndarray]:
    def padded(rows: list[np.ndarray], value: int) -> np.ndarray:
        return pad_sequence([_tensor(row) for row in rows], batch_first=True, padding_value=value).numpy()

    inputs = [s.ids[:-1] for s in sequences]
    return {
        "input_ids": padded(inputs, pad_token_id),
        "attention_mask": padded([np.ones_like(ids) for ids in inputs], 0),
        # IGNORE_INDEX and not the padding token, which may also occur in a text
        "logp_targets": padded([_targets(s) for s in sequences], IGNORE_INDEX),
    }


def _sequences(examples: Sequence[dict[str, Any]]) -> list[TokenizedSequence]:
    return [example[side] for side in ("chosen", "rejected") for example in examples]


def _targets(sequence: TokenizedSequence) -> np.ndarray:
    """[T - 1]: the next token if it is part of the completion, else -100."""
    targets = sequence.ids[1:].astype(np.int64)
    targets[: max(0, sequence.prompt_length - 1)] = IGNORE_INDEX
    return targets


def _scored(groups: list[dict[str, np.ndarray]], segment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that have a target, of the rows of all groups, concatenated, and the sequence of each."""
    index = np.flatnonzero(np.concatenate([group["logp_targets"].ravel() for group in groups]) != IGNORE_INDEX)
    return index, segment[index]


def _batch(
    examples: Sequence[dict[str, Any]], groups: list[dict[str, np.ndarray]], index: np.ndarray, segment: np.ndarray
) -> dict[str, Any]:
    """A collator's output for `groups`; `index` are the scored rows, `segment` the sequence of each."""
    refs = torch.stack([example["ref_logps"] for example in examples])  # [B, 2]

    # a filler has a negative index; accelerate takes the batch size from the first tensor, so pair_index comes first
    places = [example["index"] for example in examples]
    pair_index = torch.tensor([max(i, ~i) for i in places])
    return {
        "pair_index": pair_index,
        "pairs": sum(i >= 0 for i in places),
        "unscored": pair_index[refs.isnan().any(1)].tolist(),  # found here: later it would wait for the device
        "ref_logps": refs.T.reshape(-1),
        "rows_index": _tensor(index),
        "rows_segment": _tensor(segment),
        "rows_counts": _tensor(np.bincount(segment, minlength=2 * len(examples))),
        "groups": [{name: _tensor(array) for name, array in group.items()} for group in groups],
    }


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
