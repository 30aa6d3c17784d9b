"""Answers of the policy by vLLM, in a process of its own: its memory is free again before the stage trains.

`vllm_worker.py` is that process. The job goes to it as a file, and its answers come back as a file for each batch, in
the folder `vllm` of the stage in progress, next to `vllm/log.txt`.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import empty_folder, read_json, write_json
from sdpo_kernels.stepwise.models.load import ADAPTER, release_memory
from sdpo_kernels.stepwise.models.precision import Precision
from sdpo_kernels.stepwise.settings.generation import GenerationSettings
from sdpo_kernels.stepwise.settings.mistakes import show
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from sdpo_kernels.stepwise.sources.context import SourceContext
from sdpo_kernels.stepwise.sources.engine import (
    Answers,
    Batch,
    Completion,
    Prompt,
    Row,
    cut,
    end_tokens,
    token_completion,
)

PORTION = 1024  # answers that the worker hands over at a time: enough to keep vLLM busy
LOOK_SECONDS = 0.2  # between two looks for answers
EXIT_SECONDS = 60.0  # for the worker's own end, after its last answer
GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL
LAST_LINES = 15  # of the worker's output, in an error
WORKER = Path(__file__).with_name("vllm_worker.py")
_RANKS = (*(2**n for n in range(3, 9)), 320, 512)  # the values that vLLM takes for max_lora_rank

# of a launcher such as torchrun: vLLM would take itself for one of its processes
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ROLE_", "ACCELERATE_")


def check_vllm(settings: GenerationSettings) -> None:
    """UserError unless the Python that is named has vLLM; it is looked for, not imported."""
    python = settings.python or sys.executable
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", program], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    except OSError as error:
        raise UserError(f"generation.python: {python} cannot be started: {error.strerror or error}") from error
    if not found:
        raise UserError(
            f"generation.engine: was 'vllm', but the package vllm is not installed for {python}; install it there, or "
            "in an environment of its own (it needs its own version of torch), whose Python generation.python names"
        )


def check_adapter(config: RunConfig, stage: StageConfig) -> None:
    """UserError if vLLM cannot sample from the adapter that a stage starts from: it would be found out hours later.

    Its products of adapters are of 16 bits, and it has neither DoRA, nor biases, nor modules that are trained whole.
    """
    lora, source = config.lora, stage.source
    assert source is not None
    if lora is None or stage is config.stages[0] or (config.dtype == "float32" and config.publishes_merged):
        return

    why = f"vLLM samples stage {stage.name} from the adapter of the stage before, and has"
    way = "; merged weights can be sampled from: dtype: float32, lora: {publish: merged}"
    for name in ("use_dora", "bias", "modules_to_save", "trainable_token_indices"):
        if (value := lora.more.get(name)) not in (None, False, "none"):
            raise UserError(f"lora.{name}: was {show(value)}, must be left out: {why} none{way}")
    if (rank := max([lora.r, *(lora.more.get("rank_pattern") or {}).values()])) > _RANKS[-1]:
        raise UserError(f"lora.r: was {rank}, must be at most {_RANKS[-1]}: {why} no larger one{way}")

    # what VllmEngine.dtype will be
    args = training_arguments(config, stage, Path(config.output_dir), Path(config.output_dir))
    computes = str(Precision.of(args).dtype or config.dtype).removeprefix("torch.")
    if source.generation.options.get("dtype", computes) == "float32":
        raise UserError(f"dtype: was 'float32', must be bfloat16 (or trainer.bf16: true): {why} 16 bits for it{way}")


class VllmEngine:
    """Samples from the policy: the stage's weights. In a LoRA run on a bfloat16 base it is base and adapter, and also
    if a stage has nothing but its adapter.
    """

    column = "ids"

    def __init__(self, ctx: SourceContext, count: int) -> None:
        self.ctx, self.count, self.config = ctx, count, ctx.scorer.config
        self.size = max(1, PORTION // count) * count
        self.settings = ctx.settings.generation
        self.folder = ctx.folder.with_name("vllm")

        # Merged weights are rounded to the base's dtype, which would lose what the stage has learned. A stage may have
        # none (lora.publish).
        adapter = Path(ctx.policy) / ADAPTER
        has_adapter = self.config.lora is not None and ctx.policy != self.config.model and adapter.is_dir()
        rounds = self.config.dtype != "float32" or not (adapter.parent / "config.json").exists()
        self.adapter = adapter if has_adapter and rounds else None
        self.model = ctx.policy if self.adapter is None else self.config.model

        own = _generation_config(self.model, self.config.trust_remote_code).eos_token_id
        self.ends = sorted(end_tokens(own, ctx.tokenizer))

    @property
    def dtype(self) -> str:
        """The data type of the weights in vLLM: that which training computes in, unless `options` has another."""
        if "dtype" in self.settings.options:
            return str(self.settings.options["dtype"])
        computes = self.ctx.scorer.precision.dtype
        return self.config.dtype if computes is None else str(computes).removeprefix("torch.")

    def depends_on(self) -> dict[str, Any]:
        """The weights, the end tokens and the data type."""
        of = [_fingerprint(self.model)] + ([] if self.adapter is None else [_fingerprint(str(self.adapter))])
        return {"engine": "vllm", "model": of, "ends": self.ends, "dtype": self.dtype}

    def answer(self, batches: Sequence[Batch]) -> Generator[Answers, None, None]:
        """Start the worker, hand its answers on as they come, and wait for its end."""
        if not batches:
            return
        check_vllm(self.settings)
        release_memory()
        write_json(empty_folder(self.folder) / "job.json", self._job(batches))

        with self._worker() as process:
            for batch in batches:
                path = self.folder / f"{batch.number}.json"
                while not path.exists():
                    # a file that came just before the end counts
                    if _has_ended(process) and not path.exists():
                        raise UserError(self._failure(process))
                    time.sleep(LOOK_SECONDS)
                found = read_json(path)
                path.unlink()
                yield Answers(batch.number, self._rows(found["answers"]), found["by"])

            # all answers are here: a worker that does not end by itself is ended
            end = time.monotonic() + EXIT_SECONDS
            while not _has_ended(process) and time.monotonic() < end:
                time.sleep(LOOK_SECONDS)

    def completion(self, prompt: Prompt, row: Row) -> Completion:
        """The completion of a row of token ids."""
        return token_completion(prompt, row, set(self.ends), self.ctx.tokenizer)

    def record(self, by: Sequence[str]) -> dict[str, Any]:
        """vLLM's version, and the model."""
        path = Path(self.ctx.policy)
        model = self.ctx.policy if self.ctx.policy == self.config.model else path.name
        return {"engine": "vllm", "version": [text.removeprefix("vLLM ") for text in by], "model": model}

    def _job(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """What the worker reads; a prompt with several answers is in it once."""
        settings = self.ctx.settings
        longest = max(len(prompt.ids) for batch in batches for prompt in batch.prompts)
        llm = {
            "model": self.model,
            "dtype": self.dtype,
            "seed": self.ctx.seed("vllm"),
            "trust_remote_code": self.config.trust_remote_code,
            # the model's own limit may need more memory for the cache than there is
            "max_model_len": longest + settings.max_new_tokens,
        }
        if self.adapter is not None:
            llm["max_lora_rank"] = _lora_rank(self.adapter)
        sampling = {
            "n": self.count,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
            "stop_token_ids": self.ends,
            "detokenize": False,
        }
        return {
            "llm": llm | self.settings.options,
            "sampling": sampling,
            "adapter": None if self.adapter is None else str(self.adapter),
            "batches": [_job_batch(batch, self.count) for batch in batches],
        }

    def _rows(self, answers: list[list[Any]]) -> list[list[int]]:
        """Token ids of every answer, which end with an end token if vLLM says that it stopped."""
        rows = []
        for ids, reason in (one for of_prompt in answers for one in of_prompt):
            ids = cut(ids, set(self.ends))
            ended = bool(ids) and ids[-1] in self.ends
            rows.append(ids if ended or reason != "stop" else [*ids, self.ends[0]])
        return rows

    @contextmanager
    def _worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """The worker's process within the block; afterwards neither it nor a process it has started is left."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in _LAUNCHER and not name.startswith(_LAUNCHER_PREFIXES)
        }
        with (self.folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(  # in a session of its own, so that all its processes can be ended
                [self.settings.python or sys.executable, str(WORKER), str(self.folder)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=kept, start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            _end(process)

    def _failure(self, process: subprocess.Popen[bytes]) -> str:
        """Why the worker has ended, with the last lines of its output."""
        log = self.folder / "log.txt"
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        _end(process)
        code = process.returncode
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code} ({_signal_name(-code)})"
        last = "".join(f"\n  {line}" for line in lines[-LAST_LINES:]) or " it printed nothing"
        return f"{self.ctx.label('samples')}: vLLM's process {how}; the end of {log}:{last}"


def _job_batch(batch: Batch, count: int) -> dict[str, Any]:
    prompts = [prompt.ids for prompt in batch.prompts[::count]]
    # vLLM counts on from a prompt's seed for its further answers, so neighbours must not have neighbouring seeds
    draw = random.Random(batch.seed)
    return {"number": batch.number, "prompts": prompts, "seeds": [draw.getrandbits(31) for _ in prompts]}


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended. It is not reaped: until then its id is also that of its group, and of no other."""
    return process.returncode is not None or (
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the worker and every process of its group, and reap it."""
    if process.returncode is not None:
        return
    end = time.monotonic() + GRACE_SECONDS
    if not _has_ended(process):
        os.killpg(process.pid, signal.SIGTERM)
    while not _has_ended(process) and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)

    # also after a good end: of vLLM's own processes one may still hold memory
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return "unknown"


def _generation_config(model: str, trust_remote_code: bool) -> GenerationConfig:
    """The model's own generation config, as loading the model would find it."""
    try:
        return GenerationConfig.from_pretrained(model)
    except (OSError, ValueError):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        return GenerationConfig.from_model_config(config)


def _lora_rank(adapter: Path) -> int:
    """The least rank that vLLM takes and that holds the adapter."""
    config = read_json(adapter / "adapter_config.json")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return next((known for known in _RANKS if known >= rank), rank)


def _fingerprint(model: str) -> str:
    """What the weights are, without loading them: a digest of a folder's files, or the revision of a hub model."""
    if not Path(model).is_dir():
        return str(getattr(AutoConfig.from_pretrained(model), "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("*config.json")]):
        digest.update(f"{path.name} {path.stat().st_size};".encode())
        with path.open("rb") as stream:
            while piece := stream.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()
