"""The time that a run's chat templates read as now: that of its first start, or the setting `template_time`."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from sdpo_kernels.stepwise.common.files import read_json
from sdpo_kernels.stepwise.record.manifest import Record
from sdpo_kernels.stepwise.settings.run_settings import RunConfig


def template_time(config: RunConfig) -> datetime:
    """The setting, else the time in the manifest of output_dir, else now (of a run that is not started yet).

    Local time without a timezone, as transformers gives it to templates, unless the setting has one.
    """
    if config.template_time is not None:
        return datetime.fromisoformat(config.template_time)

    path = Path(config.output_dir) / "manifest.json"
    if path.exists():
        return recorded_time(read_json(path))
    return datetime.now().replace(microsecond=0)


def recorded_time(manifest: Record) -> datetime:
    """The time in a run's manifest."""
    if "template_time" in manifest:
        return datetime.fromisoformat(manifest["template_time"])

    # runs of earlier versions read the clock when they were started
    created = datetime.strptime(manifest["created"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    return created.astimezone().replace(tzinfo=None)
