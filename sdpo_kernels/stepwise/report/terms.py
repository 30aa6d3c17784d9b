"""What the pictures of a run show, in words that fit its loss and its reference, and the value its loss starts at.

captions(manifest, window, [])["reward_margin"]     # one or two sentences, plain text
start_levels(manifest)                          # {1: 0.693…}: stages whose loss starts at a known value
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sdpo_kernels.losses import LossSum, loss_sum, starts_at_ln2

Record = dict[str, Any]

NAT = "Nat: the unit of log-probs; one nat less is 2.7 times less likely."
MODELS = "M₀: the initial model; Mₜ: the model after stage t."


def captions(manifest: Record, window: int, loss_terms: Sequence[str]) -> dict[str, str]:
    """The caption of each picture; `window` logged steps are averaged in a smoothed curve (1: none is).

    `loss_terms` are the names of a sum's terms, each of which has a picture.
    """
    thick = f" Thin: each logged step; thick: mean of the last {window} of them." if window > 1 else ""
    reward, margin = reward_term(manifest), "Log-prob margin: mean of log π(chosen) − log π(rejected)."
    displaced = "If chosen answers lose log-prob as well, that is likelihood displacement."
    return {
        "loss": f"{loss_term(manifest)}{thick}",
        **{f"loss_{name}": f"This term of the loss, times its weight.{thick}" for name in loss_terms},
        "rewards": f"{reward} Below 0, answers are less likely than under the reference. {displaced}{thick}"
        if has_reference(manifest)
        else f"{reward} {displaced}{thick}",
        "reward_margin": f"Mean reward of chosen minus rejected answers. {reward}{thick}",
        "reward_accuracy": "Share of a batch's pairs whose chosen answer has the higher reward; equal rewards count "
        f"half. Dashed: 50 %, no preference.{thick}",
        "logps": "Mean log π of a batch's answers, summed over their tokens; it also varies with the pairs in a batch. "
        f"{displaced} {NAT}{thick}",
        "eval_accuracy": "Pair accuracy: share of pairs where the model's log-prob of the chosen answer is higher (per "
        "token: divided by the answer's tokens). Reward accuracy: share where the reward β·(log π − log π of M₀) is. "
        f"Equal values count half. {MODELS}",
        "eval_gamma": f"{margin} {MODELS} {NAT}",
        "eval_logps": f"Mean log π of the answers, summed over their tokens. {displaced} {MODELS} {NAT}",
        "gamma_reference": f"{margin} Here of the stage's reference on the stage's own pairs: above 0 it prefers the "
        f"chosen answers before the stage trains (γ in the sDPO paper{simpo_note(manifest)}). {NAT}",
        "grad_norm": f"Length of the gradient over all weights{clipping(manifest)}.{thick}",
        "learning_rate": "The optimizer's step size; each stage has its own schedule.",
        "time": "Wall time of each stage.",
        "memory": "Highest memory during each stage.",
    }


def loss_term(manifest: Record) -> str:
    """What the loss is, and where it starts."""
    labels = list(dict.fromkeys(stage["loss"] for stage in manifest["stages"] if isinstance(stage.get("loss"), str)))
    text = f"The training loss ({', '.join(labels)}), mean over pairs." if labels else "The training loss."
    levels = set(start_levels(manifest).values())
    if not levels:
        return text
    values = ", ".join("ln 2 = 0.693" if level == math.log(2) else f"{level:.3f}" for level in sorted(levels))
    return f"{text} Dashed: {values}, its value where policy and reference are equal, as at such a stage's start."


def reward_term(manifest: Record) -> str:
    """What a reward is in this run: it depends on the reference, not on the loss."""
    references = {str(stage.get("reference")) for stage in manifest["stages"]}
    if "none" in references:
        return "Reward: β · log π, as the run has no reference."
    text = "Reward: β · (log π − log π_ref), of the model in training and the stage's reference"
    if "multi" in references:
        return f"{text}, a mixture of several models."
    if "ema" in references:
        return f"{text}, which follows the model: rewards fall at each of its updates."
    return f"{text}."


def has_reference(manifest: Record) -> bool:
    """Whether rewards are relative to a reference."""
    return all(stage.get("reference") != "none" for stage in manifest["stages"])


def simpo_note(manifest: Record) -> str:
    """A remark for runs with SimPO, whose γ is another one."""
    uses = any("simpo" in str(stage.get("loss")) for stage in manifest["stages"])
    return "; SimPO's γ is another: the margin that its loss asks for" if uses else ""


def clipping(manifest: Record) -> str:
    """Whether the gradient is clipped; 1 is TrainingArguments' default."""
    config = manifest.get("config")
    trainer = config.get("trainer") if isinstance(config, dict) else None
    most = trainer.get("max_grad_norm", 1.0) if isinstance(trainer, dict) else None
    if not isinstance(most, int | float):
        return ""
    return f", before it is clipped to {most:g} (max_grad_norm)" if most > 0 else "; it is not clipped"


def start_levels(manifest: Record) -> dict[int, float]:
    """The loss at policy = reference of the stages that start there, by index, where it is known for every pair."""
    wanted = run_loss(manifest)
    levels: dict[int, float] = {}
    for stage in manifest["stages"]:
        label = stage.get("loss", "sigmoid")
        if wanted is not None and wanted.label == label:
            level = wanted.start_value
        else:
            level = math.log(2) if isinstance(label, str) and starts_at_ln2(label) else None
        if level is not None and starts_as_reference(stage):
            levels[stage["index"]] = level
    return levels


def run_loss(manifest: Record) -> LossSum | None:
    """The loss in the manifest's config; None if it has none that this version knows."""
    config = manifest.get("config")
    if not isinstance(config, dict):
        return None
    try:
        return loss_sum(config.get("loss", "sigmoid"), config.get("loss_options") or {})
    except (ValueError, TypeError):
        return None


def starts_as_reference(stage: Record) -> bool:
    """Whether the stage's policy is its own reference before its first step; an old record does not say."""
    reference, policy = stage.get("reference", "previous"), stage.get("policy", "previous")
    if reference in ("multi", "guiding", "none"):
        return False
    # a moving reference starts at the policy, and before the first stage all are the initial model
    return reference == "ema" or stage["index"] == 1 or reference == policy
