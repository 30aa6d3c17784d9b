"""The report of a run: pictures as PNG files, and one self-contained report.html.

    write_report(Path("runs/quick"))          # finished or not; call it as often as you like

The page embeds its pictures, runs no script and loads nothing: it can be mailed, or opened years later.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.record.expo_record import expo_line
from sdpo_kernels.stepwise.report.page import html_figure, html_page, html_table, html_terms
from sdpo_kernels.stepwise.report.pictures import Picture, run_pictures
from sdpo_kernels.stepwise.report.reading import Run, read_run
from sdpo_kernels.stepwise.report.samples import samples_part
from sdpo_kernels.stepwise.report.table import stage_table, table_cells
from sdpo_kernels.stepwise.report.terms import MODELS
from sdpo_kernels.stepwise.settings.changed import changed_settings
from sdpo_kernels.stepwise.settings.yaml_file import write_settings

__all__ = ["read_run", "stage_table", "write_report"]


def write_report(run_dir: Path) -> list[Path]:
    """Write the pictures of the run in `run_dir` and report.html; returns the paths of these files.

    Works at any moment of a run; a picture appears once there is data for it. Older files are replaced, each in one
    step. UserError: no run in the folder, an unreadable manifest, a folder that cannot be written.

    1. Read manifest, metrics and config.
    2. Draw the pictures that have data, and the page that embeds them.
    3. Write them; the page comes last.
    """
    run = read_run(run_dir)
    pictures = run_pictures(run.manifest, run.lines)
    files = {f"{picture.name}.png": picture.png for picture in pictures}
    files["report.html"] = report_page(run, pictures).encode("utf-8", "replace")

    for name, content in files.items():
        replace_file(run.folder / name, content)
    return [run.folder / name for name in files]


def report_page(run: Run, pictures: Sequence[Picture]) -> str:
    """The text of report.html: headline, summary, table with its terms, pictures, samples and settings."""
    columns, rows = table_cells(run.manifest)
    terms = [(column.title, column.about) for column in columns if column.about]
    if run.manifest.get("initial_eval"):
        terms.append(("M₀", MODELS.removeprefix("M₀: ")))
    parts = [
        f"<h1>{escape(run.folder.resolve().name)}</h1>",
        summary(run),
        html_table([(column.title, column.text) for column in columns], rows),
        html_terms("What the columns mean", terms),
        '<div class="pictures">',
        *[html_figure(picture.svg, picture.caption) for picture in pictures],
        "</div>",
        samples_part(run),
    ]

    # gaps are stated, not hidden
    if not pictures:
        parts.append("<p>No step has been logged yet, so there is nothing to draw.</p>")
    if run.unreadable:
        places = ", ".join(map(str, run.unreadable[:10])) + (" …" if len(run.unreadable) > 10 else "")
        parts.append(f"<p>Left out of metrics.jsonl, not readable as logged steps: line {places}.</p>")

    parts.append(settings_part(run))
    return html_page(f"sdpo: {run.folder.resolve().name}", "\n".join(part for part in parts if part))


def settings_part(run: Run) -> str:
    """The settings that differ from their defaults; of a run whose manifest has no config, config.yaml as it is."""
    config = run.manifest.get("config")
    if isinstance(config, dict):
        text = write_settings(changed_settings(config))
        note = "All other settings have their default values; config.yaml has every one."
        return f'<h2>Settings</h2><p class="facts">{note}</p><pre>{escape(text)}</pre>'
    return f"<h2>config.yaml</h2><pre>{escape(run.config)}</pre>" if run.config else ""


def summary(run: Run) -> str:
    """The lines under the headline: progress, model, date, environment, and ExPO's result."""
    manifest = run.manifest
    stages = manifest["stages"]

    # an edited or old manifest may lack any of these
    done = sum(stage.get("state") == "done" for stage in stages)
    facts = [f"{done} of {len(stages)} stages done"]
    facts += [
        f"{label} {manifest[key]}" for key, label in (("model", "model"), ("created", "started")) if manifest.get(key)
    ]

    environment = manifest.get("environment")
    settings = [f"{key} {value}" for key, value in environment.items()] if isinstance(environment, dict) else []
    lines = [" · ".join(facts), " · ".join(settings), expo_line(manifest)]
    return "".join(f'<p class="facts">{escape(line)}</p>' for line in lines if line)
