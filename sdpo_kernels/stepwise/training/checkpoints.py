"""Checkpoints that count only once they are complete.

Trainer writes a checkpoint in place: a kill halfway leaves a partial one, and Trainer's own resume would pick it up.
Here a checkpoint is saved into a hidden folder of the stage, then listed, fsynced and renamed; only after that is the
previous one removed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.files import empty_folder, publish_folder, remove_folder

SAVING = ".saving"
LISTING = "complete.json"  # the sizes of a checkpoint's files, written last
_FOLDER = re.compile(r"checkpoint-(\d+)")


class AtomicCheckpoints:
    """A mixin before `transformers.Trainer`: makes `_save_checkpoint` atomic and keeps one checkpoint only.

    Every rank writes its own files into the checkpoint; rank 0 publishes it.
    """

    args: Any
    state: Any

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        staging = empty_folder(folder / SAVING)
        ranks.wait()  # no rank may write before rank 0 has emptied the folder

        # Trainer saves below its output_dir, so that is the hidden folder for as long as it saves
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.output_dir = str(folder)

        name = f"checkpoint-{self.state.global_step}"
        self.write_extra(staging / name)
        ranks.wait()  # the listing must have every rank's files
        if ranks.is_first():
            self._publish(folder, staging, name)
        ranks.wait()

    def _publish(self, folder: Path, staging: Path, name: str) -> None:
        write_listing(staging / name)
        remove_folder(folder / name)
        publish_folder(staging / name, folder / name)
        for old in folder.glob("checkpoint-*"):
            if old.name != name:
                remove_folder(old)

    def write_extra(self, checkpoint: Path) -> None:
        """Write further files into the checkpoint; none by default."""


def write_listing(checkpoint: Path) -> None:
    """List the files that make the checkpoint complete, with their sizes."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    (checkpoint / LISTING).write_text(json.dumps(sizes, indent=2))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a stage's folder, or None. Incomplete ones are removed."""
    if not folder.is_dir():
        return None
    for leftover in [folder / SAVING, *folder.glob(".*.removing")]:
        remove_folder(leftover)

    complete: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        match = _FOLDER.fullmatch(path.name)
        # by number, not by name: checkpoint-10 is newer than checkpoint-9
        if match and is_complete(path):
            complete.append((int(match[1]), path))
        else:
            remove_folder(path)
    return max(complete)[1] if complete else None


def has_random_states(checkpoint: Path) -> bool:
    """Whether the checkpoint has an RNG state for each of the current number of ranks."""
    count = ranks.world_size()
    names = ["rng_state.pth"] if count == 1 else [f"rng_state_{rank}.pth" for rank in range(count)]
    return all((checkpoint / name).exists() for name in names)


def is_complete(checkpoint: Path) -> bool:
    """Whether every listed file is there and has its listed size."""
    try:
        sizes = json.loads((checkpoint / LISTING).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
