"""The log-probs of a model's head wherever its weight is: whole on each rank, or divided between ranks.

    found = head_logps(head, hidden, targets, backend="auto", stash_bytes="auto")

| the weight is | how |
|---|---|
| whole | `linear_logps` |
| sharded by FSDP2, as a group of its own | `sharded_linear_logps`: ranks with their own rows exchange chunks of it |
| sharded in a tensor-parallel model | `vocab_parallel_linear_logps`: ranks with the same rows add up their sums |
| partitioned by DeepSpeed ZeRO-3 | `linear_logps` inside the head's own forward, whose hooks gather the weight |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sdpo_kernels.integrations.lm_head import LMHead
from sdpo_kernels.logps import LinearLogps, linear_logps


def head_logps(head: LMHead, hidden: Tensor, targets: Tensor, **options: Any) -> LinearLogps:
    """Log-prob of each target [N] under the head, of `hidden` [N, H]; `options` and results are `linear_logps`'s.

    Raises:
        ValueError: the head is divided in a way that is not supported, or divided with a grad_tol above 0.
    """
    if head.is_tensor_parallel or head.is_cut:
        grad_tol = options.pop("grad_tol", 0.0)
        options.pop("grad_tol_relative", None)  # 0 is 0 either way
        if grad_tol != 0:
            raise ValueError(f"grad_tol: was {grad_tol!r}, must be 0 for a head that is divided over processes")

    if head.is_tensor_parallel:
        from sdpo_kernels.integrations.sharded_head import tensor_parallel_head_logps

        return tensor_parallel_head_logps(head, hidden, targets, **options)

    if head.is_cut:
        from sdpo_kernels.integrations.sharded_head import sharded_head_logps

        # a model is cut where memory is short: nothing is stashed unless it was asked for
        if options.get("stash_bytes") == "auto":
            options["stash_bytes"] = 0
        return sharded_head_logps(head, hidden, targets, **options)

    def whole(rows: Tensor) -> LinearLogps:
        inputs = head.operands(rows)
        return linear_logps(
            inputs.hidden,
            inputs.weight,
            targets,
            bias=inputs.bias,
            lora_b=inputs.lora_b,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            **options,
        )

    return _in_forward_of(head.linear, whole, hidden) if head.is_partitioned else whole(hidden)


def _in_forward_of(module: nn.Module, compute: Callable[[Tensor], LinearLogps], hidden: Tensor) -> LinearLogps:
    """`compute(hidden)` in place of the module's forward: ZeRO-3's hooks gather the weight for it and its backward."""
    own = module.__dict__.get("forward")
    module.forward = compute
    try:
        return module(hidden)
    finally:
        del module.forward
        if own is not None:
            module.forward = own
