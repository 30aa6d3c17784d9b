"""The common start of both ways of training: the warmed-up model, its preference pairs and the run files.

    start = set_up(Path("runs/demo"), FULL, Reporter())
    start.run_files["sdpo"]                    # a YAML file that `sdpo train` takes

Files in the folder: start/ (model and tokenizer), data/*.jsonl, dpo.yaml, sdpo.yaml and settings.json. The latter is
written last: once it exists, a second call with the same settings reads everything back, so a killed demo can resume.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.demo.preferences import preference_pairs, read_pairs, write_pairs
from examples.demo.sft import warm_up
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.settings.yaml_file import write_settings
from sdpo_kernels.stepwise.starter.letters import SOURCES, Split, warmup_corpus
from sdpo_kernels.stepwise.starter.tiny_model import build_model, build_tokenizer, save

TRAINING: Split = "preference"
HELDOUT: Split = "heldout"


@dataclass(frozen=True)
class Settings:
    """Sizes and learning rates; pairs, heldout_pairs and heldout_prompts are per source."""

    warmup_steps: int
    pairs: int
    heldout_pairs: int
    heldout_prompts: int
    seed: int = 7
    warmup_batch: int = 64
    warmup_rate: float = 3e-3
    batch: int = 16
    learning_rate: float = 1e-5  # chosen with beta on other seeds; from 2e-5 on, DPO and sDPO lose right answers again
    beta: float = 0.3


FULL = Settings(warmup_steps=800, pairs=640, heldout_pairs=300, heldout_prompts=500)
QUICK = Settings(warmup_steps=100, pairs=64, heldout_pairs=50, heldout_prompts=50)


@dataclass(frozen=True)
class Start:
    """The result of `set_up`: training and held-out pairs by source, run files by way of training (dpo, sdpo)."""

    model: Path
    pairs: dict[str, list[dict[str, str]]]
    heldout: dict[str, list[dict[str, str]]]
    run_files: dict[str, Path]


def set_up(folder: Path, settings: Settings, reporter: Reporter) -> Start:
    """Create the start in `folder`, or read it back; UserError if it contains a demo with different settings."""
    record = folder / "settings.json"
    if record.is_file():
        if json.loads(record.read_text(encoding="utf-8")) != asdict(settings):
            raise UserError(
                f"{folder}: contains a demo with different settings (quick or full size?); give another --output or "
                "delete it"
            )
        reporter.say(f"resuming with the model and the pairs in {folder}")
    else:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        make_start(folder, settings, reporter)
        replace_file(record, (json.dumps(asdict(settings), indent=1) + "\n").encode())

    # from the files in either case, so that a resumed demo has the same pairs
    return Start(
        model=folder / "start",
        pairs={source.name: read_pairs(pair_file(folder, source.name)) for source in SOURCES},
        heldout={source.name: read_pairs(pair_file(folder, source.name, HELDOUT)) for source in SOURCES},
        run_files={name: folder / f"{name}.yaml" for name in ("dpo", "sdpo")},
    )


def pair_file(folder: Path, source: str, split: Split = TRAINING) -> Path:
    """The file of a source's pairs."""
    return folder / "data" / f"{source}.{split}.jsonl"


def make_start(folder: Path, settings: Settings, reporter: Reporter) -> None:
    """Write the warmed-up model, its preference pairs and the run files to `folder`."""
    model, tokenizer = warmed_up(settings, "warm-up (SFT)", reporter)
    save(model, tokenizer, folder / "start")

    for source in SOURCES:
        for split, count in ((TRAINING, settings.pairs), (HELDOUT, settings.heldout_pairs)):
            pairs = preference_pairs(model, tokenizer, source, split, count, settings.seed)
            write_pairs(pair_file(folder, source.name, split), pairs)
            if split == TRAINING:
                reporter.say(f"pairs: {source.name}, words of {source.letters} letters; the first: {pairs[0]}")

    # one stage with all files, or one stage per file
    files = {source.name: pair_file(folder, source.name) for source in SOURCES}
    write_run_file(folder, "dpo", {"all": list(files.values())}, settings)
    write_run_file(folder, "sdpo", {name: [path] for name, path in files.items()}, settings)


def warmed_up(settings: Settings, label: str, reporter: Reporter) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model trained on the two authors' corpus, and its tokenizer."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings.seed)
    rows = warmup_corpus(settings.warmup_steps * settings.warmup_batch, settings.seed)

    with reporter.task(label, settings.warmup_steps) as bar:
        warm_up(
            model,
            tokenizer,
            rows,
            batch_size=settings.warmup_batch,
            learning_rate=settings.warmup_rate,
            on_step=lambda step, loss: bar.update(step, f"loss {loss:.3f}"),
        )

    return model, tokenizer


def write_run_file(folder: Path, name: str, stages: dict[str, Sequence[Path]], settings: Settings) -> None:
    """Write <name>.yaml; the run files for DPO and sDPO differ only in stages and output_dir."""
    # everything but the stages is the same for both, as the comparison is about the stages
    config: dict[str, Any] = {
        "model": str(folder / "start"),
        "output_dir": str(folder / name),
        "beta": settings.beta,
        "max_length": 64,
        "stages": [{"name": stage, "data": [str(path) for path in paths]} for stage, paths in stages.items()],
        "eval_data": [str(pair_file(folder, source.name, HELDOUT)) for source in SOURCES],
        "trainer": {
            "learning_rate": settings.learning_rate,
            "per_device_train_batch_size": settings.batch,
            "per_device_eval_batch_size": 64,
            "logging_steps": 5,
            "seed": settings.seed,
        },
    }

    text = f"# Written by examples/demo; to train again: sdpo train {folder / name}.yaml output_dir=<another folder>\n"
    (folder / f"{name}.yaml").write_text(text + write_settings(config), encoding="utf-8")
