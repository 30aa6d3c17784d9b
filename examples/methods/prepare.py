"""Prepare the runs in this folder: `python -m examples.methods.prepare`, once, about two minutes.

The task is the demo's (examples/demo): sort the letters of a word. Files in runs/methods/start:

    start/                       a small Llama, warmed up on the answers of a careful and a careless author
    other/                       the same with another seed, a second reference for mrpo.yaml
    data/{short,medium,long}.jsonl            preference pairs: the right answer against a wrong one of the model's own
    data/{short,medium,long}-prompts.jsonl    prompts with their `answer`, for sources of generated pairs
    data/{short,medium,long}-prompts-few.jsonl   the first of them, for a checker that runs a program per sample
    data/dev.jsonl               pairs about other words, for expo.yaml
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from examples.demo.preferences import write_pairs
from examples.demo.setup import FULL, QUICK, Settings, set_up, warmed_up
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.starter.letters import SOURCES, draw_words
from sdpo_kernels.stepwise.starter.tiny_model import save

FOLDER = Path("runs/methods/start")
PROMPTS = 640  # per source
FEW_PROMPTS = 160  # of these, for execution.yaml: starting a program costs more than sampling an answer
DEV_PAIRS = 100  # per source


def prepare(folder: Path, settings: Settings, reporter: Reporter) -> None:
    """Create the files in `folder`; models that exist are kept.

    1. The demo's warm start and preference pairs.
    2. Training pairs and prompts of each source.
    3. Held-out pairs to choose by.
    4. A second warm start, with another seed.
    """
    start = set_up(folder, settings, reporter)

    for source in SOURCES:
        write_pairs(folder / "data" / f"{source.name}.jsonl", start.pairs[source.name])
        problems = draw_words(source, "preference", min(PROMPTS, settings.pairs), seed=settings.seed + 1)
        rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
        write_pairs(folder / "data" / f"{source.name}-prompts.jsonl", rows)
        write_pairs(folder / "data" / f"{source.name}-prompts-few.jsonl", rows[:FEW_PROMPTS])

    # these choose (expo's α); results are judged on the other held-out pairs and on held-out prompts
    write_pairs(folder / "data" / "dev.jsonl", [pair for pairs in start.heldout.values() for pair in pairs[:DEV_PAIRS]])

    if not (folder / "other" / "model.safetensors").exists():
        other = replace(settings, seed=settings.seed + 100)
        save(*warmed_up(other, "warm-up of another", reporter), folder / "other")


def main() -> None:
    """The command line; the user's mistakes are reported in one line, with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.methods.prepare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder for all files ({FOLDER})")
    parser.add_argument("--quick", action="store_true", help="a warm-up of 100 steps and 64 pairs per source: a trial")
    parser.add_argument("--seed", type=int, default=FULL.seed)
    options = parser.parse_args()

    # one thread, so that the results do not depend on the number of cores
    torch.set_num_threads(1)
    try:
        reporter = Reporter()
        prepare(options.output, replace(QUICK if options.quick else FULL, seed=options.seed), reporter)
        reporter.say("ready; for example: sdpo train examples/methods/dpop.yaml")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
