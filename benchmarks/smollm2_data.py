"""Short pairs of the full pack for `examples/smollm2.yaml`: some to train on, others held out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks.problem import DATA
from sdpo_kernels.stepwise.common.files import empty_folder, publish_folder, replace_file
from sdpo_kernels.stepwise.data.pairs import read_pairs
from sdpo_kernels.stepwise.data.tokenize import tokenize_pairs

STAGES = ("stage1_orca_gsm8k", "stage2_ultrafeedback", "stage3_human_chat")
LONGEST = 224  # tokens of prompt and answer together
TRAINED, HELD_OUT, EVAL = 80, 24, 48  # pairs to train on and held out of each stage's file, and pairs of eval.jsonl


def write_slices(folder: Path, tokenizer: Any) -> None:
    """Write the pairs of each stage to `folder`, and as heldout_* those that it is judged by; keep what is there."""
    if folder.is_dir():
        return
    staging = empty_folder(folder.with_name(f".{folder.name}"))
    for stage in STAGES:
        trained, held_out = divide(short_rows(DATA / f"full/{stage}.jsonl.gz", tokenizer), TRAINED, HELD_OUT)
        write_rows(staging / f"{stage}.jsonl", trained)
        write_rows(staging / f"heldout_{stage}.jsonl", held_out)
    write_rows(staging / "heldout_eval.jsonl", spread(short_rows(DATA / "full/eval.jsonl.gz", tokenizer), EVAL))
    publish_folder(staging, folder)


def short_rows(file: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of a file whose pairs have at most LONGEST tokens in each sequence."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    pairs = read_pairs([str(file)], on_bad_row="error").pairs
    tokens = tokenize_pairs(pairs, tokenizer, max_length=LONGEST, truncation="keep_start")
    whole = zip(tokens.kept, tokens.cut, strict=True)
    return [rows[index] for index, cut in whole if not cut]


def divide(
    rows: list[dict[str, Any]], trained: int, held_out: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on, and others whose prompts are not among theirs; both spread over the file."""
    first = spread(rows, trained)
    prompts = {json.dumps(row["prompt"]) for row in first}
    return first, spread([row for row in rows if json.dumps(row["prompt"]) not in prompts], held_out)


def spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows at equal distances."""
    return [rows[place * len(rows) // count] for place in range(count)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    replace_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def heldout_files(folder: Path) -> list[Path]:
    """The files of held-out pairs, in the order of the example's `eval_data`."""
    return [folder / f"heldout_{name}.jsonl" for name in (*STAGES, "eval")]
