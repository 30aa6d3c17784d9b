"""The demo's preference pairs: the right answer against a wrong one that the model itself generated.

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
from sdpo_kernels.stepwise.starter.letters import Problem, Source, Split, draw_words

ROUNDS = 20  # of `count` prompts each; a model that is wrong less often than once in 20 has little to learn here


def preference_pairs(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    source: Source,
    split: Split,
    count: int,
    seed: int,
) -> list[dict[str, str]]:
    """Generate `count` rows of prompt, chosen and rejected about different words of one source and split.

    1. Draw words that were not used before.
    2. Let the model answer each prompt once, sampled at temperature 1.
    3. Keep the wrong answers as rejected ones. Right answers and answers that are not a plain word are skipped.
    4. Repeat until there are enough.

    RuntimeError: the model is wrong too rarely to give `count` pairs in ROUNDS rounds.
    """
    pairs: list[dict[str, str]] = []
    used: frozenset[str] = frozenset()

    for number in range(ROUNDS):
        # a seed of its own for every round of every seed
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
    """Whether `answer` is a word, at least one letter and nothing else, and not the right one."""
    return bool(answer) and not problem.is_right(answer) and set(answer) <= set(ascii_lowercase)


def write_pairs(path: Path, pairs: Sequence[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Read the rows of a file from `write_pairs`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
