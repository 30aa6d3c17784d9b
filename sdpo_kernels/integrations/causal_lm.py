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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from sdpo_kernels.integrations.dropout import disable_dropout
from sdpo_kernels.integrations.head_logps import head_logps
from sdpo_kernels.integrations.lm_head import LMHead, find_head, hidden_of, unwrap
from sdpo_kernels.integrations.router_loss import find_router_loss, recorded_router_logits
from sdpo_kernels.logps import LinearLogps, check_grad_tol, check_stash_bytes
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
    "is_attached",
    "unwrap",
]

Model = TypeVar("Model", bound=nn.Module)

CHECK_TOKENS = 128  # check_head uses this many tokens: it computes all their logits


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
    grad_tol: float
    grad_tol_relative: bool
    previous: Callable[..., Any] | None  # the instance's own forward before that, if it had one
    hook: RemovableHandle  # of _check_forward


def attach_fused_head(
    model: Model,
    *,
    backend: str = "auto",
    stash_bytes: int | str = "auto",
    grad_tol: float = 0.0,
    grad_tol_relative: bool = False,
) -> Model:
    """Make `model(input_ids=..., logp_targets=...)` return log-probs; returns the same object.

    Call it on the bare model, before `get_peft_model`, `Trainer` or DDP/FSDP wrap it, and after anything that replaces
    the model's forward (Liger's `apply_liger_kernel_to_…`). Afterwards `forward` takes

        logp_targets: int64 of input_ids' shape; `logp_targets[i, t]` is the token that position t predicts (already
            shifted), -100 = not scored
        logp_source: int64 [M], or None: the places in the flattened batch that predict `logp_targets`, which is [M]
            then, as are the results; in any order, and a place once for each of its targets
        logp_rows: `ScoredRows` of the flattened batch (with logp_source, of the M), or None
        logp_outputs: names of `linear_logps`'s further outputs, to be returned with `logps`
        logp_temperature: divides the logits, 1 by default

    and returns `LogpsOutput(logps=[N] fp32)`; the key/value cache is off. If the config of a mixture of experts sets
    `output_router_logits`, the output has `aux_loss` too, as the model's own has. Nothing is added to the model's
    config or state dict. `backend`, `stash_bytes`, `grad_tol` and `grad_tol_relative` are those of `linear_logps`. A
    head that is a `fully_shard` group of its own stays sharded: the ranks exchange its rows in chunks
    (`sharded_linear_logps`). One that ZeRO-3 partitions afterwards is gathered while it is used; one of a
    tensor-parallel model stays where it is (`vocab_parallel_linear_logps`). Sharded and tensor-parallel heads need
    grad_tol 0. `detach_fused_head` undoes it.

    Raises:
        ValueError: no head was found, or ZeRO-3 has partitioned it; the model already has a fused head; the auxiliary
            loss that its config switches on cannot be computed; a negative stash_bytes; or a grad_tol outside [0, 1).
    """
    base = unwrap(model)
    find_head(base)
    find_router_loss(base)
    check_stash_bytes(stash_bytes)
    check_grad_tol(grad_tol, grad_tol_relative)
    if is_attached(base):
        raise ValueError(f"model: was a {type(base).__name__} that already has a fused head, must be one without")

    previous = base.__dict__.get("forward")
    hook = base.register_forward_hook(_check_forward, with_kwargs=True)
    fused = _Fused(backend, stash_bytes, grad_tol, grad_tol_relative, previous, hook)
    base._sdpo_fused = fused  # type: ignore[assignment]

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


def is_attached(model: nn.Module) -> bool:
    """Whether `model`, wrapped or not, has a fused head."""
    return "_sdpo_fused" in unwrap(model).__dict__


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
        logp_source: Tensor | None = None,
        logp_rows: ScoredRows | None = None,
        logp_outputs: Sequence[str] = (),
        logp_temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if logp_targets is not None:
            scoring = _Scoring(logp_targets, logp_source, logp_rows, logp_outputs, logp_temperature)
            found, aux_loss = _fused_logps(self, args, kwargs, scoring)
            extras = {name: getattr(found, name) for name in logp_outputs}
            return LogpsOutput(logps=found.logps, **extras, aux_loss=aux_loss)

        # without targets it is the model's own forward; a forgotten target must not pass unnoticed
        for name, given in {
            "logp_source": logp_source is not None,
            "logp_rows": logp_rows is not None,
            "logp_outputs": bool(logp_outputs),
            "logp_temperature": logp_temperature != 1.0,
        }.items():
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

    defaults: dict[str, Any] = {"logp_targets": None, "logp_source": None, "logp_rows": None}
    defaults |= {"logp_outputs": (), "logp_temperature": 1.0}
    new = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=value) for n, value in defaults.items()]
    last = parameters[-1].kind == inspect.Parameter.VAR_KEYWORD
    return signature.replace(parameters=[*parameters[:-1], *new, parameters[-1]] if last else [*parameters, *new])


class _Scoring(NamedTuple):
    """What `forward` is asked to score: its own keywords, without their prefix."""

    targets: Tensor
    source: Tensor | None
    rows: ScoredRows | None
    outputs: Sequence[str]
    temperature: float


def _fused_logps(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], scoring: _Scoring
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
    source, targets = scoring.source, scoring.targets
    wanted, was = list(hidden.shape[:-1] if source is None else source.shape), list(targets.shape)
    if was != wanted:
        raise ValueError(f"logp_targets: was of shape {was}, must be {wanted}, one target for each hidden state")

    aux_loss = None
    if balance is not None and (router_logits := recorded_router_logits(base, out)):
        aux_loss = balance(router_logits, inputs.get("attention_mask"))

    flat, on_device = hidden.flatten(0, -2), targets.reshape(-1).to(hidden.device)
    if source is not None:
        flat = flat.index_select(0, source.to(hidden.device))
    options: dict[str, Any] = {
        "rows": scoring.rows,
        "outputs": scoring.outputs,
        "temperature": scoring.temperature,
        "backend": fused.backend,
        "stash_bytes": fused.stash_bytes,
        "grad_tol": fused.grad_tol,
        "grad_tol_relative": fused.grad_tol_relative,
    }
    found = head_logps(head, flat, on_device, **options)
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

    dtypes: list[torch.dtype] = []
    with evaluating(model):
        fused = model(input_ids=ids, position_ids=positions, logp_targets=targets)
        own_out = _own_forward(model, head, dtypes, input_ids=ids, position_ids=positions)
        missed = _missed(head)

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


def _own_forward(model: nn.Module, head: LMHead, dtypes: list[torch.dtype], **inputs: Tensor) -> Any:
    """The model's own output. `dtypes` gets the dtype that its head computes in, which sets the tolerance."""
    from sdpo_kernels.integrations.cut_weights import head_in_pieces

    with head_in_pieces(unwrap(model), head) as module:
        hook = module.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype))
        try:
            return model(**inputs, use_cache=False)
        finally:
            hook.remove()


def _missed(head: LMHead) -> list[str]:
    """`_unreached`; a cut head without an adapter gets its gradients in `sharded_linear_logps`, without operands."""
    if not head.is_cut or head.is_tensor_parallel:
        return _unreached(head)
    if isinstance(head.module, nn.Linear):
        return []
    from sdpo_kernels.integrations.cut_weights import gathered

    with gathered(head.module):
        return _unreached(head)


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
        given = head.operands(ones)
        weight = given.weight if given.lora_b is None else torch.cat([given.weight, given.lora_b], 1)
        total = (given.hidden.float() @ weight.float().T).sum()
        if given.bias is not None:
            total = total + given.bias.float().sum()
    gradients = torch.autograd.grad(total, [parameter for _, parameter in trainable], allow_unused=True)
    return [name for (name, _), gradient in zip(trainable, gradients, strict=True) if gradient is None]
