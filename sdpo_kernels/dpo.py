"""The fused loss: log-probs of policy and reference through one primitive, then a pair loss on [B]-sized tensors.

    out = fused_linear_dpo(hidden, weight, labels, ref_logps=cached, beta=0.1)
    out.loss.backward()

Every batch holds the chosen sequences first, then the rejected ones in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdpo_kernels.dpo_checks import check_batch, check_counts, check_reference
from sdpo_kernels.dpo_output import DPOOutput, checked_loss, loss_and_metrics
from sdpo_kernels.logps import LinearLogps, check_grad_tol, linear_logps
from sdpo_kernels.losses import LossSum, LossType
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, all_rows, sequence_logps
from sdpo_kernels.token_weights import agreement_weights, length_weights
from sdpo_kernels.vocab_parallel import vocab_parallel_linear_logps


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
    grad_tol: float = 0.0,
    grad_tol_relative: bool = False,
    vocab_group: dist.ProcessGroup | None = None,
    vocab_slice_rows: Sequence[int] | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    **loss_options: Any,
) -> DPOOutput:
    """DPO's loss of B pairs straight from hidden states, without logits of size tokens × vocab.

    1. check the arguments
    2. find the scored rows: prompt and padding never reach a GEMM
    3. log-probs of their targets under the policy and, without `ref_logps`, under the reference
    4. sums over each sequence, the loss of each pair, its mean, and metrics

    Args:
        hidden: [2B, T, H], chosen half first; or packed [N, H] with `cu_seqlens`.
        weight: [V, H], the head; `bias`: [V].
        labels: [2B, T], packed [N], int64; `labels[:, t]` is what `hidden[:, t]` predicts (already shifted); −100 is
            not scored.
        cu_seqlens: [2B+1] int, borders of the packed sequences, from 0 to N.
        rows: the scored rows, if known (see `ScoredRows`): then nothing synchronises with the host.
        ref_logps: [2B] the reference's summed log-probs; or
        ref_hidden, ref_weight, ref_bias: the reference's hidden states (hidden's shape, but its own H) and head, scored
            here without gradient; if ref_weight is weight itself, in one pass with the policy.
        temperature, logit_scale, softcap, backend, stash_bytes, grad_tol, grad_tol_relative: as in `linear_logps`;
            grad_tol, what the policy's backward may leave out, must be 0 with vocab_group.
        vocab_group: the process group over which the heads' rows are divided (tensor parallelism): `weight`, `bias`,
            `ref_weight` and `ref_bias` are this rank's rows, all else is the same on every rank, and so is the result;
            see `vocab_parallel_linear_logps`, whose `slice_rows` is `vocab_slice_rows`. None: the heads are whole.
        beta: above 0.
        loss_type: a name of `losses.loss_names()`, its options as further keywords; or a list of
            {"name": …, "weight": 1.0, "options": {}}. A reference-free loss (simpo, cpo, orpo, sft) needs no reference:
            rewards are then β times the policy's log-probs. With ld_dpo all sums are over weighted tokens, and cached
            `ref_logps` must be weighted with the same ld_alpha.

    Raises:
        ValueError: naming the argument, what it was and what it should be. Every sequence needs a scored token.

    Example:
        >>> import torch
        >>> from sdpo_kernels import fused_linear_dpo
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(100, 8)
        >>> labels = torch.tensor([[4, 5, -100], [6, 7, 8]])
        >>> fused_linear_dpo(hidden, weight, labels, ref_hidden=hidden, ref_weight=weight).loss
        tensor(0.6931)
    """
    wanted = checked_loss(loss_type, beta, loss_options)
    n_columns = weight.shape[0] if vocab_group is None else None
    n_sequences = check_batch(hidden, labels, n_columns, cu_seqlens, rows)
    check_reference(
        hidden, weight, n_sequences, ref_logps, ref_hidden, ref_weight, ref_bias, needed=not wanted.reference_free
    )

    # under compile `rows` stays None: linear_logps finds the scored rows, and the sums are over all rows
    if rows is None and not torch.compiler.is_compiling():
        rows = ScoredRows.from_labels(labels, cu_seqlens)
    summed = all_rows(labels, cu_seqlens) if rows is None else rows
    check_counts(summed.counts)
    targets = labels.reshape(-1)
    token_weights = _token_weights(wanted, summed, targets)

    # [N] log-probs of tokens; those of the reference only without `ref_logps`
    policy_head = _Head(hidden, weight, bias)
    ref_head = None if ref_hidden is None or ref_weight is None else _Head(ref_hidden, ref_weight, ref_bias)
    outputs = ("log_sum_sq_probs",) if wanted.weighs_pairs else ()
    tolerance = {"grad_tol": grad_tol, "grad_tol_relative": grad_tol_relative}
    policy = _policy_and_reference(
        policy_head, ref_head, targets, outputs, stash_bytes, tolerance, vocab_group, vocab_slice_rows, rows=rows,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap, backend=backend,
    )  # fmt: skip

    # sums over sequences; the weights of tokens apply to policy and reference alike
    if policy.ref_logps is not None:
        ref_logps = sequence_logps(policy.ref_logps, summed, token_weights)
    if ref_logps is None:  # a reference-free loss: its rewards are relative to 0
        ref_logps = policy.logps.new_zeros(n_sequences)
    pair_weights = None
    if policy.log_sum_sq_probs is not None:
        pair_weights = agreement_weights(policy.logps, policy.log_sum_sq_probs, summed)
    return loss_and_metrics(
        policy.logps, summed, ref_logps, summed.counts, wanted, beta, backend=backend, token_weights=token_weights,
        pair_weights=pair_weights,
    )  # fmt: skip


def _token_weights(wanted: LossSum, summed: ScoredRows, targets: Tensor) -> Tensor | None:
    """For ld_dpo the weight of each row of `summed`, else None."""
    if wanted.ld_alpha is None:
        return None
    return length_weights(summed, wanted.ld_alpha, targets[summed.index] != IGNORE_INDEX)


class _Head(NamedTuple):
    """A head with the hidden states that go into it."""

    hidden: Tensor  # [2B, T, H] or [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    @property
    def flat_hidden(self) -> Tensor:
        """[N, H]."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])

    def is_shared_with(self, other: _Head) -> bool:
        """Whether both go into the very same head, so that one pass over the vocabulary serves both."""
        return self.weight is other.weight and self.bias is other.bias and self.hidden.dtype == other.hidden.dtype


def _policy_and_reference(
    policy: _Head,
    ref: _Head | None,
    targets: Tensor,
    outputs: tuple[str, ...],
    stash_bytes: int | str,
    tolerance: dict[str, Any],
    vocab_group: dist.ProcessGroup | None,
    vocab_slice_rows: Sequence[int] | None,
    **options: Any,
) -> LinearLogps:
    """Per-token log-probs of the policy with `outputs`; `ref_logps` are the reference's, without gradient."""

    grad_tol = tolerance["grad_tol"]
    check_grad_tol(grad_tol, tolerance["grad_tol_relative"])
    if vocab_group is not None and grad_tol != 0:
        raise ValueError(
            f"grad_tol: was {grad_tol!r}, must be 0 with vocab_group: a slice of a head leaves nothing out"
        )

    def score(head: _Head, stash_bytes: int | str, **more: Any) -> LinearLogps:
        given: dict[str, Any] = {"stash_bytes": stash_bytes, **options, **more}
        if vocab_group is None:
            return linear_logps(head.flat_hidden, head.weight, targets, bias=head.bias, **tolerance, **given)
        given |= {"bias_slice": head.bias, "group": vocab_group, "slice_rows": vocab_slice_rows}
        return vocab_parallel_linear_logps(head.flat_hidden, head.weight, targets, **given)

    # the reference first: its memory is free again before the policy's stash is allocated
    if ref is None:
        return score(policy, stash_bytes, outputs=outputs)
    if vocab_group is None and policy.is_shared_with(ref):
        return score(policy, stash_bytes, outputs=outputs, ref_hidden=ref.flat_hidden)
    with torch.no_grad():
        ref_logps = score(ref, 0).logps
    return score(policy, stash_bytes, outputs=outputs)._replace(ref_logps=ref_logps)


class FusedLinearDPOLoss(nn.Module):
    """`fused_linear_dpo` with fixed settings, for trainers that keep a loss as a module.

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
        grad_tol: float = 0.0,
        grad_tol_relative: bool = False,
        beta: float = 0.1,
        loss_type: LossType = "sigmoid",
        **loss_options: Any,
    ) -> None:
        super().__init__()
        checked_loss(loss_type, beta, loss_options)
        check_grad_tol(grad_tol, grad_tol_relative)
        self.settings: dict[str, Any] = {
            "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "backend": backend,
            "stash_bytes": stash_bytes, "grad_tol": grad_tol, "grad_tol_relative": grad_tol_relative, "beta": beta,
            "loss_type": loss_type, **loss_options,
        }  # fmt: skip

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **inputs: Any) -> DPOOutput:
        """Tensors as in `fused_linear_dpo`: cu_seqlens, rows, bias, ref_logps or ref_hidden, ref_weight, ref_bias.

        So are vocab_group and vocab_slice_rows.
        """
        clash = sorted(inputs.keys() & self.settings.keys())
        if clash:
            raise ValueError(f"{clash[0]}: was given to the call, must be given to FusedLinearDPOLoss(...)")
        return fused_linear_dpo(hidden, weight, labels, **self.settings, **inputs)

    def extra_repr(self) -> str:
        """The settings, as print(module) shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
