"""Order of the stages: hand-computed on made-up scores; no pair is lost or duplicated."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.order import StageData, margins, order_stages, scored_counts
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.settings.run_settings import RunConfig, StageConfig


def pairs(answers: list[tuple[int, int]], mark: int) -> TokenizedPairs:
    """A pair for each (chosen tokens, rejected tokens), after a prompt of two tokens that identifies the pair."""
    ids, offsets, prompts = [], [0], []
    for number, sides in enumerate(answers):
        for side, count in enumerate(sides):
            ids += [mark, number] + [side] * count
            offsets.append(len(ids))
            prompts.append(2)
    arrays = np.array(ids, np.int32), np.array(offsets), np.array(prompts, np.int32)
    count = len(answers)
    return TokenizedPairs(*arrays, np.arange(count), np.zeros(count, np.bool_), np.zeros(count, int), [], 0, 0, [])


def stage(name, answers, mark=0, scores=None) -> StageData:
    where = [f"{name}:{i}" for i in range(len(answers))]
    scores = None if scores is None else np.array(scores, dtype=np.float64)
    return StageData(StageConfig(name=name, data=["x.jsonl"]), pairs(answers, mark), where, scores)


def config(stages, **settings) -> RunConfig:
    listed = [{"name": s.config.name, "data": "x.jsonl"} for s in stages]
    return RunConfig.model_validate({"model": "org/m", "output_dir": "r", "stages": listed, **settings})


class Scores:
    """Log-probs by the mark of the pairs; counts how often they are asked for."""

    def __init__(self, table):
        self.table, self.calls = table, 0

    def __call__(self, tokens):
        self.calls += 1
        return torch.tensor(self.table[int(tokens.ids[0])], dtype=torch.float32)


def identities(stages):
    return [tuple(s.tokens[i].chosen.ids[:2].tolist()) for s in stages for i in range(len(s.tokens))]


SOURCES = [stage("a", [(2, 2)] * 4, 0), stage("b", [(1, 3)] * 2, 1), stage("c", [(2, 2)] * 4, 2)]
# a: 1 of 4 right; b: by sums 2 of 2 right, per token 1 of 2; c: 1 of 4 right, one tie that counts as wrong
TABLE = {
    0: [[-1, -2], [-2, -1], [-3, -1], [-4, -3]],
    1: [[-1, -2], [-1, -6]],
    2: [[-5, -5], [-2, -3], [-2, -1], [-9, -8]],
}


def test_given_keeps_the_order_and_scores_nothing():
    score = Scores(TABLE)
    assert order_stages(config(SOURCES), SOURCES, score) == SOURCES
    assert score.calls == 0


def test_pair_accuracy_puts_the_easiest_first_and_ties_keep_their_order():
    ordered = order_stages(config(SOURCES, order="pair_accuracy"), SOURCES, Scores(TABLE))
    assert [s.config.name for s in ordered] == ["b", "a", "c"]
    assert [s.accuracy for s in ordered] == [1.0, 0.25, 0.25]
    assert ordered[1].tokens is SOURCES[0].tokens
    assert ordered[1].where == SOURCES[0].where


def test_pair_accuracy_per_token():
    """b's first pair: -1/1 against -2/3, so per token the rejected answer is more likely."""
    sources = [SOURCES[0], stage("b", [(1, 3)] * 2, 1), stage("d", [(3, 1)] * 4, 3)]
    table = TABLE | {3: [[-3, -2], [-3, -2], [-3, -2], [-30, -2]]}
    by_sum = order_stages(config(sources, order="pair_accuracy"), sources, Scores(table))
    assert [(s.config.name, s.accuracy) for s in by_sum] == [("b", 1.0), ("a", 0.25), ("d", 0.0)]
    by_mean = order_stages(config(sources, order="pair_accuracy", order_score="mean"), sources, Scores(table))
    assert [(s.config.name, s.accuracy) for s in by_mean] == [("d", 0.75), ("b", 0.5), ("a", 0.25)]


def test_an_external_score_needs_no_model():
    sources = [stage("a", [(1, 1)] * 3, 0, [1, -1, 0]), stage("b", [(1, 1)] * 2, 1, [0.5, 0.1])]
    score = Scores({})
    ordered = order_stages(config(sources, order="pair_accuracy", score_column="s"), sources, score)
    assert [(s.config.name, s.accuracy) for s in ordered] == [("b", 1.0), ("a", pytest.approx(1 / 3))]
    assert score.calls == 0


def test_margin_splits_one_stage_into_tiers_easiest_first():
    one = stage("all", [(1, 1)] * 7, 0)
    logps = [[margin, 0] for margin in (-1, 3, 0, 5, -2, 3, 1)]
    score = Scores({0: logps})
    tiers = order_stages(config([one], order="margin", tiers=3), [one], score)
    assert score.calls == 1
    assert [s.config.name for s in tiers] == ["all-1", "all-2", "all-3"]
    # 5, 3, 3 | 1, 0 | -1, -2; within a tier the pairs keep their order
    assert [s.where for s in tiers] == [["all:1", "all:3", "all:5"], ["all:2", "all:6"], ["all:0", "all:4"]]
    assert [s.accuracy for s in tiers] == [1.0, 0.5, 0.0]
    assert [i for _, i in identities(tiers)] == [1, 3, 5, 2, 6, 0, 4]


def test_margin_per_token():
    one = stage("all", [(1, 4), (4, 1)], 0)
    settings = config([one], order="margin", tiers=2, order_score="mean")
    assert margins(settings, one.tokens, Scores({0: [[-2, -4], [-4, -8]]})).tolist() == [-1.0, 7.0]


def test_random_deals_all_pairs_out_by_the_seed():
    sources = [stage("a", [(1, 1)] * 20, 0), stage("b", [(1, 1)] * 12, 1)]

    def dealt(seed):
        return order_stages(config(sources, order="random", trainer={"seed": seed}), sources, Scores({}))

    first = dealt(1)
    assert [len(s.tokens) for s in first] == [20, 12]
    assert Counter(identities(first)) == Counter(identities(sources))
    assert {mark for mark, _ in identities(first[:1])} == {0, 1}

    # the same seed deals the same pairs
    assert identities(dealt(1)) == identities(first)
    assert identities(dealt(2)) != identities(first)

    for s in first:  # each pair keeps its location
        names = [f"{'ab'[m]}:{i}" for m, i in identities([s])]
        assert s.where == names


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(["given", "random", "pair_accuracy"]))
def test_no_order_loses_or_duplicates_a_pair(sizes, order):
    sources = [stage(f"s{i}", [(1, 2)] * size, i) for i, size in enumerate(sizes)]
    table = {i: np.random.default_rng(i).normal(size=(size, 2)).tolist() for i, size in enumerate(sizes)}
    ordered = order_stages(config(sources, order=order), sources, Scores(table))
    assert Counter(identities(ordered)) == Counter(identities(sources))
    assert sorted(len(s.tokens) for s in ordered) == sorted(sizes)


@given(st.integers(2, 12), st.integers(2, 5), st.integers(0, 9))
def test_tiers_lose_and_double_no_pair(count, tiers, seed):
    one = stage("x", [(1, 1)] * count, 0)
    table = {0: np.random.default_rng(seed).integers(-3, 3, (count, 2)).astype(float).tolist()}
    if tiers > count:
        tiers = count
    made = order_stages(config([one], order="margin", tiers=tiers), [one], Scores(table))
    assert Counter(identities(made)) == Counter(identities([one]))
    assert max(len(s.tokens) for s in made) - min(len(s.tokens) for s in made) <= 1


def test_scored_counts_leave_out_a_first_token():
    arrays = np.zeros(9, np.int32), np.array([0, 3, 5, 7, 9]), np.array([0, 1, 1, 0], np.int32), np.arange(2)
    tokens = TokenizedPairs(*arrays, np.zeros(2, np.bool_), np.zeros(2, int), [], 0, 0, [])
    assert scored_counts(tokens).tolist() == [[2, 1], [1, 1]]


def test_more_tiers_than_pairs_is_an_error():
    one = stage("x", [(1, 1)] * 2, 0)
    with pytest.raises(UserError, match="tiers: was 3, must be at most 2"):
        order_stages(config([one], order="margin", tiers=3), [one], Scores({0: [[1, 0], [0, 1]]}))


def test_every_order_keeps_the_counts_of_skipped_rows():
    listed = [dataclasses.replace(source, skipped=number) for number, source in enumerate(SOURCES, 1)]
    for order, names in (("given", "abc"), ("random", "abc"), ("pair_accuracy", "bac")):
        ordered = order_stages(config(listed, order=order), listed, Scores(TABLE))
        assert [(s.config.name, s.skipped) for s in ordered] == [(name, " abc".index(name)) for name in names]
    one = dataclasses.replace(SOURCES[0], skipped=5)
    tiers = order_stages(config([one], order="margin", tiers=2), [one], Scores(TABLE))
    assert [tier.skipped for tier in tiers] == [5, 0]  # counted once
