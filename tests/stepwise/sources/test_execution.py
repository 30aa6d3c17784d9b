"""A real checker on real programs, and the pairs that come of it."""

import json
import sys

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.sources.execution import ExecutionJudge, pairs_from_passes
from sdpo_kernels.stepwise.sources.sandbox import Limits
from tests.stepwise.sources.bubblewrap import needs_bubblewrap

LIMITS = Limits(seconds=5, memory_mb=500)
CHECKER = """
import json, subprocess, sys
completion, prompt = sys.argv[1:]
expected = json.load(open(prompt))["answer"]
printed = subprocess.run([sys.executable, "-I", completion], capture_output=True, text=True).stdout.strip()
sys.exit(printed != expected)
"""


@pytest.fixture(params=[pytest.param("safe", marks=needs_bubblewrap), "unsafe"])
def judge(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "check.py").write_text(CHECKER)
    command, unsafe = [sys.executable, "check.py", "{completion}", "{prompt}"], request.param == "unsafe"
    return ExecutionJudge(command, LIMITS, workers=4, unsafe=unsafe)


def test_each_completion_is_judged_by_its_own_row(judge):
    rows = [{"prompt": "1+1", "answer": "2"}, {"prompt": "é", "answer": "é"}, {"prompt": "1+1", "answer": "2"}]
    rows += [{"prompt": "exit", "answer": "0"}]
    texts = ["print(1 + 1)", "print('é')", "print(3)", "import sys; sys.exit(0)"]
    assert judge.judge(rows, texts) == [True, True, False, False]
    assert judge.judge([], []) == []
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        judge.judge(rows, texts[:1])


def test_check_runs_the_command_and_minds_only_that_it_starts(judge, tmp_path):
    outcome = judge.check()
    assert outcome.exit_code == 1  # the empty row has no answer
    assert outcome.isolated == (not judge.unsafe)
    for command in ("no-such-checker", "./check.py"):  # the second may not be executed
        with pytest.raises(UserError, match=r"cannot start .*: it is not installed, or is not a program"):
            ExecutionJudge([command, "{completion}"], LIMITS, 1, unsafe=judge.unsafe).check()


def test_check_notices_limits_within_which_nothing_runs(judge):
    with pytest.raises(UserError, match="no program can run within the limits: `true` ended with"):
        ExecutionJudge(judge.command, Limits(memory_mb=1), 1, unsafe=judge.unsafe).check()


@needs_bubblewrap
def test_a_checker_reads_its_own_modules_only_where_readable_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "helper.py").write_text("import sys\ndef check(path): sys.exit(open(path).read() != 'good')")
    (tmp_path / "mine" / "check.py").write_text("import sys, helper\nhelper.check(sys.argv[1])")
    command = [sys.executable, "mine/check.py", "{completion}"]
    assert ExecutionJudge(command, LIMITS, 1).judge([{}], ["good"]) == [False]
    assert ExecutionJudge(command, LIMITS, 1, readable=["mine"]).judge([{}, {}], ["good", "bad"]) == [True, False]
    with pytest.raises(UserError, match=f"readable: was {tmp_path}/nothing, must exist, not be / or /tmp"):
        ExecutionJudge(command, LIMITS, 1, readable=["nothing"]).check()


def test_words_of_the_command(judge, tmp_path, monkeypatch):
    (tmp_path / "sh").write_text("not the shell")
    program = 'test "$1" = "$HOME/completion.txt" -a "$2" = "x=$HOME/prompt.json" -a "$3" = "{other}"'
    words = ["sh", "-c", program, "0", "{completion}", "x={prompt}", "{other}"]
    assert ExecutionJudge(words, LIMITS, 1, unsafe=judge.unsafe).judge([{"prompt": "a"}], ["b"]) == [True]
    with pytest.raises(UserError, match=r"must have a word \{completion\}"):
        ExecutionJudge(["python", "{prompt}"], LIMITS, 1)
    with pytest.raises(UserError, match="at least 1 worker"):
        ExecutionJudge(["python", "{completion}"], LIMITS, 0)


def pairs(completions, passed, cap=100, **options):
    rows = pairs_from_passes({"prompt": "p", "answer": 1}, completions, passed, cap, **options)
    assert all(row.keys() == {"prompt", "chosen", "rejected"} and row["prompt"] == "p" for row in rows)
    return [(row["chosen"], row["rejected"]) for row in rows]


def test_every_pass_with_every_failure_up_to_the_cap():
    texts, passed = list("abcdefg"), [True, False, True, False, True, False, True]
    every = {(good, bad) for good in "aceg" for bad in "bdf"}
    found = pairs(texts, passed)
    assert len(found) == len(every)
    assert set(found) == every
    for cap in range(1, 12):
        assert pairs(texts, passed, cap) == found[:cap]
    assert {good for good, _ in found[:4]} == set("aceg")
    assert {bad for _, bad in found[:3]} == set("bdf")


def test_the_order_is_the_same_each_time_and_another_with_another_seed():
    texts, passed = [str(n) for n in range(20)], [n % 2 == 0 for n in range(20)]
    assert pairs(texts, passed, 5) == pairs(texts, passed, 5)
    assert pairs(texts, passed, 5) != pairs(texts, passed, 5, seed=1)
    assert json.dumps(pairs(["a", "b"], [True, False], 5)) == '[["a", "b"]]'


def test_repeated_completions_count_once():
    assert pairs([" a\n", "a", "b", "b "], [True, True, False, False]) == [(" a\n", "b")]
    # 'c' passed once and failed once
    assert pairs(["a", "c", "b", "c"], [True, True, False, False]) == [("a", "b")]


@pytest.mark.parametrize("passed", [[True, True], [False, False]])
def test_no_pair_where_all_pass_or_all_fail(passed):
    assert pairs(["a", "b"], passed) == []
    assert pairs([], []) == []


def test_wrong_arguments():
    with pytest.raises(UserError, match='needs a field "prompt"'):
        pairs_from_passes({"question": "p"}, ["a"], [True], 1)
    with pytest.raises(UserError, match="at least 1 pair"):
        pairs(["a"], [True], 0)
