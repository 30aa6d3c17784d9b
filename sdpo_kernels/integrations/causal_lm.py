"""Hugging Face causal language models with the fused head: token log-probs directly from `model(...)`, no logits.

    model = AutoModelForCausalLM.from_pretrained(...)
    disable_dropout(model)
    attach_fused_head(model)                      # before PEFT, accelerate, DDP or FSDP wrap it
    check_head(model, input_ids)                  # compares the fused log-probs with the model's own logits
    out = model(input_ids=..., position_ids=..., logp_targets=...)   # out.logps [N] fp32

The head runs inside the model's own `forward`, so the hooks of later wrappers (DDP's gradient synchronisation, FSDP's
gathering, accelerate's autocast) fire as in any other forward. Without `logp_targets` the model behaves as before.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from sdpo_kernels.integrations.lm_head import LMHead, find_head, hidden_of, unwrap
from sdpo_kernels.integrations.router_loss import find_router_loss, recorded_router_logits
from sdpo_kernels.logps import LinearLogps, check_stash_bytes, linear_logps
from sdpo_kernels.rows import IGNORE_INDEX, ScoredRows

__all__ = [
    "LMHead",
    "LogpsOutput",
    "attach_fused_head",
    "check_head",
    "detach_fused_head",
    "disable_dropout",
    "evaluating",
    "find_head",
    "unwrap",
]

Model = TypeVar("Model", bound=nn.Module)

CHECK_TOKENS = 128  # check_head uses this many tokens: it computes all their logits
RANDOM_RATE = re.compile("drop|jitter")  # jitter: the noise of some mixture-of-experts routers


@dataclass
class LogpsOutput(ModelOutput):
    """What the model returns if it gets `logp_targets`."""

    logps: Tensor | None = None  # [N] fp32, N = the batch's flattened rows; 0 where a row is not scored
    entropy: Tensor | None = None  # the following if logp_outputs names them, as in `LinearLogps`
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None  # scalar, without its coefficient: of a mixture of experts with output_router_logits


@dataclass(frozen=True)
class _Fused:
    """What attach_fused_head stores on the model."""

    backend: str
    stash_bytes: int | str
    previous: Callable[..., Any] | None  # the instance's own forward before that, if it had one
    hook: RemovableHandle  # of _check_forward


def attach_fused_head(model: Model, *, backend: str = "auto", stash_bytes: int | str = "auto") -> Model:
    """Make `model(input_ids=..., logp_targets=...)` return log-probs; returns the same object.

    Call it on the bare model, before `get_peft_model`, `Trainer` or DDP/FSDP wrap it, and after anything that replaces
    the model's forward (Liger's `apply_liger_kernel_to_…`). Afterwards `forward` takes

        logp_targets: int64 of input_ids' shape; `logp_targets[i, t]` is the token that position t predicts (already
            shifted), -100 = not scored
        logp_rows: `ScoredRows` of the flattened batch, or None
        logp_outputs: names of `linear_logps`'s further outputs, to be returned with `logps`

    and returns `LogpsOutput(logps=[N] fp32)`; the key/value cache is off. If the config of a mixture of experts sets
    `output_router_logits`, the output has `aux_loss` too, as the model's own has. Nothing is added to the model's
    config or state dict. `backend` and `stash_bytes` are those of `linear_logps`. A head that is a `fully_shard` group
    of its own stays sharded: its rows are broadcast in chunks (`sharded_linear_logps`), in plain torch whatever
    `backend` is. `detach_fused_head` undoes it.

    Raises:
        ValueError: no head was found, or ZeRO-3 has partitioned it; the model already has a fused head; the auxiliary
            loss that its config switches on cannot be computed; or a negative stash_bytes.
    """
    base = unwrap(model)
    find_head(base)
    find_router_loss(base)
    check_stash_bytes(stash_bytes)
    if hasattr(base, "_sdpo_fused"):
        raise ValueError(f"model: was a {type(base).__name__} that already has a fused head, must be one without")

    previous = base.__dict__.get("forward")
    hook = base.register_forward_hook(_check_forward, with_kwargs=True)
    base._sdpo_fused = _Fused(backend, stash_bytes, previous, hook)  # type: ignore[assignment]

    # A bound method, so that copy.deepcopy binds the copy's forward to the copy. No __wrapped__: accelerate's
    # unwrap_model follows that chain to its end and would remove the fused head together with its autocast.
    forward = _make_forward()
    forward.__signature__ = _extended_signature(previous or type(base).forward)  # type: ignore[attr-defined]
    base.forward = MethodType(forward, base)
    return model


def detach_fused_head(model: Model) -> Model:
    """Undo `attach_fused_head`; returns the same object. This also removes later wrappers of `forward` (accelerate's).

    Raises:
        ValueError: no fused head is attached.
    """
    base = unwrap(model)
    fused = _attached(base)
    fused.hook.remove()
    del base.forward
    del base._sdpo_fused
    if fused.previous is not None:
        base.forward = fused.previous
    return model


def _attached(base: nn.Module) -> _Fused:
    fused = base.__dict__.get("_sdpo_fused")
    if fused is None:
        raise ValueError(f"model: was a {type(base).__name__} without a fused head; call attach_fused_head first")
    return fused


def _check_forward(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A forward hook: ValueError if another forward has replaced ours and ignored `logp_targets`, as Liger's does."""
    if kwargs.get("logp_targets") is None or getattr(out, "logps", None) is not None:
        return
    module = str(getattr(base.forward, "__module__", "?"))
    name = f"{module}.{getattr(base.forward, '__qualname__', type(base.forward).__name__)}"
    by = "Liger" if module.startswith("liger_kernel") else "another library"
    raise ValueError(
        f"model: its forward was replaced by {by} ({name}) after attach_fused_head and ignores logp_targets; patch the "
        "model first, then attach the fused head"
    )


def _make_forward() -> Callable[..., Any]:
    def forward(
        self: nn.Module,
        *args: Any,
        logp_targets: Tensor | None = None,
        logp_rows: ScoredRows | None = None,
        logp_outputs: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        if logp_targets is not None:
            found, aux_loss = _fused_logps(self, args, kwargs, logp_targets, logp_rows, logp_outputs)
            extras = {name: getattr(found, name) for name in logp_outputs}
            return LogpsOutput(logps=found.logps, **extras, aux_loss=aux_loss)

        # without targets it is the model's own forward; a forgotten target must not pass unnoticed
        for name, given in {"logp_rows": logp_rows is not None, "logp_outputs": bool(logp_outputs)}.items():
            if given:
                raise ValueError(f"{name}: was given without logp_targets, must be given with them")
        previous = _attached(self).previous
        return previous(*args, **kwargs) if previous is not None else type(self).forward(self, *args, **kwargs)

    return forward


def _extended_signature(forward: Callable[..., Any]) -> inspect.Signature:
    """`forward`'s signature with the new keywords, for Trainer and generate(), which read it."""
    signature = inspect.signature(forward)
    # Trainer drops batch columns that forward does not name
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].name != "self":  # an instance's own forward is bound; ours is not yet
        parameters.insert(0, inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD))

    defaults: dict[str, Any] = {"logp_targets": None, "logp_rows": None, "logp_outputs": ()}
    new = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=value) for n, value in defaults.items()]
    last = parameters[-1].kind == inspect.Parameter.VAR_KEYWORD
    return signature.replace(parameters=[*parameters[:-1], *new, parameters[-1]] if last else [*parameters, *new])


def _fused_logps(
    base: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    targets: Tensor,
    rows: ScoredRows | None,
    outputs: Sequence[str],
) -> tuple[LinearLogps, Tensor | None]:
    """Body, then the fused head: log-probs [N] fp32, and the router's auxiliary loss if there is one."""
    fused = _attached(base)
    inputs = _body_inputs(args, kwargs)
    balance = find_router_loss(base, inputs.pop("output_router_logits", None))
    if balance is not None:
        inputs["output_router_logits"] = True

    # found again at every call: adapters may have been added, merged or switched off
    head = find_head(base)
    out = head.body(**inputs)
    hidden = hidden_of(out)  # [B, T, H]
    if hidden.shape[:-1] != targets.shape:
        wanted, was = list(hidden.shape[:-1]), list(targets.shape)
        raise ValueError(f"logp_targets: was of shape {was}, must be {wanted}, one target for each hidden state")

    aux_loss = None
    if balance is not None and (router_logits := recorded_router_logits(base, out)):
        aux_loss = balance(router_logits, inputs.get("attention_mask"))

    flat, on_device = hidden.flatten(0, -2), targets.reshape(-1).to(hidden.device)
    if head.is_cut:  # sharded by FSDP2, as a group of its own
        from sdpo_kernels.integrations.sharded_head import sharded_head_logps

        return sharded_head_logps(head, flat, on_device, outputs=outputs, rows=rows), aux_loss

    # with LoRA on the head, its features are additional columns
    rows_in, weight, bias = head.operands(flat)
    found = linear_logps(
        rows_in,
        weight,
        on_device,
        bias=bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        rows=rows,
        outputs=outputs,
        backend=fused.backend,
        stash_bytes=fused.stash_bytes,
    )
    return found, aux_loss


def _body_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The body's arguments: those of the model's forward, except those about logits."""
    if len(args) > 1:
        raise ValueError(f"forward: was given {len(args)} positional arguments with logp_targets, must be at most 1")

    inputs = {name: value for name, value in kwargs.items() if value is not None}
    for name in ("labels", "logits_to_keep"):
        if name in inputs:
            raise ValueError(f"{name}: was given with logp_targets, must be left out")
    if args:
        inputs["input_ids"] = args[0]
    return inputs | {"use_cache": False}


def disable_dropout(model: nn.Module) -> int:
    """Set every random rate of `model` to 0 and return how many were above 0 before.

    These are dropout modules, float attributes that modules read at run time (Llama's `attention_dropout`, router
    jitter), and the same in the config and its sub-configs, because some attention layers read their config. A config
    saved afterwards contains the zeros.
    """
    changed = 0
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            module.p = 0.0
            changed += 1
        changed += _zero_rates(vars(module))
        _collect_configs(getattr(module, "config", None), configs)
    return changed + sum(_zero_rates(vars(config)) for config in configs.values())


def _zero_rates(attributes: dict[str, Any]) -> int:
    names = [
        name
        for name, value in attributes.items()
        if isinstance(value, float) and value > 0 and RANDOM_RATE.search(name.lower())
    ]
    attributes.update(dict.fromkeys(names, 0.0))
    return len(names)


def _collect_configs(config: Any, found: dict[int, Any]) -> None:
    if config is None or not hasattr(config, "sub_configs") or id(config) in found:
        return
    found[id(config)] = config
    for name in config.sub_configs:
        _collect_configs(getattr(config, name, None), found)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, without gradients; every module's own training flag is restored afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def check_head(model: nn.Module, input_ids: Tensor) -> float:
    """Compare the fused log-probs of one sequence with the model's own logits; returns the largest deviation in nats.

    Under DDP or FSDP every rank must call it: both forwards are collective.

    Args:
        model: with its fused head attached, wrapped as for training (PEFT adapters included).
        input_ids: [T] or [1, T] int64, T >= 2; the first 128 tokens are used.

    Raises:
        ValueError: the deviation is larger than rounding in the head's dtype explains, or the gradient does not reach a
            trainable parameter of the head (a new adapter changes no log-prob yet, so only this shows that it is lost),
            or the router's auxiliary loss is not the model's own.
    """
    base = unwrap(model)
    _attached(base)
    head = find_head(base)
    ids = input_ids.reshape(1, -1)[:, :CHECK_TOKENS]
    if ids.shape[1] < 2:
        raise ValueError(f"input_ids: was of {ids.shape[1]} tokens, must be at least 2")
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    targets = torch.cat([ids[:, 1:], ids.new_full((1, 1), IGNORE_INDEX)], 1)

    # the hook notes the dtype that the model's own head computes in, which sets the tolerance
    dtypes: list[torch.dtype] = []
    hook = head.module.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype))
    try:
        with evaluating(model):
            fused = model(input_ids=ids, position_ids=positions, logp_targets=targets)
            own_out = model(input_ids=ids, position_ids=positions, use_cache=False)
            missed = _unreached(head)
    finally:
        hook.remove()

    # the last position predicts nothing
    logits = own_out.logits[0].float()
    own = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None].to(logits.device)).squeeze(1)
    deviation = float((fused.logps[:-1].to(own.device) - own).abs().max())
    tolerance = _tolerance(dtypes[0] if dtypes else torch.float32, logits, head.width)
    if not deviation <= tolerance:  # also if it is NaN
        raise ValueError(
            f"model: fused log-probs of this {type(base).__name__} differ from its own logits by {deviation:.3g} nat, "
            f"must be at most {tolerance:.3g}. Usual causes: a logit scale or softcap under another name in the config "
            f"(found logit_scale {head.logit_scale:g}, softcap {head.softcap}), a head that is more than one linear "
            f"layer, or an adapter on the head ({type(head.module).__name__}) that was ignored"
        )
    _check_aux_loss(fused.aux_loss, getattr(own_out, "aux_loss", None))
    if missed:
        raise ValueError(
            f"model: no gradient of the fused head reaches its trainable {', '.join(missed)}; was the adapter ignored?"
        )
    return deviation


def _check_aux_loss(fused: Tensor | None, own: Tensor | None) -> None:
    """ValueError if the router's auxiliary loss is not the one that the model's own forward returns."""
    own = own if isinstance(own, Tensor) else None  # the number 0 if no layer has a router
    if fused is None and own is None:
        return

    # a percent: rounding may send a token to another expert
    if fused is not None and own is not None and torch.allclose(fused, own.to(fused), rtol=0.01):
        return
    was, wanted = (None if value is None else round(float(value), 6) for value in (fused, own))
    raise ValueError(f"model: the router's auxiliary loss was {was}, must be {wanted} as in the model's own forward")


def _tolerance(dtype: torch.dtype, logits: Tensor, width: int) -> float:
    """What rounding explains: a few ulp of the largest logit; in float32 and float64 times sqrt(width), for the sum."""
    eps = torch.finfo(dtype).eps
    if dtype == torch.float32 and logits.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        eps = 2.0**-10
    growth = math.sqrt(width) if dtype in (torch.float32, torch.float64) else 1.0
    return 4 * eps * growth * max(1.0, float(logits.abs().max()))


def _unreached(head: LMHead) -> list[str]:
    """Names of the head's trainable parameters that its operands do not depend on."""
    trainable = head.trainable()
    if not trainable:
        return []
    like = trainable[0][1]
    with torch.enable_grad():
        ones = torch.ones(1, head.width, dtype=like.dtype, device=like.device, requires_grad=True)
        hidden, weight, bias = head.operands(ones)
        total = (hidden.float() @ weight.float().T).sum() + (0.0 if bias is None else bias.float().sum())
    gradients = torch.autograd.grad(total, [parameter for _, parameter in trainable], allow_unused=True)
    return [name for (name, _), gradient in zip(trainable, gradients, strict=True) if gradient is None]
