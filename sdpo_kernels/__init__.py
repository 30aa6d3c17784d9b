"""sdpo_kernels: fused log-probabilities and preference losses for language models, and stepwise DPO (arXiv 2403.19270).

The public names are those below; the driver is `sdpo` on the command line. A name is imported when it is first used, so
that `sdpo --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdpo_kernels.version import __version__

# the same names for people's editors and type checkers, and for Python below
if TYPE_CHECKING:
    from sdpo_kernels import losses
    from sdpo_kernels.diffusion import DiffusionDPOOutput, PairedNoise, diffusion_dpo, paired_noise, sample_mse
    from sdpo_kernels.dpo import FusedLinearDPOLoss, fused_linear_dpo
    from sdpo_kernels.dpo_output import DPOOutput
    from sdpo_kernels.logits import logits_logps
    from sdpo_kernels.logps import LinearLogps, linear_logps
    from sdpo_kernels.rows import ScoredRows
    from sdpo_kernels.sharded import sharded_linear_logps
    from sdpo_kernels.vocab_parallel import vocab_parallel_linear_logps

_NAMES = {
    "diffusion": ("DiffusionDPOOutput", "PairedNoise", "diffusion_dpo", "paired_noise", "sample_mse"),
    "dpo": ("FusedLinearDPOLoss", "fused_linear_dpo"),
    "dpo_output": ("DPOOutput",),
    "logits": ("logits_logps",),
    "logps": ("LinearLogps", "linear_logps"),
    "rows": ("ScoredRows",),
    "sharded": ("sharded_linear_logps",),
    "vocab_parallel": ("vocab_parallel_linear_logps",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "DPOOutput",
    "DiffusionDPOOutput",
    "FusedLinearDPOLoss",
    "LinearLogps",
    "PairedNoise",
    "ScoredRows",
    "__version__",
    "diffusion_dpo",
    "fused_linear_dpo",
    "linear_logps",
    "logits_logps",
    "losses",
    "paired_noise",
    "sample_mse",
    "sharded_linear_logps",
    "vocab_parallel_linear_logps",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("sdpo_kernels.losses")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sdpo_kernels' has no attribute {name!r}")
    value = getattr(import_module(f"sdpo_kernels.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # from now on without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
