"""Pair losses: a few lines of arithmetic each on [B]-sized tensors, found by name in one registry.

    losses.pair_loss("sigmoid", pair, beta=0.1, label_smoothing=0.1)    # -> [B]
    losses.pair_loss([{"name": "sigmoid", "weight": 0.8}, {"name": "sft"}], pair, beta=0.1)

Autograd on these small tensors computes the coefficients that the kernels' backward needs, so a new loss cannot drift
from the kernels. An entry's keyword-only arguments are its options; any other option is an error. Its `Loss`
(registry.py) tells what it needs in addition to summed log-probs.
"""

from sdpo_kernels.losses import margin, reference_free, rewards  # noqa: F401 - importing them registers their losses
from sdpo_kernels.losses.margin import diffusion_dpo
from sdpo_kernels.losses.pair_logps import PairLogps
from sdpo_kernels.losses.registry import Loss, PairLoss, loss_names, loss_options, register, starts_at_ln2
from sdpo_kernels.losses.sums import LossSum, LossType, Term, check_loss, loss_sum, pair_loss

__all__ = [
    "Loss",
    "LossSum",
    "LossType",
    "PairLogps",
    "PairLoss",
    "Term",
    "check_loss",
    "diffusion_dpo",
    "loss_names",
    "loss_options",
    "loss_sum",
    "pair_loss",
    "register",
    "starts_at_ln2",
]
