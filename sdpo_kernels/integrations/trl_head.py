"""The replacements of TRL's head: objects with the `apply` that its trainers call, computed by `linear_logps`.

`trl.patch()` puts one of them where TRL's class was: `FusedHead` from TRL 1.15 on, `FusedHeadWithEntropy` in 1.14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_kernels.backends.base import EXTRAS
from sdpo_kernels.logps import linear_logps

# TRL requests extras for the policy but not for the reference. Log-probs with extras may come from another kernel than
# those without, and then margins would not be exactly 0 if policy and reference are the same model.
SAME_KERNEL = ["mean_logits"]

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Head:
    """What the replacements share: the settings, and one call of `linear_logps`."""

    replaces: type  # TRL's class
    backend: str = "auto"
    stash_bytes: int | str = "auto"
    grad_tol: float = 0.0
    grad_tol_relative: bool = False

    def _scored(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs, and the extras that `outputs` names; float32 (top-1: bool)."""
        for name in outputs:
            if name != "log_probs" and name not in EXTRAS:
                raise ValueError(f"outputs: was {outputs!r}, must be names from log_probs, {', '.join(EXTRAS)}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size: was {chunk_size!r}, must be at least 1 (TRL's tile; not used here)")
        _refuse_zero3()

        # the other results are None; SAME_KERNEL keeps policy and reference on one kernel
        requested = [name for name in EXTRAS if name in outputs]
        weight, bias = _cast_head(hidden, weight, bias)
        out = linear_logps(
            hidden, weight, targets.long(), bias=bias, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap, outputs=requested or SAME_KERNEL, backend=self.backend, stash_bytes=self.stash_bytes,
            grad_tol=self.grad_tol, grad_tol_relative=self.grad_tol_relative,
        )  # fmt: skip

        extras: dict[str, Tensor] = {name: getattr(out, name) for name in requested}
        return out.logps.float(), {n: t if t.dtype == torch.bool else t.float() for n, t in extras.items()}


@dataclass(frozen=True, eq=False)
class FusedHead(Head):
    """The replacement of TRL's class from 1.15 on: the same `apply`, computed by `linear_logps`."""

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = EXTRAS,
    ) -> Results:
        """TRL's nine arguments and five results: log-probs, entropy, log Σp², mean logit, top-1.

        Args:
            hidden: [N, H]; weight: [V, H]; bias: [V] or None. As in TRL, the head is rounded to the autocast dtype, or
                to hidden's without autocast; each gradient has its tensor's own dtype.
            targets: [N] integers in [0, V).
            temperature, logit_scale, final_logit_softcapping: z = softcap·tanh(scale·(x·Wᵀ + b)/softcap)/temperature.
            chunk_size: TRL's vocabulary columns per tile, at least 1. No effect here: backends choose their own.
            outputs: which of the four results after the first to compute, and "log_probs"; the others are None.

        Returns:
            Vectors [N], float32 (top-1: bool). Log-probs and entropy carry gradients, the others do not.

        Raises:
            ValueError: an unknown output, chunk_size below 1, or what `linear_logps` rejects (a target outside [0, V),
                a softcap or logit_scale of 0).
            RuntimeError: DeepSpeed ZeRO-3, which has released the gathered head by the time of the backward.

        Differences from TRL: logits are never rounded to bfloat16, so bf16 log-probs are exact to float32; a target
        whose logit ties with an earlier token's counts as top-1; a target of −100, for which TRL returns a meaningless
        number, gives 0.
        """
        logps, extras = self._scored(
            hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        )
        entropy, log_sum_sq_probs, mean_logits, is_top1 = (extras.get(name) for name in EXTRAS)
        return logps, entropy, log_sum_sq_probs, mean_logits, is_top1


@dataclass(frozen=True, eq=False)
class FusedHeadWithEntropy(Head):
    """The replacement of TRL 1.14's class, whose `apply` takes eight arguments and always returns the entropy."""

    def apply(
        self,
        last_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy [N], float32, both with gradients. Arguments, errors, differences: see `FusedHead`.

        DPO and KTO log the entropy without its gradient, and GRPO's entropy bonus needs the gradient, too. For a
        reference nothing reads it, but the trainers put it into a tensor all the same.
        """
        logps, extras = self._scored(
            last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale,
            ("entropy",),
        )  # fmt: skip
        return logps, extras["entropy"]


def _cast_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As in TRL, cast the head to hidden's dtype unless autocast decides; differentiable."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (hidden.dtype, weight.dtype):
        weight = weight.to(hidden.dtype)
    if bias is not None and bias.dtype not in (weight.dtype, torch.float32):
        bias = bias.to(weight.dtype)
    return weight, bias


def _refuse_zero3() -> None:
    # TRL gathers the sharded head again in its own backward; our op would find it empty there
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if torch.is_grad_enabled() and is_deepspeed_zero3_enabled():
        raise RuntimeError("trl: DeepSpeed ZeRO-3 releases the head before the backward; use ZeRO-2 or unpatch()")
