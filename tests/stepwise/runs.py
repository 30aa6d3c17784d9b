"""Tiny runs for the driver's tests: a random model with a tokenizer of its own, generated pairs, settings, digests.

Nothing outside the repository is needed. `Child` runs a whole `sdpo` command in a process that can be killed: a fork of
a server that has imported everything once, with one thread.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama  # noqa: F401 - imported here so that forked children need not
from transformers.trainer import Trainer  # noqa: F401

from sdpo_kernels.cli import main
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings import yaml_file
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.training.trainer import StageTrainer

GOOD = [f"good{i}" for i in range(12)]
BAD = [f"bad{i}" for i in range(12)]
PLAIN = [f"word{i}" for i in range(16)]
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *GOOD, *BAD, *PLAIN]
CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a word of VOCABULARY."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special | options)


def make_model(folder: Path, *, seed: int = 0, spread: float = 0.3, **options: Any) -> Path:
    """A random Llama of a few thousand parameters with its tokenizer, saved in `folder`."""
    settings: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**settings | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, spread)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0, longest: int = 5) -> list[dict[str, Any]]:
    """Pairs of different lengths whose chosen answers use other words than the rejected ones."""
    draw = random.Random(seed)

    def text(words: Sequence[str]) -> str:
        return "".join(f" {draw.choice(words)}" for _ in range(draw.randint(1, longest)))

    return [{"prompt": text(PLAIN).strip(), "chosen": text(GOOD), "rejected": text(BAD)} for _ in range(count)]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_settings(folder: Path, model: Path, sizes: Sequence[int] = (12, 8), **settings: Any) -> Path:
    """run.yaml in `folder` with a stage of generated pairs for each of `sizes`; output_dir is folder/run."""
    stages = []
    for number, size in enumerate(sizes, 1):
        data = folder / f"data{number}.jsonl"
        if not data.exists():
            write_rows(data, make_rows(size, seed=number))
        stages.append({"name": f"s{number}", "data": str(data)})
    trainer = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "logging_steps": 1,
        "use_cpu": True,
    }
    settings = {"model": str(model), "output_dir": str(folder / "run"), "stages": stages, **settings}
    settings["trainer"] = trainer | settings.get("trainer", {})
    path = folder / "run.yaml"
    path.write_text(yaml_file.write_settings(settings))
    return path


def configured(folder: Path, model: Path, sizes: Sequence[int] = (12, 8), **settings: Any) -> RunConfig:
    """The config of `write_settings`."""
    return load_config(write_settings(folder, model, sizes, **settings))


class Spoken:
    """A Reporter whose output can be read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "spoken.txt"
        self.stream = self.path.open("a", encoding="utf-8")
        self.reporter = Reporter(console=Console(file=self.stream, highlight=False, soft_wrap=True, width=200))

    @property
    def text(self) -> str:
        self.stream.flush()
        return self.path.read_text()


def train(config: RunConfig) -> dict[str, Any]:
    """Run silently; returns the manifest."""
    return run(config, Reporter(quiet=True))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def fingerprint(folder: Path) -> dict[str, str]:
    """Digests of the files that must be the same to the bit whether a run was killed or not."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.glob("stage-*/*.safetensors"))
    return {name: digest(folder / name) for name in [*names, "metrics.jsonl"]}


def leftovers(folder: Path) -> list[str]:
    """Hidden files and folders of a run, except its lock and its ranking, and unfinished ones."""
    allowed = (".lock", ".order_logps_")
    found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.name.startswith(".")]
    found += [p.relative_to(folder).as_posix() for p in folder.glob("stage-*/checkpoint-*")]
    return sorted(name for name in found if not name.startswith(allowed))


# ---- children that can be killed ----

_context: Any = None
_numbers = itertools.count()


def _server() -> Any:
    """A forkserver that has this module imported, single-threaded."""
    global _context
    if _context is None:
        os.environ["OMP_NUM_THREADS"] = "1"
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(["tests.stepwise.runs"])

        # it preloads what it finds from the folder it is started in
        folder = Path.cwd()
        os.chdir(Path(__file__).parents[2])
        forkserver.ensure_running()
        os.chdir(folder)
    return _context


def _command(arguments: list[str], output: str, fault: Callable[..., None] | None, options: tuple[Any, ...]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # forkserver's children ignore it
    torch.set_num_threads(1)
    sys.argv = ["sdpo", *arguments]
    if fault is not None:
        fault(*options)
    main()


class Child:
    """`sdpo ARGUMENTS` in a process of its own; `fault(*options)` is called there first, to break something."""

    def __init__(self, folder: Path, *arguments: Any, fault: Callable[..., None] | None = None, options: Any = ()):
        self.output = folder / f"child{next(_numbers)}.txt"
        command = [str(argument) for argument in arguments]
        self.process = _server().Process(target=_command, args=(command, str(self.output), fault, tuple(options)))
        self.process.start()

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code, negative for a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s: {self.text}"
        return self.process.exitcode

    def signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def wait_for(self, found: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until `found()`, or until the process ends."""
        end = time.monotonic() + seconds
        while not found() and self.process.is_alive() and time.monotonic() < end:
            time.sleep(0.002)

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def die() -> None:
    """`kill -9` this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_at(patch: Any, stage: str, step: int) -> None:
    """Raise KeyboardInterrupt in this process before optimiser step `step` (from 1) of the stage named `stage`."""
    genuine = StageTrainer.training_step

    def training_step(self: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.stage == stage and self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return genuine(self, *args, **kwargs)

    patch.setattr(StageTrainer, "training_step", training_step)
