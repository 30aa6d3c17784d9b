"""Scores of a model folder for the search over α: on preference pairs, or by the user's own command."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.order import scored_counts
from sdpo_kernels.stepwise.models.load import ADAPTER
from sdpo_kernels.stepwise.models.weights import Weights
from sdpo_kernels.stepwise.prepare import read_eval
from sdpo_kernels.stepwise.record.template_time import template_time
from sdpo_kernels.stepwise.references.evaluation import summarise
from sdpo_kernels.stepwise.references.scorer import Scorer, pad_token_id
from sdpo_kernels.stepwise.settings.lora import LoraSettings
from sdpo_kernels.stepwise.settings.post import Metric
from sdpo_kernels.stepwise.settings.run_settings import RunConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments


class PairScore:
    """`metric` of a model on preference pairs; rewards are relative to `start`, with the config's β.

    `config` gives lengths, truncation, batches and β, and how an adapter's base is quantised. Model, dtype and lora
    come from the folders: bfloat16 if all weights are bfloat16, so that nothing is rounded, else float32. An adapter is
    scored as <folder>/adapter.
    """

    def __init__(
        self, start: Path, aligned: Path, data: Sequence[str], metric: Metric, config: RunConfig | None, say: Reporter
    ) -> None:
        # without a config the defaults of a run apply
        weights = Weights(aligned)
        base = Weights(start) if weights.is_adapter else weights
        settings = config or RunConfig.model_validate(
            {"model": str(start), "output_dir": str(start), "stages": [{"name": "dev", "data": list(data)}]}
        )
        self.config = settings.model_copy(
            update={
                "model": str(start),
                "dtype": "bfloat16" if set(base.dtypes.values()) == {"BF16"} else "float32",
                "lora": LoraSettings() if weights.is_adapter else None,
                "quantization": settings.quantization if weights.is_adapter else None,
            }
        )

        self.metric = metric
        self.tokens, warnings, tokenizer = read_eval(
            self.config, tuple(data), template_time(settings), "in the run.yaml of --config: columns: {}", say
        )
        for warning in warnings:
            say.warn(warning)

        # Trainer's arguments need an output folder; nothing is written to it
        with tempfile.TemporaryDirectory() as folder:
            args = training_arguments(self.config, self.config.stages[0], Path(folder), Path(folder))
        self.scorer = Scorer.of(self.config, args, pad_token_id(tokenizer), say)
        self._reference: Tensor | None = None

    def __call__(self, folder: Path) -> float:
        """The metric of the model in `folder`."""
        # a scorer of a LoRA run finds the adapter inside the folder that it is given
        path = folder.parent if folder.name == ADAPTER and self.config.lora is not None else folder
        if self.metric.startswith("reward") and self._reference is None:
            self._reference = self.scorer.score_path(self.config.model, self.tokens, "start model")
        logps = self.scorer.score_path(str(path), self.tokens, "scoring")
        return summarise(logps, scored_counts(self.tokens), self._reference, self.config.beta)[self.metric]


class CommandScore:
    """The number that the user's own command prints on its last line; the model's folder is its last argument.

    It runs without a shell. `seconds` is its time limit, None for none. UserError: the command cannot be run, fails,
    exceeds the limit or does not print a number.
    """

    def __init__(self, command: str, seconds: float | None = None) -> None:
        try:
            self.arguments = shlex.split(command)
        except ValueError as error:
            raise UserError(f"score command {command!r}: {error}") from error
        if not self.arguments:
            raise UserError("score command: was empty, must be a program with its arguments")
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise UserError(f"timeout: was {seconds:g}, must be above 0 (seconds)")
        self.seconds = seconds

    def __call__(self, folder: Path) -> float:
        """The command's score of the model in `folder`."""
        name = shlex.join(self.arguments)
        code, out, err = self._run([*self.arguments, str(folder)], name)
        if code != 0:
            last = (err.strip() or out.strip() or "it printed nothing").splitlines()[-1]
            raise UserError(f"score command {name}: ended with code {code}: {last}")

        line = (out.strip().splitlines() or [""])[-1].strip()
        try:
            return float(line)
        except ValueError:
            raise UserError(f"score command {name}: its last line was {line!r:.80}, must be one number") from None

    def _run(self, arguments: list[str], name: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; the command and its children are killed at the time limit, or if we stop."""
        # a session of its own: its process group can be killed as a whole
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"score command {name}: cannot be run: {error.strerror or error}") from error

        try:
            out, err = process.communicate(timeout=self.seconds)
        except BaseException as stop:  # Ctrl-C too must not leave it running
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(stop, subprocess.TimeoutExpired):
                raise UserError(f"score command {name}: took longer than {self.seconds:g} seconds") from None
            raise

        return process.returncode, out, err
