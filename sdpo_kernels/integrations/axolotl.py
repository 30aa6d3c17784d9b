"""axolotl's DPO, IPO, KTO and GRPO trainers on these kernels: a plugin, switched on in the YAML.

    plugins: [sdpo_kernels.integrations.axolotl.FusedHeadPlugin]
    fused_head_stash_bytes: 0          # optional: the least memory; each setting of `trl.patch` is a key

axolotl's preference trainers are subclasses of TRL's, so the plugin calls `trl.patch()` before the model is loaded and
undoes it after training. TRL 1.14 reaches the fused head only with `use_liger_kernel=True`, which axolotl spells
`dpo_use_liger_kernel` for DPO and `trl.use_liger_loss` for GRPO, and not at all for KTO. The plugin sets it:

- left out in the YAML: TRL takes its way through the head, and the model's layers stay as they are;
- true: as axolotl has it, Liger's layers are put into the model, too;
- false: an error, because nothing would be reached.

TRL then refuses what this way cannot do, and its message names `use_liger_kernel`: `dpo_use_weighting`, an adapter on
lm_head, prompt tuning, a router's auxiliary loss. liger-kernel must be installed (axolotl requires it on Linux).

Only axolotl imports this module; it needs axolotl at import. Written from and run with axolotl 0.21.0 (TRL 1.14.1).
"""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from sdpo_kernels.integrations import trl as fused_trl
from sdpo_kernels.integrations import trl_versions as versions

logger = logging.getLogger("axolotl.plugins.sdpo_kernels")  # axolotl shows INFO of its own loggers only

OPTIONS = {  # values of `rl`, and the YAML's option that TRL 1.14 needs, if axolotl has one
    "dpo": ("dpo_use_liger_kernel",),
    "ipo": ("dpo_use_liger_kernel",),
    "kto": (),
    "grpo": ("trl", "use_liger_loss"),
    "gdpo": ("trl", "use_liger_loss"),
}


class FusedHeadArgs(BaseModel):
    """The plugin's own keys of the YAML."""

    fused_head_backend: str = "auto"
    fused_head_stash_bytes: int | str = "auto"
    fused_head_grad_tol: float = 0.0
    fused_head_grad_tol_relative: bool = False


class FusedHeadPlugin(BasePlugin):
    """Scores tokens with `linear_logps` in axolotl's DPO, IPO, KTO and GRPO."""

    def get_input_args(self) -> str:
        """Where axolotl finds the plugin's keys."""
        return f"{FusedHeadArgs.__module__}.{FusedHeadArgs.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        """Patch TRL.

        Raises:
            ValueError: a setting with which axolotl's trainer does not reach the fused head, or a wrong one of the
                plugin's own.
            ImportError, RuntimeError: TRL is missing, or its version is not known (see `trl.patch`).
        """
        _check(cfg)
        fused_trl.patch(
            backend=cfg.fused_head_backend,
            stash_bytes=cfg.fused_head_stash_bytes,
            grad_tol=cfg.fused_head_grad_tol,
            grad_tol_relative=cfg.fused_head_grad_tol_relative,
        )

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        """The training arguments with which TRL 1.14's trainers reach the head; none from 1.15 on."""
        version = versions.installed()
        scores = f"TRL {versions.text(version)} scores tokens without logits (sdpo_kernels)"
        if versions.seam_of(version).logits_path is None:
            logger.info(scores)
            return None
        if _option(cfg):
            logger.info(scores)
            return {"use_liger_kernel": True}
        logger.info("%s; the plugin has set use_liger_kernel, which TRL needs, without Liger's layers", scores)
        return {"use_liger_kernel": True, "liger_kernel_config": fused_trl.LIGER_LAYERS_OFF}

    def post_train_unload(self, cfg: Any) -> None:
        """Put TRL's own class back."""
        fused_trl.unpatch()


def _check(cfg: Any) -> None:
    """ValueError where axolotl's trainer would not reach the head."""
    rl = getattr(cfg.rl, "value", cfg.rl)
    if rl not in OPTIONS:
        raise ValueError(f"rl: was {rl!r}, must be one of {', '.join(OPTIONS)} for FusedHeadPlugin")
    if _option(cfg) is False and versions.seam_of(versions.installed()).logits_path is not None:
        name = ".".join(OPTIONS[rl])
        raise ValueError(f"{name}: was false, must be true or left out for FusedHeadPlugin, which TRL reaches only so")
    for name in ("async_prefetch", "use_data_producer"):
        if rl in ("grpo", "gdpo") and cfg.trl and cfg.trl.get(name):
            raise ValueError(f"trl.{name}: was true, must be false for FusedHeadPlugin: that trainer computes logits")


def _option(cfg: Any) -> bool | None:
    """The YAML's own choice of use_liger_kernel; None if it was left out, or if there is no such key."""
    names = OPTIONS[getattr(cfg.rl, "value", cfg.rl)]
    value: Any = cfg
    for name in names:
        value = (value or {}).get(name)
    return value if names else None
