"""The auxiliary loss of a mixture-of-experts model, which keeps its router from always choosing the same experts.

    balance = find_router_loss(model)        # None: no router, or config.output_router_logits is off
    aux_loss = balance(out.router_logits, attention_mask)

As in transformers' own training and in TRL, `config.output_router_logits` switches it on, and the loss grows by
`config.router_aux_loss_coef` times it. The function is the one in the model's own file (`load_balancing_loss_func`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from sdpo_kernels.integrations.lm_head import unwrap

PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # of load_balancing_loss_func
EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "moe_k")


@dataclass(frozen=True)
class RouterLoss:
    """A model's auxiliary loss of its routers."""

    function: Callable[..., Tensor]
    n_experts: int
    n_chosen: int  # experts per token
    coefficient: float  # of the auxiliary loss in the loss

    def __call__(self, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
        """The auxiliary loss (a scalar) of all layers; padding does not count."""
        return self.function(router_logits, self.n_experts, self.n_chosen, attention_mask)


def find_router_loss(model: nn.Module, wanted: bool | None = None) -> RouterLoss | None:
    """The auxiliary loss of `model`; None if it has none, or if `wanted` (None: its config) switches it off.

    Raises:
        ValueError: it is switched on, and the model's own loss cannot be called or is not given the router logits.
    """
    base = unwrap(model)
    text: Any = base.config.get_text_config()  # type: ignore[union-attr, operator]
    if not (getattr(text, "output_router_logits", False) if wanted is None else wanted):
        return None

    # FSDP2 makes the model's class a subclass of its own module
    kinds = [kind for kind in type(base).__mro__ if hasattr(sys.modules[kind.__module__], "load_balancing_loss_func")]
    function = sys.modules[kinds[0].__module__].load_balancing_loss_func if kinds else None
    if function is None:
        return None  # some models return router logits and have no auxiliary loss

    n_experts, n_chosen = _first(base, text, EXPERTS), _first(base, text, CHOSEN)
    if list(inspect.signature(function).parameters) != PARAMETERS or n_experts is None or n_chosen is None:
        raise ValueError(
            f"config.output_router_logits: was true, must be false for a {type(base).__name__}, whose auxiliary "
            "loss of the router takes other arguments than those known here"
        )

    # what each transformers model of `base` records of its layers; older code has no such list and appends to a tuple
    recorded = [names for module in base.modules() if (names := getattr(module, "_can_record_outputs", None))]
    if recorded and not any("router_logits" in names for names in recorded):
        raise _not_returned(base)
    return RouterLoss(function, n_experts, n_chosen, router_coefficient(base))


def recorded_router_logits(model: nn.Module, out: Any) -> tuple[Tensor, ...]:
    """The router logits of each layer in `out`, the body's output; empty if no layer has a router.

    Raises:
        ValueError: the body returned none, so the loss would silently lack what the config asks for.
    """
    found = getattr(out, "router_logits", None)
    if found is None:
        raise _not_returned(unwrap(model))
    return found


def _not_returned(base: nn.Module) -> ValueError:
    """GraniteMoe's models and DBRX of transformers 5.17 compute router logits and return none of them."""
    return ValueError(
        f"config.output_router_logits: was true, must be false for a {type(base).__name__} of transformers "
        f"{version('transformers')}, which returns no router logits; other versions of transformers may return them"
    )


def router_coefficient(model: nn.Module) -> float:
    """The coefficient of the auxiliary loss in the loss."""
    base = unwrap(model)
    found = _first(base.config.get_text_config(), base, ("router_aux_loss_coef", "aux_loss_coef"))  # type: ignore[union-attr, operator]
    return 0.0 if found is None else float(found)


def unused_coefficient(config: Any) -> str | None:
    """A warning if `config` has a coefficient for the auxiliary loss and does not switch that loss on, or None."""
    text = config.get_text_config()
    coefficient = getattr(text, "router_aux_loss_coef", None)
    has_experts = any(getattr(text, name, None) for name in EXPERTS)
    if not coefficient or not has_experts or getattr(text, "output_router_logits", False):
        return None
    return (
        f"router_aux_loss_coef is {coefficient:g} but output_router_logits is false in the model's config, so the loss "
        "has no auxiliary loss of the router; set output_router_logits to true in config.json to add it"
    )


def _first(first: Any, second: Any, names: tuple[str, ...]) -> Any:
    """The first of the attributes `names` that one of two objects has, not None."""
    found = (getattr(place, name, None) for place in (first, second) for name in names)
    return next((value for value in found if value is not None), None)
