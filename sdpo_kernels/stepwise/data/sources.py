"""Which columns each data source of a run has: an entry's own settings, else the stage's, else the run's."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sdpo_kernels.stepwise.data.pairs import PairSource
from sdpo_kernels.stepwise.data.shapes import Shape
from sdpo_kernels.stepwise.settings.columns import ColumnSettings, DataEntry, entry_path
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig

Entry = str | DataEntry


def pair_sources(config: RunConfig, entries: Sequence[Entry], stage: StageConfig | None = None) -> list[PairSource]:
    """The sources of a stage, or of evaluation data, with how their rows are read."""
    sources = []
    for entry in entries:
        levels = [entry if isinstance(entry, DataEntry) else None, stage, config]
        columns = next((level.columns for level in levels if level is not None and level.columns is not None), None)
        prompt = next(level.prompt for level in levels if level is not None and level.prompt is not None)

        # the run's columns are those of its pairs to train on; other data may have TRL's
        from_run = columns is not None and all(level is None or level.columns is None for level in levels[:2])
        optional = from_run and (stage is None or stage.prompts is not None)
        shape = Shape(columns or ColumnSettings(), prompt == "implicit", columns_optional=optional)
        sources.append(PairSource(entry_path(entry), shape))
    return sources


def given_sources(config: RunConfig, entries: Sequence[Entry]) -> list[PairSource]:
    """The sources of a command's `--data`: a path that is also in the run's settings is read as it is there."""
    return [pair_sources(config, [entry], stage)[0] for entry, stage in (_own(config, entry) for entry in entries)]


def _own(config: RunConfig, given: Entry) -> tuple[Entry, StageConfig | None]:
    """The run's own entry for `given` and the stage that has it; else `given`."""
    if isinstance(given, DataEntry):
        return given, None
    owned: list[tuple[Entry, StageConfig | None]] = [(entry, None) for entry in config.eval_data or ()]
    owned += [(entry, stage) for stage in config.stages for entry in stage.data or ()]
    return next((pair for pair in owned if _same(entry_path(pair[0]), given)), (given, None))


def _same(path: str, other: str) -> bool:
    both = [os.path.expanduser(name) for name in (path, other)]
    return path == other or (all(map(os.path.exists, both)) and os.path.samefile(*both))
