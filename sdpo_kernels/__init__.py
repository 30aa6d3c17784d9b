"""sdpo_kernels: fused log-probabilities and preference losses for language models, and stepwise DPO (arXiv 2403.19270).

The public names are those below; the driver is `sdpo` on the command line. Importing this imports only torch.
"""

from sdpo_kernels import losses
from sdpo_kernels.diffusion import DiffusionDPOOutput, PairedNoise, diffusion_dpo, paired_noise, sample_mse
from sdpo_kernels.dpo import FusedLinearDPOLoss, fused_linear_dpo
from sdpo_kernels.dpo_output import DPOOutput
from sdpo_kernels.logits import logits_logps
from sdpo_kernels.logps import LinearLogps, linear_logps
from sdpo_kernels.rows import ScoredRows
from sdpo_kernels.version import __version__

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
]
