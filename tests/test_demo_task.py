"""The demo's own parts: task, tokenizer, warm-up, preference pairs, evaluation and tables."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from examples.demo.evaluate import answer_logps, difference, exactly_right, pair_gammas
from examples.demo.generate import write_answers
from examples.demo.preferences import is_wrong_word, preference_pairs, read_pairs, write_pairs
from examples.demo.results import Judged, difference_lines, gamma_table, result_rows, result_table, write_results
from examples.demo.setup import QUICK, Settings, set_up
from examples.demo.sft import NOT_SCORED, answer_tensors, warm_up
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.pairs import read_pairs as driver_reads
from sdpo_kernels.stepwise.data.tokenize import tokenize_pairs
from sdpo_kernels.stepwise.settings.run_file import load_config
from sdpo_kernels.stepwise.starter.letters import SOURCES, SPLITS, Problem, draw_words, split_of, warmup_corpus
from sdpo_kernels.stepwise.starter.tiny_model import build_model, build_tokenizer, load, save

words = st.text(ascii_lowercase, min_size=2, max_size=9)
sources = st.sampled_from(SOURCES)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def novice(tokenizer):
    """A model after a few steps of warm-up: its answers are words that end, and nearly all of them are wrong."""
    model = build_model(tokenizer, seed=0)
    warm_up(model, tokenizer, warmup_corpus(64 * 60, seed=0), batch_size=64, learning_rate=3e-3)
    return model


# ---- the task ----


@given(words)
def test_the_answer_has_the_same_letters_in_alphabetical_order(word: str) -> None:
    answer = Problem(word).answer
    assert Counter(answer) == Counter(word)
    assert all(before <= after for before, after in itertools.pairwise(answer))


@given(words)
def test_only_the_answer_is_right(word: str) -> None:
    problem = Problem(word)
    assert problem.is_right(problem.answer)
    assert not problem.is_right(problem.answer + problem.answer[-1])
    assert not problem.is_right(problem.answer[:-1])
    assert problem.is_right(problem.answer[::-1]) == (len(set(word)) == 1)


@given(words)
def test_the_careless_answer_is_right_only_if_the_last_letter_is_the_greatest(word: str) -> None:
    problem = Problem(word)
    assert problem.careless[-1] == word[-1]
    assert Counter(problem.careless) == Counter(word)
    assert problem.is_right(problem.careless) == (word[-1] == max(word))


@given(sources, st.sampled_from(SPLITS), st.integers(0, 40), st.integers(0, 10_000))
def test_drawn_words_differ_belong_to_the_split_and_are_reproducible(source, split, count, seed) -> None:
    problems = draw_words(source, split, count, seed)
    assert len({problem.word for problem in problems}) == count
    assert all(len(problem.word) == source.letters and split_of(problem.word) == split for problem in problems)
    assert problems == draw_words(source, split, count, seed)


def test_words_already_used_are_not_drawn_again() -> None:
    first = draw_words(SOURCES[0], "heldout", 50, seed=3)
    used = frozenset(problem.word for problem in first)
    second = draw_words(SOURCES[0], "heldout", 50, seed=3, but=used)
    assert not used & {problem.word for problem in second}


def test_more_words_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="count is 1000000, must be at most 57122 for words of 4"):
        draw_words(SOURCES[0], "heldout", 1_000_000, seed=0)


def test_held_out_words_are_in_no_corpus_and_no_preference_pair() -> None:
    corpus = {prompt for prompt, _ in warmup_corpus(6000, seed=0)}
    drawn = {
        split: {problem.prompt for source in SOURCES for problem in draw_words(source, split, 2000, seed=0)}
        for split in ("preference", "heldout")
    }
    assert len(corpus) == 6000
    assert not drawn["heldout"] & drawn["preference"]
    assert not corpus & (drawn["heldout"] | drawn["preference"])


def test_the_corpus_is_by_two_authors_in_the_stated_shares() -> None:
    rows = warmup_corpus(9000, seed=1)
    assert rows == warmup_corpus(9000, seed=1)
    assert rows != warmup_corpus(9000, seed=2)
    for source in SOURCES:
        problems = [(Problem(prompt[5:-1]), answer) for prompt, answer in rows if len(prompt) == source.letters + 6]
        assert len(problems) == 3000
        assert all(answer in (problem.answer, problem.careless) for problem, answer in problems)
        telling = [problem.is_right(answer) for problem, answer in problems if problem.answer != problem.careless]
        assert 1 - sum(telling) / len(telling) == pytest.approx(source.careless, abs=0.04)  # 4 standard errors


# ---- tokenizer and model ----


@given(word=words)
def test_the_tokenizer_restores_a_prompt_and_has_one_token_per_letter(tokenizer, word: str) -> None:
    text = Problem(word).prompt
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(word) + 2
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_a_saved_model_loads_with_the_same_weights_and_tokens(tokenizer, tmp_path: Path) -> None:
    model = build_model(tokenizer, seed=5)
    save(model, tokenizer, tmp_path)
    again, tokenizer_again = load(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert tokenizer_again("sort zebra:")["input_ids"] == tokenizer("sort zebra:")["input_ids"]
    assert (tokenizer_again.eos_token, tokenizer_again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_the_model_depends_on_the_seed_and_leaves_the_global_random_state_alone(tokenizer) -> None:
    state = torch.get_rng_state()
    first, same, other = (build_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


# ---- warm-up ----


def test_only_the_answer_and_its_end_token_are_scored(tokenizer) -> None:
    rows = [("sort ba:", "ab"), ("sort dcba:", "abcd")]
    ids, labels = answer_tensors(tokenizer, rows)
    for row, (_, answer) in enumerate(rows):
        scored = labels[row] != NOT_SCORED
        assert tokenizer.decode(ids[row][scored]) == answer + tokenizer.eos_token
        assert torch.equal(labels[row][scored], ids[row][scored])


def test_the_warm_up_learns_and_is_reproducible(tokenizer) -> None:
    def train() -> tuple[list[float], torch.Tensor]:
        model = build_model(tokenizer, seed=0)
        losses = warm_up(model, tokenizer, warmup_corpus(32 * 40 + 5, seed=0), batch_size=32, learning_rate=3e-3)
        return losses, model.lm_head.weight

    losses, weight = train()
    again, weight_again = train()
    assert len(losses) == 40
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
    assert losses == again
    assert torch.equal(weight, weight_again)


# ---- answers ----


def test_answers_do_not_depend_on_the_other_prompts_of_the_batch(tokenizer, novice) -> None:
    prompts = [problem.prompt for source in SOURCES for problem in draw_words(source, "heldout", 8, seed=0)]
    together = write_answers(novice, tokenizer, prompts)
    assert together == [write_answers(novice, tokenizer, [prompt])[0] for prompt in prompts]
    assert any(answer is not None for answer in together)


def test_greedy_answers_are_the_likeliest_tokens_of_the_model(tokenizer, novice) -> None:
    prompt = "sort kdab:"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, novice(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    text = tokenizer.decode(ids[0])
    end = text.find(tokenizer.eos_token)
    expected = None if end < 0 else text[len(prompt) : end]
    assert write_answers(novice, tokenizer, [prompt]) == [expected]


def test_samples_repeat_with_the_seed_and_leave_the_global_random_state_alone(tokenizer, novice) -> None:
    prompts = [problem.prompt for problem in draw_words(SOURCES[1], "heldout", 20, seed=0)]
    state = torch.get_rng_state()
    first, same, other = (write_answers(novice, tokenizer, prompts, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first == same
    assert first != other


# ---- preference pairs ----


def test_the_driver_reads_the_pairs(tokenizer, novice, tmp_path: Path) -> None:
    pairs = preference_pairs(novice, tokenizer, SOURCES[0], "preference", 30, seed=1)
    assert pairs == preference_pairs(novice, tokenizer, SOURCES[0], "preference", 30, seed=1)
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, pairs)
    assert read_pairs(path) == pairs
    assert all(set(json.loads(line)) == {"prompt", "chosen", "rejected"} for line in path.read_text().splitlines())
    taken = driver_reads([str(path)], on_bad_row="error").pairs
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in taken] == [tuple(pair.values()) for pair in pairs]
    tokens = tokenize_pairs(taken, tokenizer, max_length=64, truncation="keep_start")
    assert (len(tokens), tokens.dropped, tokens.warnings) == (30, [], [])


def test_the_chosen_answer_is_right_the_rejected_one_wrong_and_each_word_used_once(tokenizer, novice) -> None:
    pairs = preference_pairs(novice, tokenizer, SOURCES[2], "heldout", 40, seed=2)
    problems = [Problem(pair["prompt"].removeprefix("sort ").removesuffix(":")) for pair in pairs]
    assert len({problem.word for problem in problems}) == 40
    for problem, pair in zip(problems, pairs, strict=True):
        assert split_of(problem.word) == "heldout"
        assert problem.is_right(pair["chosen"])
        assert not problem.is_right(pair["rejected"])


@pytest.mark.parametrize(
    ("answer", "expected"), [("abdk", False), ("abkd", True), ("", False), ("ab<unk>", False), ("sort ", False)]
)
def test_only_wrong_words_are_rejected_answers(answer: str, expected: bool) -> None:
    assert is_wrong_word(Problem("kdab"), answer) == expected


def test_a_model_that_is_never_wrong_is_an_error(tokenizer, novice, monkeypatch: pytest.MonkeyPatch) -> None:
    def right_answers(model, tokenizer, prompts, **_):
        return [Problem(prompt[5:-1]).answer for prompt in prompts]

    monkeypatch.setattr("examples.demo.preferences.write_answers", right_answers)
    with pytest.raises(RuntimeError, match="short: only 0 wrong answers to 40 prompts, 2 are needed"):
        preference_pairs(novice, tokenizer, SOURCES[0], "preference", 2, seed=0)


# ---- evaluation ----


def test_answer_logps_are_those_of_each_sequence_alone(tokenizer, novice) -> None:
    rows = [("sort ba:", "ab"), ("sort dcbafe:", "abcdef"), ("sort dcba:", "bacd")]
    together = answer_logps(novice, tokenizer, rows, batch_size=2)
    for row, (prompt, answer) in enumerate(rows):
        ids = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logps = novice(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(answer) + 1  # tokens that are scored, counted from the end
        alone = sum(logps[-start - 1 + place, ids[0, -start + place]].item() for place in range(start))
        assert together[row].item() == pytest.approx(alone, abs=1e-4)


def test_gammas_change_sign_when_the_answers_are_swapped(tokenizer, novice) -> None:
    pair = {"prompt": "sort dcba:", "chosen": "abcd", "rejected": "abdc"}
    exchanged = {"prompt": "sort dcba:", "chosen": "abdc", "rejected": "abcd"}
    one, other = pair_gammas(novice, tokenizer, [pair, exchanged])
    assert one != 0
    assert one.item() == pytest.approx(-other.item(), abs=1e-4)


def test_exactly_right_counts_the_right_answers(tokenizer, novice, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(model, tokenizer, prompts):
        return ["ab", None, "dc", "ef"]

    monkeypatch.setattr("examples.demo.evaluate.write_answers", answers)
    problems = [Problem("ba"), Problem("ba"), Problem("dc"), Problem("ef")]
    assert exactly_right(novice, tokenizer, problems).tolist() == [True, False, False, True]


def test_the_difference_is_paired_by_prompt() -> None:
    right = torch.tensor([True] * 60 + [False] * 40)
    assert difference(right, right) == (0.0, 0.0)
    mean, reach = difference(right, ~right)
    assert mean == pytest.approx(0.2)
    assert reach == pytest.approx(1.96 * (0.96 * 100 / 99) ** 0.5 / 10)


# ---- the common start ----

TINY = Settings(warmup_steps=40, pairs=12, heldout_pairs=6, heldout_prompts=6)


@pytest.fixture(scope="module")
def tiny_start(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, set_up(folder, TINY, Reporter(quiet=True))


def test_both_run_files_hold_the_same_pairs_rates_and_start(tiny_start) -> None:
    folder, start = tiny_start
    dpo, sdpo = (load_config(start.run_files[name]) for name in ("dpo", "sdpo"))
    assert [stage.name for stage in sdpo.stages] == [source.name for source in SOURCES]
    assert [stage.name for stage in dpo.stages] == ["all"]
    assert dpo.stages[0].data == tuple(path for stage in sdpo.stages for path in stage.data)
    differing = {key for key, value in dpo.model_dump().items() if sdpo.model_dump()[key] != value}
    assert differing == {"stages", "output_dir"}
    assert Path(dpo.model) == (folder / "start").resolve()


def test_held_out_pairs_share_no_prompt_with_training_pairs(tiny_start) -> None:
    _, start = tiny_start
    training = {pair["prompt"] for pairs in start.pairs.values() for pair in pairs}
    heldout = {pair["prompt"] for pairs in start.heldout.values() for pair in pairs}
    assert (len(training), len(heldout)) == (36, 18)
    assert not training & heldout


def test_a_second_call_reads_the_start_and_writes_nothing(tiny_start) -> None:
    folder, start = tiny_start
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert set_up(folder, TINY, Reporter(quiet=True)) == start
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_other_settings_in_the_same_folder_are_an_error(tiny_start) -> None:
    folder, _ = tiny_start
    with pytest.raises(UserError, match="contains a demo with different settings"):
        set_up(folder, QUICK, Reporter(quiet=True))


def test_a_start_in_another_folder_is_the_same(tiny_start, tmp_path: Path) -> None:
    folder, start = tiny_start
    again = set_up(tmp_path, TINY, Reporter(quiet=True))
    assert (again.pairs, again.heldout) == (start.pairs, start.heldout)
    weights = [(place / "start" / "model.safetensors").read_bytes() for place in (folder, tmp_path)]
    assert weights[0] == weights[1]


# ---- tables ----


@pytest.fixture
def judged() -> list[Judged]:
    def model(name: str, right: int) -> Judged:
        shares = {source.name: torch.arange(20) < right + place for place, source in enumerate(SOURCES)}
        return Judged(name, right=shares, ranked={source: ~values for source, values in shares.items()})

    return [model("SFT", 2), model("DPO", 15), model("sDPO", 15)]


GAMMAS = {
    "SFT": {"short": 0.5, "medium": 0.6, "long": 0.7},
    "DPO": {"all": 0.6},
    "sDPO": {"short": 0.5, "medium": 1.25, "long": 2.75},
}


def text_of(table: object) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_rows_hold_the_shares_by_source_and_overall(judged: list[Judged]) -> None:
    row = result_rows(judged, GAMMAS)[0]
    assert row["exactly_right"] == pytest.approx({"short": 0.10, "medium": 0.15, "long": 0.20})
    assert row["exactly_right_overall"] == pytest.approx(0.15)
    assert row["pair_accuracy_overall"] == pytest.approx(0.85)
    assert (row["pairs"], row["prompts"]) == ({"short": 20, "medium": 20, "long": 20},) * 2


def test_tables_show_the_numbers_within_80_columns(judged: list[Judged]) -> None:
    rows = result_rows(judged, GAMMAS)
    shares, gammas = text_of(result_table(rows)), text_of(gamma_table(rows))
    overall = next(line for line in shares.splitlines() if "answers exactly right" in line)
    assert overall.split()[-3:] == ["15.0%", "80.0%", "80.0%"]
    stages = next(line for line in gammas.splitlines() if "sDPO's reference" in line)
    assert stages.split()[-3:] == ["0.50", "1.25", "2.75"]


def test_a_difference_within_its_interval_is_reported_as_none(judged: list[Judged]) -> None:
    lines = difference_lines(judged)
    assert lines[0].startswith("DPO - SFT: +65.0 ± ")
    assert lines[0].endswith("points")
    assert lines[2] == "sDPO - DPO: +0.0 ± 0.0 points: no difference that this run shows"


def test_results_are_written_unchanged(judged: list[Judged], tmp_path: Path) -> None:
    rows = result_rows(judged, GAMMAS)
    page = write_results(tmp_path, judged, rows, TINY)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "80.0%" in page.read_text(encoding="utf-8")
    assert "no difference that this run shows" in page.read_text(encoding="utf-8")
