"""transformers.TrainingArguments of a stage: the person's fields and those the driver owns."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig


def training_arguments(config: RunConfig, stage: StageConfig, work: Path, tensorboard: Path) -> TrainingArguments:
    """The arguments of `stage`, whose Trainer works in the folder `work`. UserError where transformers refuses them."""
    settings = copy.deepcopy(config.stage_trainer(stage))  # transformers writes into fsdp_config
    if ranks.launched() > 1 and not torch.accelerator.is_available():
        settings.setdefault("use_cpu", True)  # else accelerate would know of one process
    if "tensorboard" in settings.get("report_to", "none"):
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(tensorboard)  # Trainer's callback reads nothing else
    try:
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
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {(str(error).splitlines() or [''])[0]}") from error
    if args.n_gpu > 1:
        args._n_gpu = 1  # else Trainer wraps the model in DataParallel, which would cut packed batches anywhere
    if args.ddp_broadcast_buffers is None:
        # one broadcast a forward: processes whose padded batches have other numbers of groups would wait for ever
        args.ddp_broadcast_buffers = False
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every step walks the graph for them, and there seldom are any
    if args.fp16 and args.device.type == "cpu":  # accelerate would leave it out without a word
        raise UserError("trainer.fp16: was true, which needs a GPU; on a CPU use bf16")
    return args
