"""Hidden states, head and targets of a real language model: `python -m benchmarks.real --model smollm2`.

Random hidden states have logits that no language model has, so they must not be used to show a gain in accuracy,
sparsity or speed. This command gets a model (`real_models.py`), asks it a question, sends answers of real pairs
through it, and writes what its head takes to runs/real/<model>/head.safetensors, which is never committed.

    real = load("smollm2")
    logits = real.hidden[:100] @ real.head.T      # those of the model

A model of your own is a folder that transformers loads; the folder's name is then the model's in other benchmarks:

    python -m benchmarks.real --model path/to/my-model --data pairs.jsonl
    python -m benchmarks.grad_tol --model my-model
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import DATA, IGNORE_INDEX, CannotRun, Problem
from benchmarks.real_models import MODELS, Packaged, answer, model_folder
from sdpo_kernels import linear_logps

RUNS = Path(__file__).resolve().parents[1] / "runs" / "real"
FILES = (
    "stage1_orca_gsm8k.jsonl.gz", "stage2_ultrafeedback.jsonl.gz", "stage3_human_chat.jsonl.gz", "eval.jsonl.gz",
)  # fmt: skip
TAKEN = ("random", "plain", "confident", "improbable")  # what other benchmarks call inputs that are no model's
HIGHEST_NATS = 2.0  # a token, of a model that is as it should be; a wrong tokenizer or weight gives 3 and more


@dataclass(frozen=True)
class Real:
    """What the head takes to score P pairs of answers, one row for each of their N tokens."""

    hidden: Tensor  # [N, H] float32, after the last norm: row i predicts targets[i]
    head: Tensor  # [V, H] float32
    targets: Tensor  # [N] int64
    lengths: Tensor  # [2P] int64, rows of each answer: all chosen ones first, then the rejected in the same order


def load(name: str, runs: Path = RUNS) -> Real:
    """What `python -m benchmarks.real --model name` has written; CannotRun if it has not."""
    from safetensors.torch import load_file

    return Real(**load_file(file_of(name, runs)))


def file_of(name: str, runs: Path = RUNS) -> Path:
    """The file of model `name`; CannotRun if there is none."""
    file = runs / name / "head.safetensors"
    if not file.is_file():
        model = name if name in MODELS else f"FOLDER/{name} --data FILE"
        raise CannotRun(f"{file} is missing: python -m benchmarks.real --model {model}")
    return file


def require(names: Iterable[str]) -> None:
    """End the program in one line if a model has not been extracted, before anything is measured."""
    try:
        for name in names:
            file_of(name)
    except CannotRun as reason:
        raise SystemExit(str(reason)) from None


def single_tokens(real: Real, pairs: int) -> Problem:
    """2 · `pairs` of the rows, or all, spread over them, each a sequence of its own; the reference is the policy."""
    pairs = min(pairs, len(real.targets) // 2)
    rows = torch.linspace(0, len(real.targets) - 1, 2 * pairs).long()
    states, head = real.hidden[rows].unsqueeze(1), real.head
    return Problem(states, head, states, head, real.targets[rows].unsqueeze(1)).cast(torch.float32)


def answers(real: Real, pairs: int, length: int) -> Problem:
    """The first `pairs` pairs, cut or padded to `length` tokens an answer; the reference is the policy."""
    every = list(zip(real.hidden.split(real.lengths.tolist()), real.targets.split(real.lengths.tolist()), strict=True))
    half = len(every) // 2
    if pairs > half:
        raise CannotRun(f"there are {half} pairs, not {pairs}: python -m benchmarks.real --pairs")
    states = torch.zeros(2 * pairs, length, real.hidden.shape[1])
    labels = torch.full((2 * pairs, length), IGNORE_INDEX)
    for place, (rows, targets) in enumerate(every[:pairs] + every[half : half + pairs]):
        kept = min(length, len(targets))
        states[place, :kept], labels[place, :kept] = rows[:kept], targets[:kept]
    return Problem(states, real.head, states, real.head, labels).cast(torch.float32)


def main(arguments: list[str] | None = None) -> int:
    """Get the model, check it, and write its hidden states."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = parse(arguments)
    torch.set_num_threads(options.threads)

    known = MODELS.get(options.model)
    if known is not None:
        print(known.licence)
    folder = Path(options.model) if known is None else model_folder(options.model, RUNS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if known is not None:
        check_answer(known, model, tokenizer)

    real = extract(model, tokenizer, options.data, options.pairs, options.max_length)
    nats = nats_per_token(real)
    print(f"{len(real.targets):,} tokens of {len(real.lengths)} answers: {nats:.3f} nat a token")
    if known is not None and nats > HIGHEST_NATS:
        raise SystemExit(f"not as it should be: {HIGHEST_NATS} nat are the most")

    file = RUNS / (folder.resolve().name if known is None else options.model) / "head.safetensors"
    write(real, file)
    print(f"written: {file}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)} or a folder that transformers loads")
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="pairs (default: the full pack)")
    parser.add_argument("--pairs", type=int, default=8, help="from each file")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and answer together")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)

    if options.model not in MODELS:
        folder = Path(options.model)
        if not (folder / "config.json").is_file():
            parser.error(f"--model: was {options.model!r}, must be {', '.join(MODELS)} or a folder with a config.json")
        if folder.resolve().name in {*MODELS, *TAKEN}:
            parser.error(f"--model: {folder.resolve().name!r} means something else here; give the folder another name")
    for file in options.data or ():
        if not file.exists():
            parser.error(f"--data: {file} is missing")
    if options.pairs < 1:
        parser.error(f"--pairs: was {options.pairs}, must be at least 1")
    options.data = options.data or [DATA / "full" / name for name in FILES]
    return options


def check_answer(known: Packaged, model: Any, tokenizer: Any) -> None:
    """Stop if the model does not know what it is known to know: a wrong tokenizer or weight."""
    said = answer(model, tokenizer, known.question)
    print(f"{known.question} {said!r}")
    if known.answer not in said:
        raise SystemExit(f"not as it should be: the answer has {known.answer!r}")


def extract(model: Any, tokenizer: Any, files: list[Path], pairs: int, max_length: int) -> Real:
    """The rows that score `pairs` pairs of each file, spread over it, tokenised as the driver does."""
    from sdpo_kernels.integrations.lm_head import find_head
    from sdpo_kernels.stepwise.data.pairs import read_pairs
    from sdpo_kernels.stepwise.data.tokenize import tokenize_pairs

    head = find_head(model)
    if head.bias() is not None or head.softcap is not None:
        raise SystemExit("the model's head has a bias or a softcap, which these benchmarks leave out")
    weight = head.weight().detach() * head.logit_scale

    chosen, rejected = [], []
    for file in files:
        found = read_pairs([str(file)], on_bad_row="error").pairs
        some = found[:: max(1, len(found) // pairs)][:pairs]
        for pair in tokenize_pairs(some, tokenizer, max_length=max_length, truncation="keep_start"):
            chosen.append(pair.chosen)
            rejected.append(pair.rejected)

    hidden, targets = [], []
    for sequence in chosen + rejected:
        ids = torch.from_numpy(sequence.ids).long()
        with torch.no_grad():
            states = head.hidden(input_ids=ids[None, :-1], use_cache=False)[0]
        hidden.append(states[sequence.prompt_length - 1 :])
        targets.append(ids[sequence.prompt_length :])

    return Real(torch.cat(hidden), weight, torch.cat(targets), torch.tensor([len(rows) for rows in targets]))


def nats_per_token(real: Real) -> float:
    """How many nats a target costs on average."""
    return -linear_logps(real.hidden, real.head, real.targets).logps.double().mean().item()


def write(real: Real, file: Path) -> None:
    """Write `real` to a safetensors file, atomically."""
    from safetensors.torch import save

    from sdpo_kernels.stepwise.common.files import replace_file

    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save({field.name: getattr(real, field.name).contiguous() for field in fields(real)}))


if __name__ == "__main__":
    raise SystemExit(main())
