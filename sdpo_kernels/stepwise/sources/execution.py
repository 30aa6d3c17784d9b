"""Pairs from running programs: what passes the user's checker is chosen, what fails is rejected (CodeLLM DPO).

    judge = ExecutionJudge(["python", "check.py", "{completion}", "{prompt}"], Limits(seconds=5), workers=8)
    judge.check()                                        # before any training
    passed = judge.judge([row] * len(texts), texts)      # one bool for each completion
    rows = pairs_from_passes(row, texts, passed, cap=4)  # [{"prompt": …, "chosen": …, "rejected": …}, …]

The checker decides by its exit code: 0 is a pass. One that runs the completion in its own process can be fooled by
`sys.exit(0)`; it should start a second process and compare what that prints. Source: arXiv 2410.18585.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.settings.source import ExecutionSource
from sdpo_kernels.stepwise.sources.context import PairRow, SourceContext
from sdpo_kernels.stepwise.sources.generation import sample
from sdpo_kernels.stepwise.sources.judges import VERDICTS, code_version, judge_groups, remembering
from sdpo_kernels.stepwise.sources.sandbox import Job, Limits, Outcome, run_many

AT_ONCE = 64  # prompts judged between two steps of the progress bar
COMPLETION, PROMPT = "completion.txt", "prompt.json"  # the files that a checker reads
UNSAFE_WARNING = (
    "unsafe: true runs programs with resource limits alone: they can read and write your files and use the network, "
    "and what they start may survive them"
)


class ExecutionJudge:
    """Judges completions by the exit code of a command of the user.

    `command`: its words; in each of them `{completion}` becomes the path of a file with the completion and `{prompt}`
    that of a file with the row of the prompt file as JSON. It runs in an empty folder, so a word that names a file
    here is made a full path; that file and those of `readable` are all it can read besides the system. `limits` hold
    for one run of it, `workers` run at a time. `unsafe`: without bubblewrap, with the limits alone.
    UserError for a command without `{completion}`, or for fewer than one worker.
    """

    def __init__(
        self,
        command: Sequence[str],
        limits: Limits,
        workers: int,
        readable: Sequence[str] = (),
        unsafe: bool = False,
    ) -> None:
        if not any("{completion}" in word for word in command):
            raise UserError(f"the checker's command must have a word {{completion}} (the file to check): {command}")
        if workers < 1:
            raise UserError(f"the checker needs at least 1 worker, not {workers}")
        self.command = [_from_anywhere(word, first=number == 0) for number, word in enumerate(command)]
        self.limits, self.workers = limits, workers
        self.readable, self.unsafe = [os.path.abspath(path) for path in readable], unsafe

    def check(self) -> Outcome:
        """Run the command once, on an empty completion and an empty row; whether it passes does not matter.

        UserError if it cannot start, without bubblewrap, or if not even `true` can run within the limits.
        """
        [trial] = run_many([Job(["true"], unsafe=self.unsafe)], self.limits, 1)
        if not trial.passed:
            raise UserError(f"no program can run within the limits: `true` ended with {trial.reason}: {trial.output}")
        return self.outcomes([{}], [""])[0]

    def judge(self, prompts: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> list[bool]:
        """Whether each completion passes; `prompts` holds the row of each. UserError where the command cannot start."""
        return [outcome.passed for outcome in self.outcomes(prompts, completions)]

    def scores(self, rows: Sequence[PromptRow], completions: Sequence[str]) -> list[float]:
        """As any judge answers: 1 for a pass, 0 for a failure."""
        return [float(passed) for passed in self.judge([row.values for row in rows], completions)]

    def outcomes(self, prompts: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> list[Outcome]:
        """As `judge`, with how each run of the command ended."""
        jobs = [self._job(row, text) for row, text in zip(prompts, completions, strict=True)]
        return run_many(jobs, self.limits, self.workers)

    def _job(self, row: Mapping[str, Any], completion: str) -> Job:
        command = [
            word.replace("{completion}", "{" + COMPLETION + "}").replace("{prompt}", "{" + PROMPT + "}")
            for word in self.command
        ]
        files = {COMPLETION: completion, PROMPT: json.dumps(dict(row), ensure_ascii=False, default=str)}
        return Job(command, files=files, readable=self.readable, unsafe=self.unsafe)


def judge_of(settings: ExecutionSource) -> ExecutionJudge:
    """The judge that a stage's settings ask for."""
    limits = Limits(
        seconds=settings.seconds, memory_mb=settings.memory_mb, processes=settings.processes, file_mb=settings.file_mb
    )
    return ExecutionJudge(settings.command, limits, settings.workers, settings.readable, settings.unsafe)


def make(ctx: SourceContext) -> list[PairRow]:
    """Pairs of every prompt of whose samples some pass and some fail."""
    settings = ctx.settings
    assert isinstance(settings, ExecutionSource)
    groups = [list(dict.fromkeys(group)) for group in sample(ctx, settings.samples)]  # none is run twice
    judge = judge_of(settings)
    remembered = remembering(judge.scores, ctx.folder / VERDICTS, code_version(*judge.command))
    rows: list[PairRow] = []
    with ctx.reporter.task(ctx.label("programs"), len(ctx.prompts)) as task:
        for first in range(0, len(ctx.prompts), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            verdicts = judge_groups(remembered, ctx.prompts[some], groups[some])
            for row, texts, passed in zip(ctx.prompts[some], groups[some], verdicts, strict=True):
                rows += _pairs_of(ctx, settings, row, texts, [score > 0 for score in passed])
            task.update(min(first + AT_ONCE, len(ctx.prompts)))
    return rows


def _pairs_of(
    ctx: SourceContext, settings: ExecutionSource, row: PromptRow, texts: Sequence[str], passed: Sequence[bool]
) -> list[PairRow]:
    """One prompt's pairs, in the row's own form."""
    pairs = pairs_from_passes(row.values, texts, passed, settings.pairs_per_prompt, ctx.seed("pairs"))
    return [row.pair(pair["chosen"], pair["rejected"]) for pair in pairs]


def _from_anywhere(word: str, first: bool) -> str:
    """The full path of a file of that name, else the word. The command's first word is a path only with a slash in it,
    as in a shell."""
    is_path = "/" in word or not first
    return os.path.abspath(word) if is_path and os.path.isfile(word) else word


def pairs_from_passes(
    row: Mapping[str, Any], completions: Sequence[str], passed: Sequence[bool], cap: int, seed: int = 0
) -> list[dict[str, str]]:
    """At most `cap` pairs (passing, failing) of one prompt; none where all pass or all fail.

    Completions that differ only by white space around them count once, as they came first; one that both passed and
    failed (a checker that is not sure of itself) is left out. No completion is in a second pair of its side before
    all others of that side are in one. The draw depends on `seed`, the prompt and the completions only.
    UserError where `row` has no "prompt" or `cap` is below 1.
    """
    if "prompt" not in row:
        raise UserError(f'a row of prompts needs a field "prompt"; this one has {sorted(row)}')
    if cap < 1:
        raise UserError(f"at least 1 pair a prompt must be allowed, not {cap}")
    good, bad = _both_sides(completions, passed)
    if not good or not bad:
        return []
    draw = random.Random(hashlib.sha256(json.dumps([seed, row["prompt"]]).encode()).digest())
    draw.shuffle(good)
    draw.shuffle(bad)
    return [
        {"prompt": row["prompt"], "chosen": good[first], "rejected": bad[second]}
        for first, second in _spread(len(good), len(bad), cap)
    ]


def _both_sides(completions: Sequence[str], passed: Sequence[bool]) -> tuple[list[str], list[str]]:
    """The distinct completions that only ever passed, and those that only ever failed."""
    texts: dict[str, str] = {}
    verdicts: dict[str, set[bool]] = {}
    for completion, verdict in zip(completions, passed, strict=True):
        key = completion.strip()
        texts.setdefault(key, completion)
        verdicts.setdefault(key, set()).add(bool(verdict))
    good = [texts[key] for key, seen in verdicts.items() if seen == {True}]
    bad = [texts[key] for key, seen in verdicts.items() if seen == {False}]
    return good, bad


def _spread(rows: int, columns: int, cap: int) -> list[tuple[int, int]]:
    """The first `cap` cells of a table, each once, down the diagonals, so that every row and column has its turn."""
    longer, shorter = max(rows, columns), min(rows, columns)
    cells = [(step % longer, (step % longer + step // longer) % shorter) for step in range(min(cap, longer * shorter))]
    return cells if rows == longer else [(second, first) for first, second in cells]
