"""What to change in a run that does not fit, in the order of what costs least, and what each change would bring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from sdpo_kernels.stepwise.memory.of_run import Task
from sdpo_kernels.stepwise.memory.plan import Plan
from sdpo_kernels.stepwise.memory.setup import Setup
from sdpo_kernels.stepwise.settings.lora import LoraSettings

WORTH = 0.99  # of what a run takes: shorter sequences must bring it below that


@dataclass(frozen=True)
class Change:
    """One change of the settings."""

    text: str  # as in run.yaml
    alone: Plan  # the run with this change only
    together: Plan  # with those before it, too


def changes(task: Task, plan: Plan, *, quantises: bool) -> Iterator[Change]:
    """What makes `plan` smaller, up to the first change that fits with those before it; `quantises`: QLoRA is one."""
    so_far = plan
    for suggest in (_checkpointing, _fewer_pairs, _fewer_scored, _shorter, _sharded, _lora, _qlora):
        alone, together = suggest(plan.setup), suggest(so_far.setup)
        if alone is None or together is None or (suggest is _qlora and not quantises):
            continue

        change = Change(together[0], task.plan(alone[1]), task.plan(together[1]))
        # the end of long answers is not worth a hundredth, unless that is what lacks
        needed = WORTH if suggest is _shorter and not change.together.fits else 1
        if change.together.total >= so_far.total * needed:
            continue
        so_far = change.together
        yield change
        if so_far.fits:
            return


Suggestion = tuple[str, Setup] | None


def _checkpointing(setup: Setup) -> Suggestion:
    if setup.checkpointing:
        return None
    return "trainer: {gradient_checkpointing: true}", replace(setup, checkpointing=True)


def _fewer_pairs(setup: Setup) -> Suggestion:
    """One pair at a time, as many in a step. Under FSDP2 gradients would else be kept whole over a step."""
    if setup.pairs == 1:
        return None
    steps = setup.accumulation * setup.pairs
    text = f"per_device_train_batch_size: 1, gradient_accumulation_steps: {steps}"
    if setup.sharded and not setup.syncs_each:
        text += ", accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}"
    return f"trainer: {{{text}}}", replace(setup, pairs=1, accumulation=steps, syncs_each=setup.sharded)


def _fewer_scored(setup: Setup) -> Suggestion:
    if setup.scored_pairs == 1:
        return None
    return "trainer: {per_device_eval_batch_size: 1}", replace(setup, scored_pairs=1)


def _shorter(setup: Setup) -> Suggestion:
    shorter = setup.max_length // 2
    return (f"max_length: {shorter}", replace(setup, max_length=shorter)) if shorter >= 256 else None


def _sharded(setup: Setup) -> Suggestion:
    if setup.sharded or setup.gpus == 1 or setup.follows or setup.tp > 1:
        return None
    text = "trainer: {fsdp: true}" + ", grad_tol: 0" * (setup.grad_tol > 0)  # a divided head leaves nothing out
    return text, replace(setup, sharded=True, syncs_each=setup.accumulation > 1, grad_tol=0.0)


def _lora(setup: Setup) -> Suggestion:
    if setup.lora is not None or setup.tp > 1:
        return None
    return "lora: {r: 16}, dtype: bfloat16", replace(setup, lora=LoraSettings(), dtype=torch.bfloat16)


def _qlora(setup: Setup) -> Suggestion:
    """Each GPU has the whole base, in four bits."""
    if setup.quantization is not None or setup.tp > 1:
        return None
    lora = setup.lora or LoraSettings()
    settings = {"bits": 4, "double": True}
    changed = replace(setup, lora=lora, dtype=torch.bfloat16, quantization=settings, sharded=False)
    return "lora: {r: 16}, dtype: bfloat16, quantization: {bits: 4}", changed
