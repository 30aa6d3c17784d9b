"""One rank's part of a tensor-parallel model (`tp_size`): the plan that transformers has for it says what is divided.

with one_part(model, 8):
    sizes = _sizes(model, setup)      # of an eighth of every divided weight
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdpo_kernels.stepwise.memory.activations import Activations


@contextmanager
def one_part(model: Any, ranks: int) -> Iterator[None]:
    """Within the block each divided weight of `model`, on the meta device, is what one of `ranks` holds of it."""
    plan = (getattr(model, "tp_plan", None) or {}) if ranks > 1 else {}
    kept = [(weight, weight.data) for name, weight in model.named_parameters() if _is_divided(name, plan)]
    try:
        for weight, data in kept:
            weight.data = data[: -(-len(data) // ranks)]  # which dimension is divided makes no difference in bytes
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def _is_divided(name: str, plan: dict[str, str]) -> bool:
    """Whether the plan, which names modules or weights, divides the weight by columns or by rows."""
    general = re.sub(r"\.\d+(?=\.)", ".*", name)
    style = plan.get(general) or plan.get(general.rpartition(".")[0]) or ""
    return "colwise" in style or "rowwise" in style


def divide(found: Activations, whole: Any, part: Any) -> None:
    """Take from what a whole model's layers have what belongs to weights (`Sizes`) that one rank has a part of.

    The rest stays that of whole layers, which is at least what a rank has.
    """
    heaviest = found.heaviest
    found.backward_work -= whole.layers[heaviest].gradients - part.layers[heaviest].gradients
    for layer, before, after in zip(found.layers, whole.layers, part.layers, strict=True):
        layer.copies = layer.copies * after.numbers // before.numbers
        layer.cached = layer.cached * after.numbers // before.numbers
