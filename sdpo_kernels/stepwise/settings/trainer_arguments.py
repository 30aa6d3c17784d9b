"""Builds the transformers.TrainingArguments of a stage from the user's fields and the driver's own."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings.deepspeed import deepspeed_config, require_match
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig


def training_arguments(config: RunConfig, stage: StageConfig, work: Path, tensorboard: Path) -> TrainingArguments:
    """The TrainingArguments of `stage`.

    1. Fill in what depends on the machine: `use_cpu`, the TensorBoard folder.
    2. Build TrainingArguments from the user's fields and the driver's own.
    3. Correct what TrainingArguments decides by itself: DataParallel, DDP's options.

    Args:
        config: Settings of the run.
        stage: Settings of the stage.
        work: Folder for the Trainer's checkpoints.
        tensorboard: Folder for TensorBoard logs.

    Raises UserError if transformers refuses the fields, or fp16 has no GPU.
    """
    settings = copy.deepcopy(config.stage_trainer(stage))  # transformers writes into fsdp_config

    # without it accelerate would see a single process only
    if ranks.launched() > 1 and not torch.accelerator.is_available():
        settings.setdefault("use_cpu", True)

    # Trainer's TensorBoard callback has no other way to set the folder
    if "tensorboard" in settings.get("report_to", "none"):
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(tensorboard)

    try:
        if settings.get("deepspeed"):
            settings["deepspeed"] = deepspeed_config(settings["deepspeed"])
        args = TrainingArguments(
            **settings,
            output_dir=str(work),
            num_train_epochs=stage.epochs,
            remove_unused_columns=False,
            label_names=[],
            disable_tqdm=True,
            logging_first_step=True,
            logging_nan_inf_filter=False,
        )
        require_match(args)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {(str(error).splitlines() or [''])[0]}") from error

    # with several GPUs Trainer would use DataParallel, which splits packed batches in the middle of sequences
    if args.n_gpu > 1:
        args._n_gpu = 1

    # several ranks on the CPU have the devices cpu:0 and cpu:1, but torch.load knows only cpu: with transformers 5.17
    # they could not resume
    if args.device.type == "cpu":
        args._setup_devices = torch.device("cpu")

    # DDP broadcasts buffers once per forward; with different numbers of groups per batch, ranks would deadlock
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False

    # the search for unused parameters walks the graph at every step, and there are hardly ever any
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False

    # accelerate would silently ignore fp16 on a CPU
    if args.fp16 and args.device.type == "cpu":
        raise UserError("trainer.fp16: was true, which needs a GPU; on a CPU use bf16")
    return args
