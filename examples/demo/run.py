"""The demo: warm up a small model, train it on the same preference pairs by DPO and by stepwise DPO, and compare.

    python -m examples.demo.run --output runs/demo               # under four minutes on two cores
    DEMO=quick python -m examples.demo.run --output runs/quick   # about 20 seconds, too short to learn much

The task is to sort the letters of a word (task.py). The model is warmed up on the answers of two authors, one careful
and one careless (sft.py), so it imitates sometimes the one, sometimes the other. Preference pairs are the right answer
against a wrong one of its own (preferences.py), in three sources of increasing difficulty: words of four, six and eight
letters. DPO trains on all of them in one stage, sDPO in three stages, both with the driver and with the same number of
updates (setup.py writes the run files). All models are judged on words not seen in training (evaluate.py, results.py).
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from examples.demo.evaluate import pair_gammas
from examples.demo.results import difference_lines, gamma_table, judge, result_rows, result_table, write_results
from examples.demo.setup import FULL, QUICK, Settings, Start, set_up
from sdpo_kernels.stepwise.common.errors import Interrupted, UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.starter.tiny_model import load

NAMES = {"dpo": "DPO", "sdpo": "sDPO"}


def demo(folder: Path, settings: Settings, reporter: Reporter) -> list[dict[str, Any]]:
    """Run or resume the demo in `folder`; returns the rows of its table, which are also in results.json.

    1. Set up the common start: the warmed-up model, its preference pairs, and a run file for DPO and one for sDPO.
    2. Train both with the driver.
    3. Judge the three models on held-out words, and collect the log-prob margins of the references.
    4. Write the results, and print the tables.
    """
    started = time.monotonic()
    start = set_up(folder, settings, reporter)

    manifests = {}
    for name, run_file in start.run_files.items():
        reporter.say(f"\n{NAMES[name]}: sdpo train {run_file}")
        manifests[name] = run(load_config(run_file), reporter)

    reporter.say("\njudging the three models on held-out words")
    folders = {"SFT": start.model} | {
        NAMES[name]: last_stage(folder / name, record) for name, record in manifests.items()
    }
    judged = [judge(name, path, start.heldout, settings) for name, path in folders.items()]

    # the driver records γ of each stage's reference; for the warm start it is computed here
    gammas = {"SFT": start_gammas(start)} | {
        NAMES[name]: {stage["name"]: stage["gamma_reference"] for stage in record["stages"]}
        for name, record in manifests.items()
    }

    rows = result_rows(judged, gammas)
    page = write_results(folder, judged, rows, settings)

    reporter.say(result_table(rows))
    reporter.say("exactly right, difference and its 95 % interval over the prompts (one run, one seed):")
    for line in difference_lines(judged):
        reporter.say(f"  {line}")
    reporter.say("")
    reporter.say(gamma_table(rows))
    reporter.say(f"picture and page: {page}   ({time.monotonic() - started:.0f} s)")
    return rows


def last_stage(folder: Path, manifest: dict[str, Any]) -> Path:
    """The folder of a run's last model."""
    stage = manifest["stages"][-1]
    return folder / f"stage-{stage['index']}-{stage['name']}"


def start_gammas(start: Start) -> dict[str, float]:
    """γ of the warm start on the training pairs of each source."""
    model, tokenizer = load(start.model)
    return {source: pair_gammas(model, tokenizer, pairs).mean().item() for source, pairs in start.pairs.items()}


def main() -> None:
    """The command line; the user's mistakes are reported in one line, with exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for all files (runs/demo)")
    output = parser.parse_args().output
    mode = os.environ.get("DEMO", "full")
    if mode not in ("full", "quick"):
        parser.error(f"DEMO was {mode!r}, must be full or quick")

    # One thread: a model this small gains little from a second one and loses much if the cores are shared; and the
    # results do not depend on the number of cores.
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    gc.freeze()  # what is imported stays: collections between stages scan only the rest

    try:
        demo(output, QUICK if mode == "quick" else FULL, Reporter())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt):
        print("stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    finally:
        gc.unfreeze()  # libraries complain at exit of objects that were not collected


if __name__ == "__main__":
    main()
