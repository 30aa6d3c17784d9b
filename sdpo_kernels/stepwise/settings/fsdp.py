"""The field `fsdp_config` of `trainer`: transformers ignores a key of it that it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# those that transformers 4.57 to 5.23 and accelerate read, without the prefix fsdp_ that each may have
FSDP_KEYS = frozenset(
    {
        "activation_checkpointing",
        "auto_wrap_policy",
        "backward_prefetch",
        "cpu_offload",
        "cpu_ram_efficient_loading",
        "forward_prefetch",
        "ignored_modules",
        "limit_all_gathers",
        "min_num_params",
        "offload_params",
        "reshard_after_forward",
        "state_dict_type",
        "sync_module_states",
        "transformer_layer_cls_to_wrap",
        "use_orig_params",
        "version",
        "xla",
        "xla_fsdp_grad_ckpt",
        "xla_fsdp_settings",
        "xla_fsdp_v2",
    }
)


def check_fsdp_config(keys: Iterable[object]) -> None:
    """ValueError for a key that is nearly a known one. Others pass: a later transformers may know them."""
    for key in map(str, keys):
        name = key.removeprefix("fsdp_")
        near = difflib.get_close_matches(name, sorted(FSDP_KEYS), n=1, cutoff=0.85)
        if near and name not in FSDP_KEYS:
            raise ValueError(f"{key}: unknown key; did you mean {near[0]!r}?")
