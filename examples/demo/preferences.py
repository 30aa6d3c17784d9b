"""The demo's preference pairs: the right answer against a wrong one that the model itself has written.

pairs = preference_pairs(model, tokenizer, SOURCES[0], "preference", 640, seed=1)
write_pairs(Path("short.jsonl"), pairs)              # JSON lines of {"prompt", "chosen", "rejected"}, TRL's schema
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.demo.generate import write_answers
from examples.demo.task import Problem, Source, Split, draw_words

ROUNDS = 20  # of `count` prompts each; a model that is wrong less often than one time in 20 has little to learn here


def preference_pairs(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    source: Source,
    split: Split,
    count: int,
    seed: int,
) -> list[dict[str, str]]:
    """`count` rows of prompt, chosen and rejected about different words of one source and split.

    The model answers each prompt once, sampled at temperature 1. Prompts it gets right are passed over, and so are
    answers that are no plain word. RuntimeError: it is wrong so seldom that ROUNDS do not give `count` pairs.
    """
    pairs: list[dict[str, str]] = []
    used: frozenset[str] = frozenset()
    for number in range(ROUNDS):
        problems = draw_words(source, split, count, seed=seed * ROUNDS + number, but=used)
        used |= {problem.word for problem in problems}
        prompts = [problem.prompt for problem in problems]
        answers = write_answers(model, tokenizer, prompts, temperature=1.0, seed=seed * ROUNDS + number)
        pairs += [
            {"prompt": problem.prompt, "chosen": problem.answer, "rejected": answer}
            for problem, answer in zip(problems, answers, strict=True)
            if answer is not None and is_wrong_word(problem, answer)
        ]
        if len(pairs) >= count:
            return pairs[:count]
    raise RuntimeError(
        f"{source.name}: only {len(pairs)} wrong answers to {ROUNDS * count} prompts, {count} are needed"
    )


def is_wrong_word(problem: Problem, answer: str) -> bool:
    """Whether `answer` consists of letters, at least one, and is not right."""
    return bool(answer) and not problem.is_right(answer) and set(answer) <= set(ascii_lowercase)


def write_pairs(path: Path, pairs: Sequence[dict[str, str]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def read_pairs(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `write_pairs` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
