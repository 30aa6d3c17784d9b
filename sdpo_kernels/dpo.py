"""The fused loss: log-probs of policy and reference through one primitive, then a pair loss on [B]-sized tensors.

    out = fused_linear_dpo(hidden, weight, labels, ref_logps=cached, beta=0.1)
    out.loss.backward()

Every batch holds the chosen sequences first and the rejected ones, in the same order, after them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdpo_kernels import pair_op
from sdpo_kernels.logps import linear_logps
from sdpo_kernels.losses import PairLogps, check_loss, pair_loss
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, segment_sum, sequence_of_rows


class DPOOutput(NamedTuple):
    """`loss` carries the gradient; the rest is detached, [B] float32 (float64 for float64 inputs)."""

    loss: Tensor  # scalar, mean over pairs
    chosen_logps: Tensor  # sums over scored tokens, nats
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_rewards: Tensor  # beta · (policy − reference)
    rejected_rewards: Tensor
    margins: Tensor  # chosen_rewards − rejected_rewards
    accuracy: Tensor  # 1 where the chosen reward is above the rejected one, else 0


def fused_linear_dpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    rows: ScoredRows | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    **loss_options: float,
) -> DPOOutput:
    """DPO's loss of B pairs straight from hidden states, without logits of size tokens × vocab.

    Args:
        hidden: [2B, T, H], chosen half first; or packed [N, H] with `cu_seqlens`.
        weight: [V, H], the head; `bias`: [V].
        labels: [2B, T], packed [N], int64; `labels[:, t]` is what `hidden[:, t]` predicts (already shifted); −100 is
            not scored.
        cu_seqlens: [2B+1] int, borders of the packed sequences, from 0 to N.
        rows: the scored rows, where they are known (see `ScoredRows`): then nothing synchronises with the host.
        ref_logps: [2B] the reference's summed log-probs; or
        ref_hidden, ref_weight, ref_bias: the reference's hidden states (of hidden's shape, its own H) and head, scored
            here without gradient; where ref_weight is weight itself, in one pass with the policy.
        temperature, logit_scale, softcap, backend, stash_bytes: as in `linear_logps`.
        beta: above 0. loss_type: a name of `losses.loss_names()`; its options as further keywords.

    Raises:
        ValueError: naming the argument, what it was and what it should be. A pair without a scored token is an error.

    Example:
        >>> import torch
        >>> from sdpo_kernels import fused_linear_dpo
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(100, 8)
        >>> labels = torch.tensor([[4, 5, -100], [6, 7, 8]])
        >>> fused_linear_dpo(hidden, weight, labels, ref_hidden=hidden, ref_weight=weight).loss
        tensor(0.6931)
    """
    check_loss(loss_type, beta, **loss_options)
    n_sequences = _check_batch(hidden, labels, weight.shape[0], cu_seqlens, rows)
    _check_reference(hidden, weight, n_sequences, ref_logps, ref_hidden, ref_weight, ref_bias)
    if rows is None and not torch.compiler.is_compiling():
        rows = ScoredRows.from_labels(labels, cu_seqlens)
    summed = (
        _all_rows(labels, cu_seqlens) if rows is None else rows
    )  # under compile the op itself finds the scored ones
    _check_counts(summed.counts)
    targets = labels.reshape(-1)
    options: dict[str, Any] = {
        "rows": rows, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "backend": backend,
    }  # fmt: skip

    if ref_hidden is not None:
        ref_hidden = ref_hidden.reshape(-1, ref_hidden.shape[-1])
    same_head = (
        ref_weight is weight and ref_bias is bias and ref_hidden is not None and ref_hidden.dtype == hidden.dtype
    )
    if ref_logps is None and not same_head:
        assert ref_hidden is not None
        assert ref_weight is not None
        with torch.no_grad():
            ref = linear_logps(ref_hidden, ref_weight, targets, bias=ref_bias, stash_bytes=0, **options)
            ref_logps = sequence_logps(ref.logps, summed)
    policy = linear_logps(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets, bias=bias, stash_bytes=stash_bytes,
        ref_hidden=ref_hidden if same_head else None, **options,
    )  # fmt: skip
    logps = policy.logps
    if policy.ref_logps is not None:
        ref_logps = sequence_logps(policy.ref_logps, summed)
    assert ref_logps is not None
    settings: dict[str, Any] = {"beta": beta, "loss_type": loss_type, **loss_options}
    if (chosen := pair_op.serves(backend, logps, n_sequences // 2, loss_type)) is not None:
        return _epilogue(logps, summed, ref_logps, summed.counts, chosen, **settings)
    return _autograd_output(sequence_logps(logps, summed), ref_logps, summed.counts, **settings)


class FusedLinearDPOLoss(nn.Module):
    """`fused_linear_dpo` with its settings held, for trainers that keep a loss as a module.

    >>> import torch
    >>> from sdpo_kernels import FusedLinearDPOLoss
    >>> loss = FusedLinearDPOLoss(beta=0.2, loss_type="sigmoid", label_smoothing=0.1)
    >>> hidden, weight, labels = torch.zeros(2, 3, 8), torch.zeros(100, 8), torch.ones(2, 3, dtype=torch.int64)
    >>> out = loss(hidden, weight, labels, ref_logps=torch.zeros(2))
    >>> out.margins
    tensor([0.])
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        backend: str = "auto",
        stash_bytes: int | str = "auto",
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        **loss_options: float,
    ) -> None:
        super().__init__()
        check_loss(loss_type, beta, **loss_options)
        self.settings: dict[str, Any] = {
            "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "backend": backend,
            "stash_bytes": stash_bytes, "beta": beta, "loss_type": loss_type, **loss_options,
        }  # fmt: skip

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **inputs: Any) -> DPOOutput:
        """Tensors as in `fused_linear_dpo`: cu_seqlens, rows, bias, ref_logps or ref_hidden, ref_weight, ref_bias."""
        clash = sorted(inputs.keys() & self.settings.keys())
        if clash:
            raise ValueError(f"{clash[0]}: was given to the call, must be given to FusedLinearDPOLoss(...) itself")
        return fused_linear_dpo(hidden, weight, labels, **self.settings, **inputs)

    def extra_repr(self) -> str:
        """The settings, as print(module) shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def sequence_logps(logps: Tensor, rows: ScoredRows) -> Tensor:
    """Sum per-token `logps` [N] over the scored rows of each sequence into [S], in logps' dtype.

    The sum is taken in float64, so that packed and padded batches agree and long sequences lose nothing.
    """
    scored = logps.index_select(0, rows.index).double()
    return segment_sum(scored, rows.segment, rows.counts.shape[0]).to(logps.dtype)


def pair_output(
    policy_logps: Tensor,
    ref_logps: Tensor,
    counts: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    **loss_options: float,
) -> DPOOutput:
    """Loss and metrics from summed log-probs: policy [2B], reference [2B], counts of scored tokens [2B]."""
    check_loss(loss_type, beta, **loss_options)
    if policy_logps.dim() != 1 or policy_logps.shape[0] < 2 or policy_logps.shape[0] % 2:
        raise ValueError(f"policy_logps: was of shape {list(policy_logps.shape)}, must be [2B], chosen half first")
    for name, tensor in {"ref_logps": ref_logps, "counts": counts}.items():
        if tensor.shape != policy_logps.shape:
            raise ValueError(
                f"{name}: was of shape {list(tensor.shape)}, must be {list(policy_logps.shape)} as policy_logps is"
            )
        _check_device(name, tensor, policy_logps)
    settings: dict[str, Any] = {"beta": beta, "loss_type": loss_type, **loss_options}
    if (chosen := pair_op.serves("auto", policy_logps, policy_logps.shape[0] // 2, loss_type)) is not None:
        return _epilogue(policy_logps, None, ref_logps, counts, chosen, **settings)
    return _autograd_output(policy_logps, ref_logps, counts, **settings)


def _epilogue(
    logps: Tensor,
    rows: ScoredRows | None,
    ref_logps: Tensor,
    counts: Tensor,
    backend: str,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float = 0.0,
) -> DPOOutput:
    """All in one op, from log-probs of tokens with `rows`, else from sums."""
    ref_logps = ref_logps.detach().to(logps.dtype)
    loss, sums, metrics = pair_op.pair_epilogue(
        logps, rows, ref_logps, counts, backend=backend, loss_type=loss_type, beta=beta, smoothing=label_smoothing
    )
    return DPOOutput(loss, *sums.chunk(2), *ref_logps.chunk(2), *metrics.unbind(0))


def _autograd_output(
    policy_logps: Tensor, ref_logps: Tensor, counts: Tensor, *, beta: float, loss_type: str, **loss_options: float
) -> DPOOutput:
    """The same from sums, for every loss, by autograd through losses.py."""
    chosen, rejected = policy_logps.chunk(2)
    ref_chosen, ref_rejected = ref_logps.detach().to(policy_logps.dtype).chunk(2)
    pair = PairLogps(chosen, rejected, ref_chosen, ref_rejected, *counts.chunk(2))
    loss = pair_loss(loss_type, pair, beta, **loss_options).mean()
    chosen_rewards = beta * pair.chosen_logratio.detach()
    rejected_rewards = beta * pair.rejected_logratio.detach()
    margins = chosen_rewards - rejected_rewards
    accuracy = (chosen_rewards > rejected_rewards).to(margins.dtype)
    return DPOOutput(
        loss,
        chosen.detach(),
        rejected.detach(),
        ref_chosen,
        ref_rejected,
        chosen_rewards,
        rejected_rewards,
        margins,
        accuracy,
    )


def _all_rows(labels: Tensor, cu_seqlens: Tensor | None) -> ScoredRows:
    """Every row, scored or not (its log-prob is 0 then), with true counts: shapes that do not depend on data."""
    n_sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segments = sequence_of_rows(labels, cu_seqlens)
    counts = segment_sum((labels.reshape(-1) != IGNORE_INDEX).long(), segments, n_sequences)
    return ScoredRows(torch.arange(segments.shape[0], device=labels.device), segments, counts)


def _check_batch(
    hidden: Tensor, labels: Tensor, n_columns: int, cu_seqlens: Tensor | None, rows: ScoredRows | None
) -> int:
    """Raise ValueError where the batch does not fit together; return its number of sequences, 2B."""
    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise ValueError(
                f"hidden: was of shape {list(hidden.shape)}, must be [2B, T, H], or [N, H] with cu_seqlens"
            )
        n_sequences = hidden.shape[0]
    else:
        if hidden.dim() != 2:
            raise ValueError(f"hidden: was of shape {list(hidden.shape)}, must be packed [N, H] as cu_seqlens is given")
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens: was {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}, must be int [2B+1]"
            )
        n_sequences = cu_seqlens.shape[0] - 1
        _check_borders(cu_seqlens, hidden.shape[0])
    if n_sequences < 2 or n_sequences % 2:
        name = "hidden" if cu_seqlens is None else "cu_seqlens"
        raise ValueError(
            f"{name}: was of {n_sequences} sequences, must be an even number, chosen half first, at least 2"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: was {labels.dtype} of shape {list(labels.shape)}, "
            f"must be torch.int64 of shape {list(hidden.shape[:-1])}"
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels >= n_columns)]
        if wrong.numel():
            raise ValueError(
                f"labels: held {wrong[0].item()}, must be in [0, {n_columns}) or {IGNORE_INDEX} (not scored)"
            )
    if rows is not None and (rows.counts.shape != (n_sequences,) or rows.segment.shape != rows.index.shape):
        raise ValueError(
            f"rows: was of {rows.counts.shape[0]} sequences, {rows.index.shape[0]} rows and "
            f"{rows.segment.shape[0]} segments, "
            f"must be of {n_sequences} sequences and a segment for every row"
        )
    if rows is not None and rows.segment.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = rows.segment[(rows.segment < 0) | (rows.segment >= n_sequences)]
        if outside.numel():
            raise ValueError(f"rows: its segment held {outside[0].item()}, must be in [0, {n_sequences})")
    return n_sequences


def _check_borders(cu_seqlens: Tensor, n_rows: int) -> None:
    """On CPU, cu_seqlens must ascend from 0 to N; on CUDA looking would wait for the device."""
    if cu_seqlens.is_cuda or torch.compiler.is_compiling():
        return
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != n_rows or borders != sorted(borders):
        raise ValueError(f"cu_seqlens: was {borders}, must ascend from 0 to {n_rows}, the rows of hidden")


def _check_reference(
    hidden: Tensor,
    weight: Tensor,
    n_sequences: int,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    if ref_logps is not None:
        if ref_hidden is not None or ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_logps: was given together with ref_hidden/ref_weight/ref_bias, must be given alone")
        if ref_logps.shape != (n_sequences,):
            raise ValueError(
                f"ref_logps: was of shape {list(ref_logps.shape)}, must be [{n_sequences}], summed log-probs"
            )
        _check_device("ref_logps", ref_logps, hidden)
        return
    if ref_hidden is None or ref_weight is None:
        missing = "ref_logps" if ref_hidden is None and ref_weight is None else (
            "ref_hidden" if ref_hidden is None else "ref_weight"
        )  # fmt: skip
        raise ValueError(f"{missing}: was None, must be given: either ref_logps, or both ref_hidden and ref_weight")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: was of shape {list(ref_hidden.shape)}, must be {[*hidden.shape[:-1], 'H']} as hidden is"
        )
    if ref_weight.dim() != 2 or ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: was of shape {list(ref_weight.shape)}, must be [{weight.shape[0]}, H]: "
            "policy and reference share one vocabulary"
        )


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: was on {tensor.device}, must be on {like.device} as the rest is")


def _check_counts(counts: Tensor) -> None:
    """Every sequence needs a scored token: a ValueError on CPU, an assert on the device where looking would wait."""
    if counts.is_cuda or torch.compiler.is_compiling():
        torch._assert_async((counts > 0).all(), "labels: a sequence has no scored token")
        return
    empty = (counts == 0).nonzero().squeeze(1).tolist()
    if empty:
        raise ValueError(
            f"labels: sequence {empty[0]} has no scored token (all are {IGNORE_INDEX}), must have at least one"
        )
