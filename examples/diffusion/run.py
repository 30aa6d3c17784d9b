"""The example: a small denoiser learns from preferences, by Diffusion-DPO, to draw circles instead of squares.

    python -m examples.diffusion.run --output runs/diffusion              # about a minute on one core
    DEMO=quick python -m examples.diffusion.run --output runs/quick       # a few seconds, too short to learn much

A UNet (denoiser.py) is trained on drawings of circles and squares, half of each (shapes.py). A copy of it is then
trained by Diffusion-DPO (train.py) on pairs of a circle (preferred) and a square of the same position, size and
brightness. Both models sample from the same noise, and a judge that knows neither of them counts the shapes (judge.py,
results.py). Nothing is downloaded. Files in the folder: before.pt, after.pt, results.json, diffusion.png.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from examples.diffusion.denoiser import Denoiser, build_denoiser, sample
from examples.diffusion.judge import accuracy_on_drawings
from examples.diffusion.results import clear_win, findings, result_table, write_picture
from examples.diffusion.train import Settings, prefer, pretrain
from sdpo_kernels.stepwise.common.files import write_json
from sdpo_kernels.stepwise.common.progress import Reporter

FULL = Settings(steps=1300, dpo_steps=100, samples=800)
QUICK = Settings(steps=60, dpo_steps=10, samples=80)
DRAWINGS = 2000  # of each kind, for the judge's own accuracy
OFFSET = 1_000_000  # between the seeds of training and of sampling


def run(folder: Path, picture: Path, settings: Settings, reporter: Reporter) -> dict[str, Any]:
    """Run the example; returns the content of results.json.

    1. Measure the judge's own accuracy on real drawings.
    2. Train the denoiser, and a copy of it by Diffusion-DPO.
    3. Sample from both with the same noise, and judge the samples.
    4. Write weights, results and picture, and print the table.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)

    accuracy = accuracy_on_drawings(DRAWINGS, settings.seed + 2 * OFFSET)
    reporter.say(f"the judge is right about {accuracy:.2%} of {2 * DRAWINGS:,} real drawings")
    before, after, losses = train(settings, reporter)

    # the samples' seed is far from those of training: the noise is new to both models
    reporter.say("sampling")
    found = [
        findings(name, sample(model, settings.samples, settings.seed + OFFSET))
        for name, model in (("before", before), ("after Diffusion-DPO", after))
    ]

    for name, model in (("before", before), ("after", after)):
        torch.save(model.state_dict(), folder / f"{name}.pt")
    record = {
        "models": [each.record() for each in found],
        "clear_win": clear_win(*found),
        "judge_accuracy": accuracy,
        "dpo_losses": losses,
        "settings": asdict(settings),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(folder / "results.json", record)
    write_picture(picture, found)

    reporter.say(result_table(found))
    reporter.say("intervals: 95 % (Wilson) over the samples; one run, one seed")
    reporter.say(f"picture: {picture}   ({time.monotonic() - started:.0f} s)")
    return record


def train(settings: Settings, reporter: Reporter) -> tuple[Denoiser, Denoiser, list[float]]:
    """The denoiser before and after Diffusion-DPO, and the losses of Diffusion-DPO."""
    before = build_denoiser(settings.seed)
    with reporter.task("denoising", settings.steps) as bar:
        pretrain(before, settings, lambda step, loss: bar.update(step, f"loss {loss:.3f}"))
    after = copy.deepcopy(before)
    with reporter.task("Diffusion-DPO", settings.dpo_steps) as bar:
        losses = prefer(after, before, settings, lambda step, loss: bar.update(step, f"loss {loss:.3f}"))
    return before, after, losses


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/diffusion"), help="folder (runs/diffusion)")
    parser.add_argument("--picture", type=Path, help="path of the picture (diffusion.png in the folder)")
    parser.add_argument("--seed", type=int, default=Settings.seed, help=f"for training and sampling ({Settings.seed})")
    given = parser.parse_args()

    mode = os.environ.get("DEMO", "full")
    if mode not in ("full", "quick"):
        parser.error(f"DEMO was {mode!r}, must be full or quick")

    # one thread, so that the results do not depend on the number of cores
    torch.set_num_threads(1)
    settings = replace(QUICK if mode == "quick" else FULL, seed=given.seed)
    run(given.output, given.picture or given.output / "diffusion.png", settings, Reporter())


if __name__ == "__main__":
    main()
