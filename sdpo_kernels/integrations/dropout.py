"""Everything random in a model's forward, switched off: policy and reference must give the same log-probs."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

RANDOM_RATE = re.compile("drop|jitter")  # jitter: the noise of some mixture-of-experts routers


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
