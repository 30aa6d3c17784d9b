"""OpenRLHF's own command line, whole, on the CPU: python -m openrlhf.cli.train_dpo, stock and with our adapter.

Its argument parser, Actor, RewardDataset, DistributedSampler, DeepspeedStrategy and DPOTrainer are its own, and so is
DeepSpeed (ZeRO-2, its CPU accelerator). Replaced: three functions of torch.cuda, the device mesh's device, and the
dtype, because the command line offers bfloat16 and float16 only.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.trainers.openrlhf_checks import check_actor
from benchmarks.trainers.problem import PAIRS_A_STEP
from benchmarks.trainers.recorder import Recorder, parse_options

WAYS = ("stock", "adapter")


def main() -> None:
    """Run one way."""
    options = parse_options(WAYS)
    run_on_the_cpu(options.output.parent / "extensions")
    recorder, heads = Recorder(), list[int]()
    record(recorder, heads)

    command = arguments(options.problem, options.output, options.steps)
    replaced = []
    if options.way == "adapter":
        from sdpo_kernels.integrations import openrlhf

        openrlhf.main(["train_dpo", *command])
        replaced = ["Actor.forward", "DPOTrainer.concatenated_forward"]
    else:
        sys.argv = ["train_dpo", *command]
        runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__", alter_sys=True)

    # a policy and a reference a step; the adapter never calls the head
    expected = 2 * options.steps if options.way == "stock" else 0
    if len(heads) != expected:
        raise RuntimeError(f"lm_head was called {len(heads)} times, must be {expected}")
    if options.way == "adapter":
        check_actor(options.output / "tiny")
    recorder.write(options, ["openrlhf", "deepspeed", "transformers"], replaced)


def arguments(problem: Path, output: Path, steps: int) -> list[str]:
    """The command line of train_dpo."""
    given = {
        "--model.model_name_or_path": problem / "model",
        "--data.dataset": problem / "pairs.jsonl",
        "--data.prompt_key": "prompt",
        "--data.max_samples": steps * PAIRS_A_STEP,
        "--train.batch_size": PAIRS_A_STEP,
        "--train.micro_batch_size": PAIRS_A_STEP,
        "--ds.attn_implementation": "sdpa",
        "--adam.lr": 1e-4,
        "--ckpt.output_dir": output,
    }
    return [str(word) for pair in given.items() for word in pair]


def run_on_the_cpu(extensions: Path) -> None:
    """What a launcher sets, for one process, and a CPU in the place of CUDA."""
    # a killed run leaves its lock, for which the next one would wait for ever
    for lock in extensions.glob("*/lock"):
        lock.unlink()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "TORCH_EXTENSIONS_DIR": str(extensions.resolve()),
    }
    # one function for each: torch.compile refuses two names of one
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_device = lambda: "cpu"

    from openrlhf.utils import utils
    from openrlhf.utils.deepspeed import deepspeed as strategy

    make_mesh, init = strategy.init_device_mesh, strategy.DeepspeedStrategy.__init__
    strategy.init_device_mesh = lambda kind, *args, **kwargs: make_mesh("cpu", *args, **kwargs)

    def init_float32(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.param_dtype = "float32"

    strategy.DeepspeedStrategy.__init__ = init_float32
    utils.convert_to_torch_dtype = lambda name: torch.float32


def record(recorder: Recorder, heads: list[int]) -> None:
    """Losses and steps of the strategy, the peak of DPOTrainer.fit, and each call of a head."""
    from openrlhf.trainer.dpo_trainer import DPOTrainer
    from openrlhf.utils.deepspeed import DeepspeedStrategy

    fit, backward, step = DPOTrainer.fit, DeepspeedStrategy.backward, DeepspeedStrategy.optimizer_step
    losses: list[float] = []

    def recorded_fit(self: Any, *args: Any, **kwargs: Any) -> None:
        for actor in (self.model, self.ref_model):
            head = actor.model.module.get_output_embeddings()
            head.register_forward_hook(lambda *args: heads.append(1))
        recorder.run(lambda: fit(self, *args, **kwargs))

    def recorded_backward(self: Any, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(self, loss, *args, **kwargs)

    def recorded_step(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        recorder.step(losses[-1])

    DPOTrainer.fit = recorded_fit
    DeepspeedStrategy.backward, DeepspeedStrategy.optimizer_step = recorded_backward, recorded_step


if __name__ == "__main__":
    main()
