"""`sdpo init`: a folder with a run file, preference pairs and a tiny model, which `sdpo train` trains in a minute.

    write_starter(Path("runs/first"), model=None)   # runs/first/{run.yaml, model/, data/*.jsonl}

The task is that of letters.py, with words of three and of four letters: a right answer against a careless one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import empty_folder, publish_folder
from sdpo_kernels.stepwise.settings.run_file import absolute_model
from sdpo_kernels.stepwise.starter.letters import Source, Split, draw_words
from sdpo_kernels.stepwise.starter.tiny_model import build_model, build_tokenizer, save

STAGES = (Source("short", 3, careless=0.5), Source("long", 4, careless=0.5))
PAIRS, HELDOUT_PAIRS = {"short": 320, "long": 640}, 100  # of each stage
SEED = 0

RUN_FILE = """\
# To train: sdpo train {run_file}
model: {model}
output_dir: {output}

# a stage starts from the model of the stage before, which is also its reference
stages:
  - {{name: short, data: {short}}}
  - {{name: long, data: {long}}}
eval_data: {eval}   # held out, measured after every stage

{training}"""
OF_TINY_MODEL = """\
# With a model of your own: loss sigmoid (DPO's alone), a learning rate of about 5.0e-7 (with LoRA 5.0e-6), beta 0.1.
# This one has random weights, so the loss also raises the likelihood of the chosen answers (sft).
loss: [sigmoid, sft]
beta: 0.3
max_length: 32
trainer: {learning_rate: 2.0e-3, per_device_train_batch_size: 32, logging_steps: 5}
"""
OF_OWN_MODEL = """\
beta: 0.1
max_length: 512
trainer: {learning_rate: 5.0e-7, per_device_train_batch_size: 4, logging_steps: 5}   # TrainingArguments fields
"""


def write_starter(folder: Path, model: str | None) -> Path:
    """Write the folder, which must not exist or be empty, and return its run file; without `model` a tiny one is made.

    Raises:
        UserError: there are files in `folder`, or it cannot be written; `model` is a path of no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there and not empty; give a new folder")
    if folder.resolve() == Path.cwd():
        raise UserError(f"{folder}: is the current folder, which cannot be replaced; give a new one")
    if model is not None:
        absolute_model(model, "--model")
    staging = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        empty_folder(staging)
        _write(staging, folder, model)
        if folder.exists():
            folder.rmdir()
        publish_folder(staging, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder / "run.yaml"


def _write(staging: Path, folder: Path, model: str | None) -> None:
    if model is None:
        tokenizer = build_tokenizer()
        save(build_model(tokenizer, SEED), tokenizer, staging / "model")

    data = staging / "data"
    data.mkdir()
    for source in STAGES:
        _write_rows(data / f"{source.name}.jsonl", pairs(source, "preference", PAIRS[source.name]))
    heldout = [pair for source in STAGES for pair in pairs(source, "heldout", HELDOUT_PAIRS)]
    _write_rows(data / "eval.jsonl", heldout)

    training = OF_TINY_MODEL if model is None else OF_OWN_MODEL
    paths = {name: _quoted(str(folder / "data" / f"{name}.jsonl")) for name in ("short", "long", "eval")}
    text = RUN_FILE.format(
        run_file=folder / "run.yaml", model=_quoted(model or str(folder / "model")),
        output=_quoted(str(folder / "run")), training=training, **paths,
    )  # fmt: skip
    (staging / "run.yaml").write_text(text, encoding="utf-8")


def _quoted(text: str) -> str:
    """As a YAML string, with quotes where it needs them."""
    # a word without a slash may read as a number or as true
    is_plain = "/" in text and not text.startswith("-") and re.fullmatch(r"[\w./-]+", text, re.ASCII)
    return text if is_plain else json.dumps(text)


def pairs(source: Source, split: Split, count: int) -> list[dict[str, str]]:
    """`count` pairs about different words; the careless answer is wrong in all of them."""
    # the careless author is right where the last letter belongs at the end
    problems = [p for p in draw_words(source, split, 2 * count, SEED) if p.careless != p.answer]
    return [{"prompt": p.prompt, "chosen": p.answer, "rejected": p.careless} for p in problems[:count]]


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
