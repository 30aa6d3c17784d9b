"""Each source: which pairs it generates from which samples, and whole runs with it."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.data.prompts import PromptRow, read_prompts
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.sources import active, discriminator, engine_transformers, ranked, self_augmented
from sdpo_kernels.stepwise.sources.context import read_json_rows
from sdpo_kernels.stepwise.sources.context import write_rows as write_json_rows
from tests.stepwise.runs import PLAIN, configured, digest, make_model, make_rows, write_rows
from tests.stepwise.sources.bubblewrap import needs_bubblewrap
from tests.stepwise.sources.judges import good_words
from tests.stepwise.sources.test_generation import JUDGE, context

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), spread=0.1)


def prompt_file(folder: Path, count: int = 10) -> Path:
    rows = [
        {"prompt": f"{PLAIN[i % 16]} {PLAIN[(3 * i) % 16]} {PLAIN[i // 16]}", "answer": row["chosen"]}
        for i, row in enumerate(make_rows(count, longest=6))
    ]
    return write_rows(folder / "prompts.jsonl", rows)


def source_config(folder: Path, model: Path, kind: str, stages: int = 2, settings=(), **source):
    prompts = prompt_file(folder)
    source = {"kind": kind, "samples": 3, "max_new_tokens": 40, "batch_size": 12} | source
    listed = [{"name": f"s{i}", "prompts": str(prompts), "source": source} for i in range(1, stages + 1)]
    return configured(folder, model, stages=listed, **dict(settings))


def pairs_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


# --- ranked ---


def test_ranked_pairs_best_with_worst(tmp_path, model, monkeypatch):
    rows = [PromptRow(f"p{i}", {"prompt": f"p{i}"}, "") for i in range(4)]
    groups = [["good1 good2", "bad1", "good3"], ["bad1", "bad2"], [], ["good1"]]
    monkeypatch.setattr(ranked, "sample", lambda ctx, samples: groups)
    (pair,) = ranked.make(context(tmp_path, model, rows))
    assert pair == {
        "prompt": "p0", "chosen": "good1 good2", "rejected": "bad1", "score_chosen": 2.0, "score_rejected": 0.0
    }  # fmt: skip


def test_generated_pairs_and_what_truncation_cuts_are_counted(tmp_path, model, spoken):
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2}
    settings = {"max_length": 8, "trainer": trainer}
    config = source_config(tmp_path, model, "ranked", stages=1, settings=settings, judge=JUDGE)
    (record,) = run(config, spoken.reporter)["stages"]
    assert record["pairs_used"] == 2 < record["pairs"]
    assert spoken.text.count(f"stage s1: trains on 2 of {record['pairs']} pairs; max_steps 1 ends it before") == 1
    pairs = pairs_of(tmp_path / "run" / "stage-1-s1")

    # three words of prompt, and the end token: an answer of up to four words is whole
    words = [[len(pair[side].split()) for side in ("chosen", "rejected")] for pair in pairs]
    assert record["cut_pairs"] == sum(max(two) > 4 for two in words) > 0
    assert record["dropped"] == 0
    assert record["lost_tokens"] == sum(max(0, count - 4) for two in words for count in two)


def test_a_ranked_run_keeps_its_pairs_and_resumes_after_a_kill(tmp_path, model, monkeypatch, spoken):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    manifest = run(source_config(whole, model, "ranked", judge=JUDGE), spoken.reporter)
    for text in (
        "stage 1 of 2 s1: generating pairs (ranked)\n",
        "stage 1 of 2 s1: samples  30/30  took ",
        f"stage 1 of 2 s1: {manifest['stages'][0]['pairs']} pairs generated from 10 prompts\n",
        f"; run step {manifest['stages'][0]['steps']}/{manifest['stages'][0]['steps']}+, time left not known yet\n",
        f"; run step {sum(stage['steps'] for stage in manifest['stages'])}/",
    ):
        assert text in spoken.text
    assert spoken.text.count("all steps done") == 2  # the last step, and the end of the last stage
    stages = [whole / "run" / f"stage-{i}-s{i}" for i in (1, 2)]
    for record, folder in zip(manifest["stages"], stages, strict=True):
        pairs = pairs_of(folder)
        assert len(pairs) == record["pairs"] > 2
        for pair in pairs:
            chosen, rejected = good_words([{"prompt": ""}] * 2, [pair["chosen"], pair["rejected"]])
            assert chosen > rejected
    assert pairs_of(stages[0]) != pairs_of(stages[1])  # a different model, different samples

    real, calls = engine_transformers.generate_batch, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    config = source_config(killed, model, "ranked", judge=JUDGE)
    monkeypatch.setattr(engine_transformers, "generate_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config, QUIET)
    run(config, QUIET)
    assert len(calls) == 2 + 2 + 3  # three batches per stage, one of them done before the kill
    assert digest(killed / "run/stage-2-s2/model.safetensors") == digest(stages[1] / "model.safetensors")


# --- prompts and a judge without a preference ---


def test_bad_prompt_rows(tmp_path):
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"text": "b"}, {"prompt": 3}, {"prompt": ""}])
    with pytest.raises(
        UserError, match=r"p.jsonl:2: 'prompt' is missing; .* text\. .*\{prompt: NAME\} \(and 2 more bad"
    ):
        read_prompts([str(file)], "error")
    prompts, skipped = read_prompts([str(file)], "skip")
    assert [row.prompt for row in prompts] == ["a"]
    assert len(skipped) == 3


def test_a_judge_that_sees_no_difference_stops_the_run(tmp_path, model):
    config = source_config(tmp_path, model, "ranked", judge="tests.stepwise.sources.judges:alike")
    with pytest.raises(UserError, match=r"no pairs from 10 prompts; .*no two samples .* differ in the judge's score"):
        run(config, QUIET)


@pytest.mark.parametrize("kind", ["ranked", "discriminator"])
def test_samples_that_do_not_end_are_named_where_there_are_no_pairs(tmp_path, model, kind):
    """The first token that the model draws is the end token in few samples; those are empty."""
    more = {"budget": 4} if kind == "discriminator" else {}
    config = source_config(tmp_path, model, kind, stages=1, judge=JUDGE, **more | {"max_new_tokens": 1})
    text = (
        rf"stage s1: source {kind}: no pairs from 10 prompts; 30 of 30 samples did not end within max_new_tokens \(1\)"
    )
    with pytest.raises(UserError, match=text):
        run(config, QUIET)


# --- discriminator ---


def test_gold_labels_go_to_the_closest_pairs():
    rows = [PromptRow(f"p{i}", {}, "") for i in range(3)]
    groups = [["a", "b", "c"], ["d", "e"], ["f"]]
    scores = [[0.0, 1.0, 1.2], [3.0, 3.1], [9.0]]
    found = discriminator.least_certain(rows, groups, scores, 5, seed=0)
    assert [(q.row.prompt, q.first, q.second) for q in found] == [("p1", "d", "e"), ("p0", "b", "c")]
    assert len(discriminator.least_certain(rows, groups, None, 1, seed=0)) == 1


def test_a_scorer_is_trained_and_kept_with_the_stage(tmp_path, model):
    config = source_config(tmp_path, model, "discriminator", judge=JUDGE, budget=6, scorer_learning_rate=1e-2)
    run(config, QUIET)
    gold = []
    for index in (1, 2):
        folder = tmp_path / f"run/stage-{index}-s{index}/source"
        assert (folder / "scorer/model.safetensors").exists()
        gold.append((folder / "gold.jsonl").read_text().splitlines())
    assert 0 < len(gold[0]) <= 6
    assert gold[1][: len(gold[0])] == gold[0]
    assert len(gold[0]) < len(gold[1]) <= len(gold[0]) + 6


def test_a_trained_scorer_ranks_its_gold_labels(tmp_path, model):
    rows = make_rows(24)
    ctx = context(tmp_path, model, [])
    settings = discriminator.DiscriminatorSource(
        kind="discriminator", judge=JUDGE, budget=1, scorer_epochs=10, scorer_learning_rate=1e-2
    )
    scorer = discriminator.Discriminator(ctx, settings)
    scorer.train(rows, seed=0)
    prompts = [PromptRow(row["prompt"], row, "") for row in rows]
    scores = scorer.score(prompts, [[row["chosen"], row["rejected"]] for row in rows])
    assert sum(chosen > rejected for chosen, rejected in scores) > 20


# --- self_augmented ---


def test_the_buffer_prefers_rows_used_less_often():
    buffer = [{"prompt": str(i), "uses": 0 if i else 50} for i in range(4)]
    drawn = self_augmented.draw_from(buffer, 300, random.Random(0))
    assert len(drawn) == 300
    assert sum(row["prompt"] == "0" for row in drawn) == buffer[0]["uses"] - 50 < 60
    assert "uses" not in drawn[0]
    assert self_augmented.draw_from([], 3, random.Random(0)) == []


def common(one: list[str], other: list[str]) -> int:
    """The number of words that both start with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_only_the_segment_is_regenerated(tmp_path, model):
    settings = {"segment_tokens": 2, "samples": 2, "pairs": 12, "buffer": 15, "max_new_tokens": 5}
    run(source_config(tmp_path, model, "self_augmented", **settings), QUIET)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    answers = {row["prompt"]: row["answer"] for row in rows}
    for index in (1, 2):
        folder = tmp_path / f"run/stage-{index}-s{index}"
        pairs = pairs_of(folder)
        assert len(pairs) == 12
        for pair in pairs:
            assert pair["chosen"] == answers[pair["prompt"]]
            right, written = pair["chosen"].split(), pair["rejected"].split()
            assert right != written
            before, after = common(right, written), common(right[::-1], written[::-1])
            assert before + after >= len(right) - 2  # B has at most two tokens
        buffer = [json.loads(line) for line in (folder / "source/buffer.jsonl").read_text().splitlines()]
        assert len(buffer) <= 15
        assert sum(row["uses"] for row in buffer) >= 12


def test_the_previous_stages_ema_model_generates_segments(tmp_path, model, monkeypatch):
    loaded = []
    real = engine_transformers.load_ema_into
    monkeypatch.setattr(
        engine_transformers, "load_ema_into", lambda m, folder: (loaded.append(folder.name), real(m, folder))
    )
    settings = {"segment_tokens": 2, "samples": 1, "pairs": 6, "max_new_tokens": 5}
    run(source_config(tmp_path, model, "self_augmented", settings={"reference": "ema"}, **settings), QUIET)
    assert loaded == ["stage-1-s1"]


def test_a_row_without_an_answer_is_reported_before_training(tmp_path, model):
    config = source_config(tmp_path, model, "self_augmented", pairs=3, segment_tokens=9)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "word1"}])
    with pytest.raises(UserError, match=r"prompts.jsonl:1: 'answer' is missing"):
        run(config, QUIET)


# --- active ---


def test_later_rounds_ask_where_entropy_and_reward_gap_are_high(tmp_path, model, monkeypatch):
    """With entropies 10, 30, 20, 40: of the two prompts of highest entropy, the one with the larger reward gap."""
    rows = [PromptRow(f"p{i}", {"prompt": f"p{i}"}, "") for i in range(4)]
    groups = [[f"a{i}", f"b{i}"] for i in range(4)]
    policy = torch.tensor([[-10.0, -10.0], [-25.0, -35.0], [-20.0, -20.0], [-40.0, -40.0]], dtype=torch.float64)
    initial = torch.tensor([[-90.0, -10.0], [-25.0, -32.0], [-20.0, -20.5], [-40.0, -41.0]], dtype=torch.float64)
    monkeypatch.setattr(active, "sample", lambda ctx, samples: groups)
    ctx = context(tmp_path, model, rows)
    object.__setattr__(ctx, "initial", "initial")
    monkeypatch.setattr(active, "score_answers", lambda ctx, qs, path: initial if path == "initial" else policy)
    settings = active.ActiveSource(kind="active", judge=JUDGE, acquire=1, keep_prompts=2.0)
    (question,) = active._later_questions(ctx, settings)
    assert question.row.prompt == "p1"  # gap of p0 is largest, but its entropy is lowest


def test_an_odd_sample_counts_once_in_the_entropy(tmp_path, model, monkeypatch):
    rows = [PromptRow(f"p{i}", {"prompt": f"p{i}"}, "") for i in range(2)]
    groups = [["a", "b", "c"], ["d", "e"]]
    asked = {}

    def scores(ctx, questions, path):
        asked[path] = [(q.first, q.second) for q in questions]
        nats = {"a": -1.0, "b": -2.0, "c": -30.0, "d": -10.5, "e": -10.5}  # mean 11 and 10.5
        return torch.tensor([[nats[q.first], nats[q.second]] for q in questions], dtype=torch.float64)

    monkeypatch.setattr(active, "sample", lambda ctx, samples: groups)
    monkeypatch.setattr(active, "score_answers", scores)
    ctx = context(tmp_path, model, rows)
    settings = active.ActiveSource(kind="active", judge=JUDGE, acquire=1, keep_prompts=1.0)
    (question,) = active._later_questions(ctx, settings)
    assert asked[str(model)] == [("a", "b"), ("c", "a"), ("d", "e")]
    assert question.row.prompt == "p0"


def test_an_active_run_asks_about_new_prompts_each_round(tmp_path, model):
    config = source_config(
        tmp_path, model, "active", settings={"policy": "initial", "reference": "initial"}, judge=JUDGE, acquire=4
    )
    run(config, QUIET)
    labels = [(tmp_path / f"run/stage-{i}-s{i}/source/labels.jsonl").read_text().splitlines() for i in (1, 2)]
    assert 0 < len(labels[0]) <= 4
    assert labels[1][: len(labels[0])] == labels[0]
    prompts = [json.loads(line)["prompt"] for line in labels[1]]
    assert len(set(prompts)) == len(prompts) > len(labels[0])
    assert pairs_of(tmp_path / "run/stage-2-s2") == [json.loads(line) for line in labels[1]]


# --- execution ---


@needs_bubblewrap
def test_programs_that_pass_are_chosen(tmp_path, model):
    """The checker accepts answers with a good word; prompts whose samples all pass or all fail give no pair."""
    checker = tmp_path / "check.py"
    checker.write_text("import json, sys\nassert json.load(open(sys.argv[2]))['prompt']\n"
                       "sys.exit('good' not in open(sys.argv[1]).read())\n")  # fmt: skip
    command = [sys.executable, str(checker), "{completion}", "{prompt}"]
    run(source_config(tmp_path, model, "execution", stages=1, command=command, max_new_tokens=8, samples=4), QUIET)
    pairs = pairs_of(tmp_path / "run/stage-1-s1")
    assert pairs
    assert all("good" in pair["chosen"] and "good" not in pair["rejected"] for pair in pairs)


@pytest.fixture
def no_bubblewrap(monkeypatch):
    found = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, *rest, **options: None if name == "bwrap" else found(name, *rest, **options)
    )


def test_without_bubblewrap_nothing_is_trained(tmp_path, model, no_bubblewrap):
    config = source_config(tmp_path, model, "execution", command=["true", "{completion}"])
    for stops in (prepare, lambda config: run(config, QUIET)):
        with pytest.raises(
            UserError, match=r"stage s1: source: cannot start 'bwrap': it is not installed.* apt-get install"
        ):
            stops(config)
    assert not (tmp_path / "run").exists()


def test_unsafe_programs_run_without_bubblewrap_and_a_warning_says_what_that_means(tmp_path, model, no_bubblewrap):
    config = source_config(tmp_path, model, "execution", command=["true", "{completion}"], unsafe=True)
    meaning = "they can read and write your files and use the network, and what they start may survive them"
    assert [meaning in warning for warning in prepare(config).warnings] == [True, True]  # of two stages
    safe = source_config(tmp_path, model, "ranked", judge=JUDGE)
    assert not prepare(safe).warnings


@needs_bubblewrap
def test_a_checker_that_cannot_start_is_reported_before_training(tmp_path, model):
    config = source_config(tmp_path, model, "execution", command=["/nonexistent/checker", "{completion}"])
    with pytest.raises(UserError, match="/nonexistent/checker"):
        run(config, QUIET)
    assert not (tmp_path / "run").exists()


# --- kills, odd text and mistakes ---


def test_line_breaks_of_other_alphabets_stay_inside_a_row(tmp_path):
    rows = [{"prompt": "a\u2028b\u0085c\u2029d"}, {"prompt": "e"}]
    write_json_rows(tmp_path / "x.jsonl", rows)
    assert read_json_rows(tmp_path / "x.jsonl") == rows


def test_prompts_that_tie_are_not_asked_about_again(tmp_path, model):
    settings = {"policy": "initial", "reference": "initial", "trainer": {"learning_rate": 1e-5}}
    name = "tests.stepwise.sources.judges:ties_often"
    run(source_config(tmp_path, model, "active", settings=settings, judge=name, acquire=5), QUIET)
    asked = (tmp_path / "run/stage-2-s2/source/asked.jsonl").read_text().splitlines()
    labels = (tmp_path / "run/stage-2-s2/source/labels.jsonl").read_text().splitlines()
    assert len(set(asked)) == len(asked) > len(labels)


def test_prompts_that_are_also_in_eval_data_give_a_warning(tmp_path, model):
    rows = [{"prompt": "word0 word0 word0", "chosen": " good1", "rejected": " bad1"}]
    evaluated = write_rows(tmp_path / "eval.jsonl", rows)
    config = source_config(tmp_path, model, "ranked", judge=JUDGE, settings={"eval_data": str(evaluated)})
    assert any("1 of eval_data's 1 different prompts are prompts of stage 's1'" in w for w in prepare(config).warnings)


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (
            {"kind": "ranked", "reward_model": "/nonexistent/model"},
            {},
            "reward_model: there is no folder /nonexistent/model",
        ),
        ({"kind": "ranked", "judge": JUDGE, "samplez": 3}, {}, "samplez: unknown key; did you mean 'samples'"),
        ({"kind": "self_augmented", "pairs": 3, "segment_tokens": 9, "max_new_tokens": 3}, {}, "must be at least"),
        ({"kind": "active", "judge": JUDGE, "acquire": 3}, {}, "must be with policy: initial"),
        ({"kind": "active", "judge": JUDGE, "acquire": 3}, {"policy": "initial"}, "reference: was 'previous'"),
        ({"kind": "execution", "command": ["python3"]}, {}, "must contain {completion}"),
        (
            {"kind": "execution", "command": ["true", "{completion}"], "readable": ["tests"], "unsafe": True},
            {},
            "readable: was ['tests'], must be left out with unsafe: true",
        ),
        ({"kind": "ranked", "judge": JUDGE}, {"order": "random"}, "order: was 'random', must be given"),
        ({"kind": "guess"}, {}, "source.kind: was 'guess', must be one of 'ranked'"),
    ],
)
def test_contradictory_settings_are_reported_before_training(tmp_path, model, source, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(source_config(tmp_path, model, source.pop("kind"), settings=settings, **source), QUIET)
    assert not (tmp_path / "run").exists()
