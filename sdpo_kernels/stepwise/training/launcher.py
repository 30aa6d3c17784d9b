"""The processes of a run: whether a stage needs a launcher to start them, and how they share the model."""

from __future__ import annotations

import os
from pathlib import Path

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import read_json
from sdpo_kernels.stepwise.models.precision import asks_for_deepspeed, asks_for_fsdp
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments


def require_launcher(config: RunConfig, folder: Path) -> None:
    """UserError if a stage that is not done asks for FSDP or DeepSpeed and was started without torchrun, or for FSDP
    by accelerate's launcher with a setting that it does not go with.

    This comes before any model is loaded: one that needs several GPUs does not fit one.
    """
    path = folder / "manifest.json"
    stages = read_json(path).get("stages", []) if path.exists() else []
    done = {stage["name"] for stage in stages if stage["state"] == "done"}
    if config.tiers is not None and stages and len(done) == len(stages):
        return  # tiers have names of their own

    for stage in config.stages:
        if stage.name in done:
            continue
        args = training_arguments(config, stage, folder, folder)
        if asks_for_fsdp(args) and config.grad_tol:  # trainer.fsdp is looked at with the settings
            raise UserError(
                f"grad_tol: was {config.grad_tol}, must be 0 with FSDP, which accelerate's launcher asks for: a "
                "divided head leaves nothing out"
            )
        if asks_for_fsdp(args) and ranks.launched() == 1:
            raise UserError(
                "trainer.fsdp: needs several processes; start them with torchrun --nproc_per_node 8 -m sdpo_kernels … "
                "(docs/distributed.md)"
            )
        if asks_for_deepspeed(args) and "RANK" not in os.environ:
            raise UserError(
                "trainer.deepspeed: needs a launcher, also for one process: torchrun --nproc_per_node 1 -m "
                "sdpo_kernels …"
            )


def way_in_words(config: RunConfig, folder: Path) -> str:
    """How the processes of a run share the model, by its first stage."""
    count, args = ranks.world_size(), training_arguments(config, config.stages[0], folder, folder)
    if config.tp_size > 1:
        return f"{count}, tensor parallel: together they hold one model"
    if asks_for_deepspeed(args):
        return f"{count}, DeepSpeed"
    if asks_for_fsdp(args):
        return f"{count}, FSDP2: each holds its share of the model"
    return f"{count}, DDP: each holds the whole model (to divide it: docs/distributed.md)"
