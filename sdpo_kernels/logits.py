"""Log-probs of targets for trainers that only have logits: no float32 copy of them, and on request no copy at all.

logps = logits_logps(logits, targets)     # logits [..., V], targets [...]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdpo_kernels.backends import choose_backend_of_rows
from sdpo_kernels.head import Head, product_dtype
from sdpo_kernels.namespaces import OPERATORS
from sdpo_kernels.rows import IGNORE_INDEX


def logits_logps(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, inplace_backward: bool = False
) -> Tensor:
    """Log-probability of each target under softmax(logits / temperature).

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64.
        targets: [...] int64 in [0, V); −100 gives log-prob 0 and no gradient. Pass a model's whole logits [B, T, V]
            and targets shifted and padded with −100: a slice of logits, such as `logits[:, :-1]`, is copied.
        temperature: above 0.
        inplace_backward: write the gradient over the logits, which destroys them but saves a second [..., V] tensor.
            For logits that nothing else reads after the backward; they must be contiguous and not a leaf.

    Returns:
        [...] float32 (float64 for float64 logits).

    Raises:
        ValueError: naming the argument, what it was and what it should be.

    Example:
        >>> import torch
        >>> from sdpo_kernels import logits_logps
        >>> logits_logps(torch.zeros(2, 100), torch.tensor([5, -100]))
        tensor([-4.6052,  0.0000])
    """
    Head(temperature=temperature)  # raises if it is out of range
    if logits.dim() < 1 or not logits.is_floating_point() or logits.shape[-1] == 0:
        raise ValueError(f"logits: was {logits.dtype} of shape {list(logits.shape)}, must be floating [..., V], V >= 1")
    if targets.shape != logits.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: was {targets.dtype} of shape {list(targets.shape)}, "
            f"must be torch.int64 of shape {list(logits.shape[:-1])}"
        )
    if targets.device != logits.device:
        raise ValueError(f"targets: was on {targets.device}, must be on {logits.device} as logits is")
    # a leaf must keep its values, and a reshape of non-contiguous logits is a copy
    if inplace_backward and logits.requires_grad and (logits.is_leaf or not logits.is_contiguous()):
        was = "a leaf" if logits.is_leaf else "not contiguous"
        raise ValueError(f"logits: was {was}, must be a contiguous result of a computation for inplace_backward")

    flat = logits.reshape(-1, logits.shape[-1])
    out = _Outputs(*_logits_logps(flat, targets.reshape(-1), temperature, inplace_backward))
    return out.logps.view(targets.shape)


class _Outputs(NamedTuple):
    """What the op returns, [N] each."""

    logps: Tensor
    lse: Tensor  # logsumexp, float64


class _Inputs(NamedTuple):
    """One entry for each input of the op: the inputs themselves, or their gradients."""

    logits: Any
    targets: Any = None
    temperature: Any = None
    inplace_backward: Any = None


@torch.library.custom_op(f"{OPERATORS}::logits_logps", mutates_args=())
def _logits_logps(logits: Tensor, targets: Tensor, temperature: float, inplace_backward: bool) -> tuple[Tensor, Tensor]:
    """_Outputs, as a plain tuple."""
    _check_targets(targets, logits.shape[1])
    return choose_backend_of_rows("auto", logits.device, logits.dtype).logits_forward(logits, targets, temperature)


@_logits_logps.register_fake
def _(logits: Tensor, targets: Tensor, temperature: float, inplace_backward: bool) -> tuple[Tensor, Tensor]:
    out = product_dtype(logits.dtype)
    return logits.new_empty(logits.shape[0], dtype=out), logits.new_empty(logits.shape[0], dtype=torch.float64)


@torch.library.custom_op(f"{OPERATORS}::logits_logps_backward", mutates_args=())
def _gradient(grad: Tensor, logits: Tensor, targets: Tensor, logps: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """dL/dlogits [N, V] in logits' dtype."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(out, grad, logits, targets, logps, lse, temperature)
    return out


@_gradient.register_fake
def _(grad: Tensor, logits: Tensor, targets: Tensor, logps: Tensor, lse: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{OPERATORS}::logits_logps_backward_", mutates_args=("logits",))
def _gradient_(grad: Tensor, logits: Tensor, targets: Tensor, logps: Tensor, lse: Tensor, temperature: float) -> None:
    """dL/dlogits [N, V] written over `logits`."""
    _write_gradient(logits, grad, logits, targets, logps, lse, temperature)


def _write_gradient(
    out: Tensor, grad: Tensor, logits: Tensor, targets: Tensor, logps: Tensor, lse: Tensor, temperature: float
) -> None:
    backend = choose_backend_of_rows("auto", logits.device, logits.dtype)
    backend.logits_backward(grad, logits, targets, logps, lse, temperature, out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given, out = _Inputs(*inputs), _Outputs(*output)
    ctx.temperature, ctx.inplace_backward = given.temperature, given.inplace_backward
    ctx.mark_non_differentiable(out.lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given.logits, given.targets, out.logps, out.lse)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return _Inputs(logits=None)[:]
    logits, targets, logps, lse = ctx.saved_tensors
    if not ctx.inplace_backward:
        dlogits = _gradient(grad, logits, targets, logps, lse, ctx.temperature)
        return _Inputs(logits=dlogits)[:]

    _gradient_(grad, logits, targets, logps, lse, ctx.temperature)
    return _Inputs(logits=logits)[:]


_logits_logps.register_autograd(_backward, setup_context=_setup_context)


def _check_targets(targets: Tensor, n_columns: int) -> None:
    right = ((targets >= 0) & (targets < n_columns)) | (targets == IGNORE_INDEX)
    if targets.is_cuda:
        torch._assert_async(right.all(), f"targets: must be in [0, {n_columns}) or {IGNORE_INDEX}")
    elif not bool(right.all()):
        wrong = targets[~right][0].item()
        raise ValueError(f"targets: was {wrong}, must be in [0, {n_columns}) or {IGNORE_INDEX} (not scored)")
