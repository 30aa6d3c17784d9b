"""`reference_cache`: a folder of log-probs that outlives a run, for any number of runs, at the same time too.

    entry = SharedEntry.of(folder, key, made_by(loaded, config, device, batches), reporter.say)
    entry.fill(scores, missing)      # takes what is there, and returns the pairs that still have to be scored
    entry.add(scores, missing)

A key holds whatever the last bits of a score depend on: that of the run's own cache (`cache.py`), and `made_by`. An
entry is one file, written whole or not at all. It is sealed with its key and its values, so that neither a damaged file
nor one under a wrong name is ever taken: it is scored anew, with a warning.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from sdpo_kernels.integrations.causal_lm import unwrap
from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.units import counted
from sdpo_kernels.stepwise.models.load import Loaded
from sdpo_kernels.stepwise.record.environment import run_backend
from sdpo_kernels.stepwise.references.cache import write_scores
from sdpo_kernels.stepwise.settings.run_settings import RunConfig

logger = logging.getLogger(__name__)

SHARED_VERSION = 1
_PACKAGES = ("sdpo-kernels", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "flash-attn")
_NO_NUMBERS = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}  # of peft's settings


@dataclass(frozen=True)
class SharedEntry:
    """The log-probs of one model on one set of pairs."""

    path: Path
    key: str
    say: Callable[[str], None]  # tells the user

    @classmethod
    def of(cls, folder: Path, key: str, made_by: dict[str, Any], say: Callable[[str], None]) -> SharedEntry:
        """The entry in `folder` of scores whose key in the run's own cache is `key`."""
        parts = {"version": SHARED_VERSION, "scores": key, **made_by}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=_as_text).encode()).hexdigest()
        return cls(folder / f"{digest}.safetensors", digest, say)

    def fill(self, scores: Tensor, missing: NDArray[np.int64]) -> NDArray[np.int64]:
        """Put what the entry has of the pairs `missing` into scores [n, 2]; returns those it lacks.

        Every rank calls it; rank 0 reads.
        """
        stored = ranks.on_first(lambda: self.read(len(scores)))
        if stored is None:
            return missing
        scores[missing] = stored[missing]
        lacking = missing[stored[missing, 0].isnan().numpy()]
        if found := len(missing) - len(lacking):
            self.say(f"read {2 * found:,} log-probs of {counted(found, 'pair')} from {self.path}")
        return lacking

    def read(self, count: int) -> Tensor | None:
        """Scores [count, 2] with NaN for pairs that have none; None, with a warning unless there is no file."""
        scores, reason = self._read(count) if self.path.exists() else (None, "")
        if reason:
            logger.warning("%s %s; it is scored anew", self.path, reason)
        return scores

    def _read(self, count: int) -> tuple[Tensor | None, str]:
        """The scores and "", or None and why not."""
        try:
            # safe_open opens the file twice, and another run may replace it in between
            content = self.path.read_bytes()
            stored = load(content)
        except (SafetensorError, OSError) as error:
            return None, f"cannot be read ({error})"

        columns = [stored[name] for name in ("chosen", "rejected") if name in stored]
        if [(column.shape, column.dtype) for column in columns] != [((count,), torch.float32)] * 2:
            return None, f"does not hold {counted(count, 'pair')}"
        seal = _header(content).get("__metadata__", {}).get("key")
        scores = torch.stack(columns, 1)
        return (scores, "") if seal == self._seal(scores) else (None, "is not what was written under this name")

    def add(self, scores: Tensor, rows: NDArray[np.int64]) -> None:
        """Keep the rows of scores [n, 2], next to those that are there. On several ranks rank 0 writes."""
        if not ranks.is_first():
            return
        stored = self.read(len(scores))
        kept = torch.full_like(scores, torch.nan) if stored is None else stored
        kept[rows] = scores[rows]

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"reference_cache: cannot make {self.path.parent}: {error.strerror or error}") from error
        write_scores(self.path, kept, self._seal(kept))

    def _seal(self, scores: Tensor) -> str:
        return hashlib.sha256(self.key.encode() + scores.contiguous().numpy().tobytes()).hexdigest()


def _header(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file: JSON, after its length in eight bytes."""
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def made_by(loaded: Loaded, config: RunConfig, device: torch.device, batches: object) -> dict[str, Any]:
    """What else than `Scorer`'s own key the last bits of a score depend on, from one run or machine to another.

    `batches` says how pairs are put into batches, which counts unless the model scores each sequence by itself.
    """
    on_cuda = device.type == "cuda"
    adapters = getattr(loaded.model, "peft_config", {})
    adapter = {name: {k: v for k, v in a.to_dict().items() if k not in _NO_NUMBERS} for name, a in adapters.items()}
    return {
        "adapter": adapter,  # scales such as lora_alpha are no weights
        "quantization": config.quantization and config.quantization.model_dump(),
        "code": _remote_code(unwrap(loaded.model)),
        "batches": None if loaded.by_sequence else batches,
        "packages": {name: _version(name) for name in _PACKAGES},
        "backend": run_backend(config),
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "threads": None if on_cuda else torch.get_num_threads(),
        "matmul": [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32],
    }


def _remote_code(model: Any) -> dict[str, str]:
    """Digests of the files of a model that comes with its own code; {} for one of transformers'."""
    module = type(model).__module__
    if not module.startswith("transformers_modules"):
        return {}
    folder = Path(inspect.getfile(sys.modules[module])).parent
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _as_text(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)  # a set has no fixed order


def check_cache_folder(config: RunConfig) -> None:
    """UserError if nothing can be written into `reference_cache`; it is not made yet."""
    if config.reference_cache is None or not ranks.is_first():
        return
    folder = Path(config.reference_cache)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"reference_cache: was {config.reference_cache!r}, must be a folder; {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"reference_cache: was {config.reference_cache!r}, but {existing} is not writable")


def cache_line(folder: str) -> str:
    """The folder in words for `sdpo check`: how many sets of log-probs it has, and their size."""
    sizes = [path.stat().st_size for path in Path(folder).glob("[!.]*.safetensors")]
    if not sizes:
        return f"{folder} (empty)"
    return f"{folder} ({counted(len(sizes), 'set')} of log-probs, {sum(sizes) / 2**20:.1f} MiB)"
