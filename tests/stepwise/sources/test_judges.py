"""Judges: functions and reward models, their mistakes, and the cache of verdicts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaForSequenceClassification

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.prompts import PromptRow
from sdpo_kernels.stepwise.sources import judges
from sdpo_kernels.stepwise.sources.judges import best_and_worst, function_judge, reward_model_judge
from tests.stepwise.runs import make_model, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), spread=0.1)


def test_a_reward_model_judges(tmp_path, model):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model, num_labels=1)
    network = LlamaForSequenceClassification(config)
    network.save_pretrained(tmp_path / "reward")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "reward")
    rows = [PromptRow("word1", {}, ""), PromptRow("word2 word3", {}, "")]
    scores = reward_model_judge(str(tmp_path / "reward"), torch.device("cpu"), 64, 1)(rows, [" good1 ", " bad1 bad2 "])
    together = reward_model_judge(str(tmp_path / "reward"), torch.device("cpu"), 64, 8)(
        rows, [" good1 ", " bad1 bad2 "]
    )
    assert scores == pytest.approx(together, rel=1e-5)
    ids = torch.tensor([tokenizer("word1 good1 </s>")["input_ids"]])
    assert scores[0] == pytest.approx(network.eval()(ids).logits[0, 0].item(), rel=1e-4)


def test_best_and_worst():
    assert best_and_worst(["a", "b", "c"], [1.0, 3.0, 0.0]) == (1, 2)
    assert best_and_worst(["a", "b"], [1.0, 1.0]) is None
    assert best_and_worst([], []) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:f", "importable from"),
        ("tests.stepwise.sources.judges:nothing", "importable from"),
        ("tests.stepwise.sources.judges", "importable from"),
        ("json:__name__", "must be a function"),
    ],
)
def test_a_judge_that_cannot_be_imported(name, message):
    with pytest.raises(UserError, match=message):
        function_judge(name)


@pytest.mark.parametrize("name", ["too_few", "no_numbers"])
def test_a_judge_with_invalid_scores(name):
    judge = function_judge(f"tests.stepwise.sources.judges:{name}")
    with pytest.raises(UserError, match=f"judges:{name}"):
        judge([PromptRow("a", {}, "")] * 2, ["x", "y"])


def test_a_score_that_is_not_a_number_names_judge_prompt_and_completion():
    judge = function_judge("tests.stepwise.sources.judges:not_a_number")
    rows = [PromptRow("a", {}, "p.jsonl:1"), PromptRow("b", {}, "p.jsonl:2"), PromptRow("c", {}, "p.jsonl:3")]
    assert judge(rows, ["good", "well", "fine"]) == [1.0, 1.0, 1.0]
    with pytest.raises(UserError) as error:
        judge(rows, ["good", "bad 1", "bad 2"])
    assert str(error.value) == (
        "judge: 'tests.stepwise.sources.judges:not_a_number' gave nan for a completion of the prompt p.jsonl:2 "
        "('bad 1'), and for 1 more of 3; must be finite numbers: return a low score where there is none"
    )


def test_a_reward_model_that_gives_nan_is_an_error(tmp_path, model):
    """Nothing is the best or the worst of NaN, so the pairs would be those of an order that means nothing."""
    network = LlamaForSequenceClassification(AutoConfig.from_pretrained(model, num_labels=1))
    torch.nn.init.constant_(network.score.weight, float("nan"))
    network.save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    judge = reward_model_judge(str(tmp_path / "reward"), torch.device("cpu"), 64, 1)
    with pytest.raises(
        UserError, match=r"reward_model: .*reward gave nan for a completion of the prompt p\.jsonl:1 \('good1'\)"
    ):
        judge([PromptRow("word1", {}, "p.jsonl:1")], ["good1"])


def test_no_verdict_is_asked_for_twice(tmp_path):
    asked = []

    def judge(rows, completions):
        asked.extend(completions)
        return [float(len(text)) for text in completions]

    rows = [PromptRow(f"p{i}", {"prompt": f"p{i}"}, "") for i in range(3)]
    first = judges.remembering(judge, tmp_path / "v.jsonl", "1")(rows, ["a", "bb", "a"])
    assert first == [1.0, 2.0, 1.0]
    with (tmp_path / "v.jsonl").open("a") as stream:
        stream.write('{"of": "cut sho')  # a kill in the middle of a line
    again = judges.remembering(judge, tmp_path / "v.jsonl", "1")
    assert again([*rows, rows[0]], ["a", "bb", "ccc", "a"]) == [1.0, 2.0, 3.0, 1.0]
    assert asked == ["a", "bb", "a", "ccc"]  # the same text under another prompt is another question
    assert judges.remembering(judge, tmp_path / "v.jsonl", "1")(rows[2:], ["ccc"]) == [3.0]
    assert len(asked) == 4
    judges.remembering(judge, tmp_path / "v.jsonl", "2")(rows[2:], ["ccc"])  # an edited judge
    assert len(asked) == 5


def test_a_judges_version_changes_with_its_file(tmp_path):
    file = tmp_path / "checker.py"
    file.write_text("1")
    first = judges.code_version("python3", str(file))
    file.write_text("2")
    assert judges.code_version("python3", str(file)) != first
    assert judges.function_version("tests.stepwise.sources.judges:alike") == judges.function_version(
        "tests.stepwise.sources.judges:alike"
    )


def test_a_failing_judge_is_reported_with_its_line():
    with pytest.raises(UserError, match=r"failed: KeyError: 'missing' \(.*judges.py:\d+\)"):
        function_judge("tests.stepwise.sources.judges:fails")([PromptRow("a", {}, "")], ["x"])
