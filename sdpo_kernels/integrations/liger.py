"""Liger's fused DPO loss under its own names, on these kernels: change only the import.

    from sdpo_kernels.integrations.liger import LigerFusedLinearDPOLoss     # was: liger_kernel.chunked_loss
    from sdpo_kernels.integrations.liger import liger_fused_linear_dpo      # was: liger_kernel.chunked_loss.functional

liger-kernel is not imported. For new code use `sdpo_kernels.fused_linear_dpo`, which has more losses, packed batches,
softcaps and cached references.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdpo_kernels.dpo_output import pair_output
from sdpo_kernels.logps import linear_logps
from sdpo_kernels.losses import check_loss, loss_options
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows, sequence_logps

__all__ = ["LigerFusedLinearDPOFunction", "LigerFusedLinearDPOLoss", "liger_fused_linear_dpo"]

LOSSES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip
DEFAULTS = {"label_smoothing": 0.0, "discopop_tau": 0.05}  # a loss that does not use one accepts only its default

LigerOutput = tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]


class LigerFusedLinearDPOLoss(nn.Module):
    """liger_kernel.chunked_loss.LigerFusedLinearDPOLoss (0.8.5): the same constructor, call and seven further outputs.

    Intended differences:

    - label_smoothing works with "sigmoid" (cDPO); Liger ignores it there silently. With a loss that has no such option,
      label_smoothing other than 0 or discopop_tau other than 0.05 is an error.
    - An odd number of sequences is an error; Liger pairs sequences that do not belong together.
    - A sequence without a scored token has log-prob 0 and no gradient, and a batch without a scored chosen token has
      NLL 0. Liger returns NaN: in the first case with average_log_prob=True, in the second always, even without
      compute_nll_loss.
    - A reference with use_ref_model=False, or none with use_ref_model=True, is an error; Liger ignores the former and
      fails on None in the latter case.
    - bfloat16 logits are not rounded, and weight gradients are summed in float32 and rounded once; Liger sums them pair
      by pair in the weight's dtype. float64 inputs give float64 outputs; Liger's are float32.
    - `compiled` and `chunk_size` (at least 1) are accepted and have no effect: logits are not computed pair by pair.

    Args:
        ignore_index: the label of positions that are not scored.
        beta: above 0.
        alpha: weight of the NLL if compute_nll_loss is True.
        compute_nll_loss: add alpha · the chosen answers' mean negative log-likelihood over scored tokens.
        compiled, chunk_size: no effect.
        use_ref_model: False: the reference's log-probs are 0.
        average_log_prob: divide each sequence's log-prob by its number of scored tokens.
        loss_type: sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down or discopop.
        label_smoothing: 0 to below 0.5, for sigmoid and robust; above 0 for exo_pair.
        discopop_tau: above 0, for discopop.

    Raises:
        ValueError: naming the argument, what it was and what it should be; for loss_type and label_smoothing in Liger's
            words, as far as its own tests look for them.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in LOSSES:
            raise ValueError(f"Unsupported loss_type: was {loss_type!r}, must be one of: {', '.join(LOSSES)}")
        _check_smoothing(loss_type, label_smoothing)
        if chunk_size < 1:
            raise ValueError(f"chunk_size: was {chunk_size!r}, must be at least 1")
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        check_loss(loss_type, beta, **self._options())

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> LigerOutput:
        """The loss of B pairs, and the further outputs of Liger.

        Args:
            lin_weight: [V, H]; bias: [V].
            _input: [2B, T, H], chosen half first, in lin_weight's dtype (or under autocast).
            target: [2B, T] int64, already shifted: target[:, t] is what _input[:, t] predicts.
            ref_input: [2B, T, H_ref]; ref_weight: [V, H_ref]; ref_bias: [V]: of the reference, scored without gradient.

        Returns:
            loss (scalar), (chosen_logps [B], rejected_logps [B], chosen_logits_mean, rejected_logits_mean, nll_loss
            (scalars), chosen_rewards [B], rejected_rewards [B]), float32; all but the loss are detached. As in Liger,
            the means of the logits are over all positions, scored or not, and over the vocabulary; nll_loss is 0 if
            compute_nll_loss is False.
        """
        self._check(_input, target, ref_input, ref_weight, ref_bias)
        labels = self._labels(target)
        rows = ScoredRows.from_labels(labels)

        # one pass over the vocabulary scores both, if policy and reference share the head
        same_head = ref_weight is lin_weight and ref_bias is bias and _same_kind(ref_input, _input)
        out = linear_logps(
            _input.flatten(0, 1), lin_weight, labels.flatten(), bias=bias, rows=rows,
            ref_hidden=ref_input.flatten(0, 1) if same_head and ref_input is not None else None,
        )  # fmt: skip
        ref_logps = out.ref_logps
        if ref_logps is None and ref_input is not None and ref_weight is not None:
            with torch.no_grad():
                ref = linear_logps(ref_input.flatten(0, 1), ref_weight, labels.flatten(), bias=ref_bias, rows=rows)
            ref_logps = ref.logps

        # pair_output takes sums; a sequence without a scored token has count 0, which would divide
        policy = self._of_sequences(out.logps, rows)
        reference = torch.zeros_like(policy) if ref_logps is None else self._of_sequences(ref_logps, rows)
        counts = rows.counts.clamp(min=1)
        dpo = pair_output(
            policy, reference.detach(), counts, beta=self.beta, loss_type=self.loss_type, **self._options()
        )

        loss, nll = dpo.loss, out.logps.new_zeros(())
        if self.compute_nll_loss:
            nll = _chosen_nll(out.logps, rows, labels)
            loss = loss + self.alpha * nll
        # no gradient flows into the logits' means, as in Liger
        means = _logit_means(_input, lin_weight, bias)
        sums = (dpo.chosen_logps, dpo.rejected_logps)
        return loss, (*sums, *means, nll.detach(), dpo.chosen_rewards, dpo.rejected_rewards)

    def _options(self) -> dict[str, Any]:
        """label_smoothing and discopop_tau, each if the loss uses it or if it was set although the loss does not."""
        given = {"label_smoothing": self.label_smoothing, "discopop_tau": self.discopop_tau}
        used = loss_options(self.loss_type)
        return {name: value for name, value in given.items() if name in used or value != DEFAULTS[name]}

    def _labels(self, target: Tensor) -> Tensor:
        """`target` with −100 for ignore_index; if that is another number, −100 is a target out of range."""
        if self.ignore_index == IGNORE_INDEX:
            return target
        return torch.where(target == IGNORE_INDEX, -1, target).masked_fill(target == self.ignore_index, IGNORE_INDEX)

    def _of_sequences(self, logps: Tensor, rows: ScoredRows) -> Tensor:
        """Log-probs of tokens [N] to one number per sequence [2B]."""
        sums = sequence_logps(logps, rows)
        return sums / rows.counts.clamp(min=1) if self.average_log_prob else sums

    def _check(
        self,
        _input: Tensor,
        target: Tensor,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> None:
        if _input.dim() != 3 or _input.shape[0] < 2 or _input.shape[0] % 2:
            raise ValueError(f"_input: was of shape {list(_input.shape)}, must be [2B, T, H], chosen half first")
        if target.shape != _input.shape[:2]:
            raise ValueError(f"target: was of shape {list(target.shape)}, must be {list(_input.shape[:2])}, _input's")
        given = {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        for name, tensor in given.items():
            if tensor is not None and not self.use_ref_model:
                raise ValueError(f"{name}: was given, must be None if use_ref_model is False")
            if tensor is None and self.use_ref_model and name != "ref_bias":
                raise ValueError(f"{name}: was None, must be given if use_ref_model is True")
        if ref_input is not None and (ref_input.dim() != 3 or ref_input.shape[:2] != target.shape):
            raise ValueError(f"ref_input: was of shape {list(ref_input.shape)}, must be {list(target.shape)} + [H_ref]")


class LigerFusedLinearDPOFunction:
    """liger_kernel.chunked_loss.dpo_loss.LigerFusedLinearDPOFunction (0.8.5): its `apply`.

    A plain class: the gradients are those of the ops underneath, so it has no forward, backward or preference_loss_fn.
    """

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        alpha: float = 1.0,
    ) -> LigerOutput:
        """One call of `LigerFusedLinearDPOLoss`, whose docstring has shapes, results, errors and differences.

        The order of the arguments is Liger's: the input before the weight, alpha last. Keywords work, too (Liger's
        `apply` takes positions alone).
        """
        loss = LigerFusedLinearDPOLoss(
            ignore_index, beta, alpha, compute_nll_loss, compiled, use_ref_model, average_log_prob, chunk_size,
            loss_type, label_smoothing, discopop_tau,
        )  # fmt: skip
        output: LigerOutput = loss(weight, _input, target, bias, ref_input, ref_weight, ref_bias)
        return output


liger_fused_linear_dpo = LigerFusedLinearDPOFunction.apply


def _check_smoothing(loss_type: str, label_smoothing: float) -> None:
    """ValueError in Liger's words."""
    if loss_type == "exo_pair" and not label_smoothing > 0:
        raise ValueError(f"label_smoothing must be > 0 for loss_type='exo_pair', was {label_smoothing!r}")
    if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust', was {label_smoothing!r}")


def _same_kind(ref_input: Tensor | None, _input: Tensor) -> bool:
    return ref_input is not None and (ref_input.shape, ref_input.dtype) == (_input.shape, _input.dtype)


def _chosen_nll(logps: Tensor, rows: ScoredRows, labels: Tensor) -> Tensor:
    """The chosen half's negative log-likelihood, mean over its scored tokens; 0 if there are none."""
    n_chosen = labels.shape[0] // 2
    chosen = logps[: labels[:n_chosen].numel()]
    return -chosen.double().sum().to(logps.dtype) / rows.counts[:n_chosen].sum().clamp(min=1)


@torch.no_grad()
def _logit_means(_input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean logit of the chosen and of the rejected half, over all positions and the vocabulary, without logits.

    The mean over v and t of x_t·w_v + b_v is (mean x)·(mean w) + mean b.
    """
    dtype = torch.float64 if _input.dtype == torch.float64 else torch.float32
    mean_weight = weight.mean(0, dtype=torch.float64)
    mean_bias = 0.0 if bias is None else bias.mean(dtype=torch.float64)
    chosen, rejected = (half.mean((0, 1), dtype=torch.float64) for half in _input.chunk(2))
    return tuple((mean @ mean_weight + mean_bias).to(dtype) for mean in (chosen, rejected))  # type: ignore[return-value]
