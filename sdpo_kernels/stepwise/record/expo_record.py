"""A run's post-step as its manifest records it: one line for the terminal and the report, and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "expo"  # in a run's folder
RECORD = "expo.json"  # in FOLDER


def expo_line(manifest: dict[str, Any]) -> str | None:
    """Such as 'expo: α 0.3 from initial, pair_accuracy 0.812 (α 0: 0.790)'; None if nothing was extrapolated."""
    post = manifest.get("post")
    record = post.get("expo") if isinstance(post, dict) else None
    if not isinstance(record, dict):
        return None

    try:
        line = f"{FOLDER}: α {record['alpha']:g} from {record['from']}"
        scores, metric = record.get("scores"), record.get("metric")
        if not scores:
            return line

        # α = 0 was chosen: its score is that of the last stage itself
        if record["alpha"] == 0:
            return f"{line}: no α above 0 scored higher than the last stage's {metric} {scores['0']:.4g}"
        return f"{line}, {metric} {scores[format(record['alpha'], 'g')]:.4g} (α 0: {scores['0']:.4g})"
    except (KeyError, TypeError, ValueError):  # the manifest was edited by hand
        return None


def expo_folder(run_dir: Path, manifest: dict[str, Any]) -> list[str]:
    """The folder of the extrapolated model, if there is one."""
    return [str(run_dir / FOLDER)] if expo_line(manifest) is not None else []
