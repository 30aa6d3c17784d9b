"""The ranks of a run as torchrun starts them: children of runs.py's server on gloo, one thread each, ended together.

`Ranks` ends the others if one fails, as torchrun does, and all of them after `seconds`: a hang fails its test.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from sdpo_kernels.integrations.cut_weights import is_cut
from sdpo_kernels.integrations.lm_head import find_head
from sdpo_kernels.stepwise import run as run_module
from sdpo_kernels.stepwise.common import ranks as ranks_module
from sdpo_kernels.stepwise.models import cut_saving
from sdpo_kernels.stepwise.models.load import weights_hash
from sdpo_kernels.stepwise.models.zero import partition
from sdpo_kernels.stepwise.training import publish
from tests.stepwise.runs import Child


class Ranks:
    """`sdpo ARGUMENTS` on `count` ranks; `fault(rank, *options)` is called on each."""

    def __init__(self, folder: Path, *arguments: Any, count: int = 2, fault: Any = None, options: Any = ()):
        port = _free_port()
        self.children = [
            Child(folder, *arguments, fault=_enter, options=(rank, count, port, fault, tuple(options)))
            for rank in range(count)
        ]

    def wait(self, seconds: float = 60.0) -> list[int]:
        """The exit codes by rank; -SIGTERM for ranks ended because another one failed."""
        end = time.monotonic() + seconds
        while any(child.process.is_alive() for child in self.children):
            assert time.monotonic() < end, self._stop(signal.SIGKILL) or f"hung after {seconds} s: {self.text}"
            if any(child.process.exitcode not in (None, 0) for child in self.children):
                self._wait_for_all(0.5)
                self._stop(signal.SIGTERM)
                self._wait_for_all(2.0)
                self._stop(signal.SIGKILL)
            time.sleep(0.02)
        return [child.process.exitcode for child in self.children]

    def _wait_for_all(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while any(child.process.is_alive() for child in self.children) and time.monotonic() < end:
            time.sleep(0.02)

    def _stop(self, number: int) -> None:
        for child in self.children:
            child.signal(number)

    @property
    def texts(self) -> list[str]:
        return [child.text for child in self.children]

    @property
    def text(self) -> str:
        return "\n".join(f"[{rank}] {text}" for rank, text in enumerate(self.texts))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _enter(rank: int, count: int, port: int, fault: Callable[..., None] | None, options: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["OMP_NUM_THREADS"] = "1"
    run_module.write_report = lambda folder: []
    disable_progress_bar()  # `main` does so only if transformers is not imported yet
    if fault is not None:
        fault(rank, *options)


# ---- faults ----


def note_weights(rank: int, folder: Path) -> None:
    """Each rank writes the hash of its weights after each stage."""
    genuine = publish.gathered

    def gathered(trainer: Any) -> Any:
        name = f"{trainer.stage}-{rank}"
        (folder / name).write_text(weights_hash(trainer.accelerator.unwrap_model(trainer.model)))
        return genuine(trainer)

    publish.gathered = gathered


def die_at(rank: int, stage: str, step: int, victims: tuple[int, ...]) -> None:
    """kill -9 the ranks `victims` before optimiser step `step` (from 1)."""
    from sdpo_kernels.stepwise.training.trainer import StageTrainer

    genuine = StageTrainer.training_step

    def training_step(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if rank in victims and self.stage == stage and self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(self, *args, **kwargs)

    StageTrainer.training_step = training_step


def note_pairs(rank: int, folder: Path, killed_at: int) -> None:
    """Each rank writes which pairs its steps train on, without fillers, before each step; it may be killed at one."""
    if killed_at:
        die_at(rank, "s1", killed_at, (0, 1))
    from sdpo_kernels.stepwise.training.trainer import StageTrainer

    genuine = StageTrainer.training_step
    seen: list[int] = []

    def training_step(self: StageTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(inputs["pair_index"].tolist() if inputs["pairs"] else [])
        (folder / f"{rank}.json").write_text(json.dumps(seen))
        return genuine(self, model, inputs, *args, **kwargs)

    StageTrainer.training_step = training_step


def saves_wrongly(rank: int, sharded: bool) -> None:
    """What is saved is not what was trained: a weight of the folder is doubled, or the shards that are sent are."""
    if sharded:
        fsdp_on_cpu(rank, 0)
        genuine_weights = publish.weights_of

        def weights_of(model: Any) -> Any:
            weights = genuine_weights(model)
            return {name: weight * (2 if "down_proj" in name else 1) for name, weight in weights.items()}

        publish.weights_of = weights_of
        return

    genuine = publish._write

    def write(*args: Any) -> Path:
        staging = genuine(*args)
        weights = load_file(staging / "model.safetensors")
        weights = {name: weight * (2 if "down_proj" in name else 1) for name, weight in weights.items()}
        save_file(weights, staging / "model.safetensors", {"format": "pt"})
        return staging

    publish._write = write


def other_beta_in(rank: int, victim: int) -> None:
    """One rank is started with other settings."""
    if rank == victim:
        sys.argv.append("beta=0.2")


def die_in(rank: int, victim: int, place: str) -> None:
    """kill -9 one rank of a cut model: at its second batch of the references, backward of a step, or piece to save."""
    fsdp_on_cpu(rank)
    from sdpo_kernels.stepwise.data.batches import Batch

    holder, name = {
        "scoring": (Batch, "logps"),
        "training": (torch.Tensor, "backward"),
        "saving": (cut_saving, "pieces"),
    }[place]
    genuine, calls = getattr(holder, name), iter(range(1000))

    def dying(*args: Any, **kwargs: Any) -> Any:
        if rank == victim and next(calls) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return genuine(*args, **kwargs)

    setattr(holder, name, dying)


def no_grace(rank: int) -> None:
    """Ranks do not wait for a launcher to end them."""
    ranks_module.GRACE = 0.0


def stale_in(rank: int, victim: int) -> None:
    """One rank's reference log-probs are wrong: its own check fails, and no other."""
    from sdpo_kernels.stepwise.data import batches as collate

    genuine = collate.Batch.of.__func__

    def of(cls: Any, inputs: Any) -> Any:
        return genuine(cls, inputs | ({"ref_logps": inputs["ref_logps"] + 1} if rank == victim else {}))

    collate.Batch.of = classmethod(of)


def fsdp_on_cpu(rank: int, killed_at: int = 0, head_is_cut: bool = True, checkpointed: bool = False) -> None:
    """Make accelerate accept FSDP on CPUs. A model that is not sharded is an error, and so is a head that was ever
    gathered, if `head_is_cut`, and layers that are computed again in the backward, unless
    `checkpointed`."""
    if killed_at:
        die_at(rank, "s1", killed_at, (0, 1))
    gathered = publish.gathered

    def of_shards(trainer: Any) -> Any:
        assert is_cut(trainer.model)
        layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        assert all(layer.gradient_checkpointing == checkpointed for layer in layers)
        head = find_head(trainer.model).module
        if head_is_cut:
            (held,) = fully_shard.state(head)._fsdp_param_group.fsdp_params
            assert not hasattr(held, "_unsharded_param")
        return gathered(trainer)

    publish.gathered = of_shards
    from accelerate import state
    from accelerate.utils import DistributedType

    genuine = state.AcceleratorState.__init__

    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        fresh = not self._shared_state
        genuine(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and fsdp_plugin is not None:
            self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = __init__
    torch.set_num_threads(1)


def zero3_is_partitioned(rank: int) -> None:
    """After a stage no rank may hold any weight whole, the head included."""
    genuine = publish.gathered

    def gathered(trainer: Any) -> Any:
        assert any(partition(weight) is not None for weight in trainer.model.parameters())
        held = [name for name, weight in trainer.model.named_parameters() if weight.numel()]
        assert not held, held
        return genuine(trainer)

    publish.gathered = gathered


def model_is_halved(rank: int) -> None:
    """After a stage each of two tensor-parallel ranks must hold half of every matrix, and the same norms."""
    genuine = publish.gathered

    def gathered(trainer: Any) -> Any:
        matrices = {name: weight for name, weight in trainer.model.named_parameters() if weight.dim() == 2}
        whole = [name for name, weight in matrices.items() if 2 * weight.to_local().numel() != weight.numel()]
        assert not whole, whole
        return genuine(trainer)

    publish.gathered = gathered
