"""What the runs in this folder start from: `python -m examples.methods.prepare`, once, about two minutes.

The demo's task (examples/demo): sort the letters of a word. Left in runs/methods/start:

    start/                       a small Llama, warmed up on the answers of a careful and a careless author
    other/                       the same from another seed, a second reference for mrpo.yaml
    data/{short,medium,long}.jsonl            preference pairs: the right answer against a wrong one of the model's own
    data/{short,medium,long}-prompts.jsonl    prompts with their `answer`, for sources that make pairs
    data/{short,medium,long}-prompts-few.jsonl   the first of them, for a checker that starts a program a sample
    data/dev.jsonl               pairs about other words, for expo.yaml and for looking at
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from examples.demo.model import save
from examples.demo.preferences import write_pairs
from examples.demo.setup import FULL, QUICK, Settings, set_up, warmed_up
from examples.demo.task import SOURCES, draw_words
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter

FOLDER = Path("runs/methods/start")
PROMPTS = 640  # of each source
FEW_PROMPTS = 160  # of them, for execution.yaml: starting a program costs more than sampling an answer
DEV_PAIRS = 100  # of each source


def prepare(folder: Path, settings: Settings, reporter: Reporter) -> None:
    """Makes what is not there yet in `folder`."""
    start = set_up(folder, settings, reporter)
    for source in SOURCES:
        write_pairs(folder / "data" / f"{source.name}.jsonl", start.pairs[source.name])
        problems = draw_words(source, "preference", min(PROMPTS, settings.pairs), seed=settings.seed + 1)
        rows = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
        write_pairs(folder / "data" / f"{source.name}-prompts.jsonl", rows)
        write_pairs(folder / "data" / f"{source.name}-prompts-few.jsonl", rows[:FEW_PROMPTS])
    # the first of the held-out pairs choose (expo's α); results are judged on the others and on held-out prompts
    write_pairs(folder / "data" / "dev.jsonl", [pair for pairs in start.heldout.values() for pair in pairs[:DEV_PAIRS]])
    if not (folder / "other" / "model.safetensors").exists():
        other = replace(settings, seed=settings.seed + 100)
        save(*warmed_up(other, "warm-up of another", reporter), folder / "other")


def main() -> None:
    """The command line; a mistake of the user is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.methods.prepare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder for all files ({FOLDER})")
    parser.add_argument("--quick", action="store_true", help="a warm-up of 100 steps and 64 pairs a source: for a look")
    parser.add_argument("--seed", type=int, default=FULL.seed)
    options = parser.parse_args()
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
