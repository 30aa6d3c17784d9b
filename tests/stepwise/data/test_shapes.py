"""Other people's data in TRL's schema: each shape has a file of four rows under tests/data/shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sdpo_kernels.stepwise.data.shapes import BadRow, Shape, clean, unused
from sdpo_kernels.stepwise.settings.columns import ColumnSettings

FILES = Path(__file__).resolve().parents[2] / "data" / "shapes"
QUESTIONS = ["What is 2+2?", "Name a primary colour.", "Is ice cold?", "Who wrote Hamlet?"]
CHOSEN = ["four", "Red", "Yes, it is cold.", "Shakespeare wrote it."]
REJECTED = ["five", "Beige", "No, it is warm.", "Nobody did."]

ORCA = Shape(ColumnSettings(prompt=("question",), system="system"))
ALPACA = Shape(ColumnSettings(prompt=("instruction", "input")))
PLAIN = Shape()
SYSTEM_ONLY = Shape(ColumnSettings(system="system"), implicit_prompt=True)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FILES / name).read_text("utf-8").splitlines()]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You are helpful."}

# what the four rows of a file are read as: shape, prompts, whether the answers are messages
READ = {
    "trl_text.jsonl": (PLAIN, [q + " " for q in QUESTIONS], False),
    "trl_conversations.jsonl": (PLAIN, [[user(q)] for q in QUESTIONS], True),
    "orca.jsonl": (ORCA, [[*([SYSTEM] if i else []), user(q)] for i, q in enumerate(QUESTIONS)], True),
    "alpaca.jsonl": (ALPACA, [q + ("" if i % 2 else "\nBe brief.") for i, q in enumerate(QUESTIONS)], False),
    "sharegpt.jsonl": (PLAIN, [[SYSTEM, user(q)] for q in QUESTIONS], True),
    "one_message.jsonl": (PLAIN, [[user(q)] for q in QUESTIONS], True),
    "content_parts.jsonl": (PLAIN, [[user(q)] for q in QUESTIONS], True),
    "prompt_text_answers_messages.jsonl": (PLAIN, [[user(q)] for q in QUESTIONS], True),
}


@pytest.mark.parametrize("name", READ)
def test_a_shape_is_read(name):
    shape, prompts, conversational = READ[name]
    read = [shape.read(row) for row in rows(name)]
    assert [values["prompt"] for values in read] == prompts
    assert [values["chosen"] for values in read] == [[answer(c)] if conversational else c for c in CHOSEN]
    assert [values["rejected"] for values in read] == [[answer(r)] if conversational else r for r in REJECTED]


@pytest.mark.parametrize("name", ["implicit_conversations.jsonl", "ultrafeedback_binarized.jsonl"])
def test_a_prompt_inside_both_conversations_is_left_there(name):
    """The common messages become the prompt in `pairs.py`."""
    for row, question, chosen in zip(rows(name), QUESTIONS, CHOSEN, strict=True):
        values = PLAIN.read(row)
        assert "prompt" not in values
        assert values["chosen"] == [user(question), answer(chosen)]


def test_transcripts_are_split_at_the_last_turn():
    for row, question, chosen, rejected in zip(rows("hh_rlhf.jsonl"), QUESTIONS, CHOSEN, REJECTED, strict=True):
        values = PLAIN.read(row)
        assert values["prompt"] == f"\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: {question}\n\nAssistant:"
        assert (values["chosen"], values["rejected"]) == (f" {chosen}", f" {rejected}")


@pytest.mark.parametrize(
    ("row", "suggestion"),
    [
        (rows("orca.jsonl")[1], "columns: {prompt: question, system: system}"),
        (rows("alpaca.jsonl")[0], "columns: {prompt: [instruction, input]}"),
        ({"problem": "1+1", "chosen": "2", "rejected": "3"}, "columns: {prompt: problem}"),
        ({"foo": "1+1", "chosen": "2", "rejected": "3"}, "columns: {prompt: NAME}"),
    ],
)
def test_plain_strings_without_a_prompt_are_an_error_with_the_line_to_write(row, suggestion):
    with pytest.raises(BadRow) as raised:
        PLAIN.read(row)
    message = str(raised.value)
    assert message.startswith("'prompt' is missing; the row has the columns " + ", ".join(row))
    assert suggestion in message
    assert "prompt: implicit" in message


def test_an_implicit_prompt_of_plain_strings_is_asked_for():
    row = {"chosen": "A dog barks", "rejected": "A dog flies"}
    assert Shape(implicit_prompt=True).read(row) == row  # pairs.py splits it


def test_the_suggested_line_reads_the_row():
    row = {"system_prompt": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"}
    with pytest.raises(BadRow, match=r"columns: \{prompt: question, system: system_prompt\}"):
        PLAIN.read(row)
    read = Shape(ColumnSettings(prompt=("question",), system="system_prompt")).read(row)
    assert read["prompt"] == [{"role": "system", "content": "Be brief."}, user("2+2?")]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"question": "?", "answer": "4", "chosen_prompt": "a", "rejected_prompt": "b"},
            "{prompt: question, chosen: NAME",
        ),
        ({"prompt": "?", "chosen": "4", "Rejection_Reason": "false", "worse": "5"}, "{rejected: worse}"),
        (
            {"prompt": "?", "chosen_response": "4", "rejected_response": "5"},
            "{chosen: chosen_response, rejected: rejected_",
        ),
    ],
)
def test_the_suggested_answers_are_answers(row, line):
    with pytest.raises(BadRow) as raised:
        PLAIN.read(row)
    assert f"columns: {line}" in str(raised.value)


@pytest.mark.parametrize(
    ("row", "shape", "message"),
    [
        (
            {"chosen": "a", "rejected": "b"},
            ORCA,
            "columns.prompt: the row has no column 'question'; it has the columns",
        ),
        ({"question": "q", "system": 3, "chosen": "a", "rejected": "b"}, ORCA, "'system' is of type int"),
        ({"instruction": "q", "input": 3, "chosen": "a", "rejected": "b"}, ALPACA, "'input' is of type int"),
        (
            {"question": [SYSTEM], "system": "x", "chosen": "a", "rejected": "b"},
            ORCA,
            "has a system message of its own",
        ),
        ({"system": "x", "chosen": "a", "rejected": "b"}, SYSTEM_ONLY, "columns.system: needs a prompt column"),
        (
            {"system": "x", "chosen": [SYSTEM, user("q"), answer("a")], "rejected": [SYSTEM, user("q"), answer("b")]},
            SYSTEM_ONLY,
            "columns.system: 'chosen' has a system message of its own",
        ),
        (rows("images.jsonl")[0], PLAIN, "'images' is set; only text can be trained on here"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
            PLAIN,
            "has a part of type 'image'; only text can be trained on here",
        ),
    ],
)
def test_what_cannot_be_read_says_why(row, shape, message):
    with pytest.raises(BadRow) as raised:
        shape.read(row)
    assert message in str(raised.value)


def test_unused_columns_are_named():
    assert unused(["prompt", "chosen", "rejected", "source", "id", "system"], PLAIN) == ["id", "source", "system"]
    assert unused(["question", "chosen", "rejected", "system", "id"], ORCA) == ["id"]


def test_nulls_are_absent_keys_and_empty_lists_of_arguments_stay():
    arguments = {"city": "Paris", "expression": None, "tags": []}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert clean(message) == {
        "role": "assistant",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "tags": []}}}
        ],
    }


def test_a_null_prompt_next_to_conversations_is_no_prompt():
    row = {"prompt": None, "chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]}
    assert PLAIN.read(row) == {name: row[name] for name in ("chosen", "rejected")}
    plain = {"prompt": None, "chosen": "a", "rejected": "b"}
    assert PLAIN.read(plain) == plain  # pairs.py refuses it


@pytest.mark.parametrize("kept", ["no prompt", "null prompt"])
def test_conversations_beside_a_prompt_that_is_null_are_the_prompt(kept):
    row = {
        "conversations": [{"from": "human", "value": "Weather?"}],
        "chosen": [answer("a")],
        "rejected": [answer("b")],
    }
    assert PLAIN.read(row if kept == "no prompt" else row | {"prompt": None})["prompt"] == [user("Weather?")]


@pytest.mark.parametrize("first", [answer, user])
def test_a_system_message_alone_is_no_prompt(first):
    row = {"system": "s", "chosen": [first("a"), answer("c")], "rejected": [first("b"), answer("d")]}
    with pytest.raises(BadRow, match="'chosen' and 'rejected' share no first message"):
        SYSTEM_ONLY.read(row)


def test_a_system_message_stands_before_conversations_without_a_prompt_column():
    row = {"system": SYSTEM["content"], "chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]}
    read = SYSTEM_ONLY.read(row)
    assert read["chosen"] == [SYSTEM, user("q"), answer("a")]
    assert read["rejected"] == [SYSTEM, user("q"), answer("b")]


QUESTION = Shape(ColumnSettings(prompt=("question",)))


@pytest.mark.parametrize(
    ("row", "shape", "line"),
    [
        ({"prompt": "q", "good": "a", "bad": "b"}, PLAIN, "{chosen: good, rejected: bad}"),
        (
            {"question": "q", "good": "a", "bad": "b", "system": "s"},
            PLAIN,
            "{prompt: question, chosen: good, rejected: bad, system: system}",
        ),
        ({"question": "q", "rejected": "b"}, QUESTION, "{prompt: question, chosen: NAME}"),
        ({"prompt": "q", "chosen": "a"}, PLAIN, "{rejected: NAME}"),
        (
            {"score_chosen": 2.0, "chosen_model": "m", "chosen_text": "a", "rejected_text": "b", "prompt": "q"},
            PLAIN,
            "{chosen: chosen_text, rejected: rejected_text}",
        ),
        (
            {"instruction": "q", "input": "i", "win": "a", "lose": "b"},
            PLAIN,
            "{prompt: [instruction, input], chosen: win, rejected: lose}",
        ),
    ],
)
def test_a_row_without_an_answer_lists_its_columns_with_the_line_to_write(row, shape, line):
    with pytest.raises(BadRow) as raised:
        shape.read(row)
    part = "chosen" if "chosen" not in row else "rejected"
    assert str(raised.value) == (
        f"{part!r} is missing; the row has the columns {', '.join(row)}. Name its columns with columns: {line}"
    )


def test_the_line_for_missing_answers_reads_the_row():
    read = Shape(ColumnSettings(prompt=("question",), chosen="good", rejected="bad")).read(
        {"question": "q", "good": "a", "bad": "b"}
    )
    assert read == {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_columns_of_other_data_are_optional_where_they_are_inherited():
    """The run's columns are those of its training data: other files may have TRL's names, or those."""
    shape = Shape(ORCA.columns, columns_optional=True)
    trl = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert shape.of_source(trl).read(trl) == trl
    assert shape.of_source(trl | {"system": "s"}).columns == ColumnSettings()
    orca = {"question": "q", "chosen": "a", "rejected": "b"}
    assert shape.of_source(orca) is shape
    assert ORCA.of_source(trl) is ORCA


def test_a_system_message_that_is_missing_changes_nothing_about_the_source():
    """Rows with and without one stay conversations."""
    shape = Shape(ColumnSettings(system="system"), columns_optional=True)
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert shape.of_source(row).read(row)["prompt"] == [user("q")]


def test_an_empty_list_of_tool_calls_is_none():
    row = {"prompt": [user("q")], "chosen": [{**answer("a"), "tool_calls": []}], "rejected": [answer("b")]}
    assert PLAIN.read(row)["chosen"] == [answer("a")]


SHARED = [SYSTEM, user("Q")]


@pytest.mark.parametrize("prompt", ["Q", "Q ", ""])
def test_a_prompt_string_that_both_conversations_contain_is_not_repeated(prompt):
    row = {"prompt": prompt, "chosen": [*SHARED, answer("a")], "rejected": [*SHARED, answer("b")]}
    assert "prompt" not in PLAIN.read(row)


def test_a_prompt_string_beside_other_conversations_is_a_bad_row():
    row = {"prompt": "other", "chosen": [*SHARED, answer("a")], "rejected": [*SHARED, answer("b")]}
    with pytest.raises(BadRow, match="'prompt' is a string, and the answers are conversations that do not contain it"):
        PLAIN.read(row)


@pytest.mark.parametrize("system", [{"system": None}, {"system": ""}, {}])
def test_a_row_without_a_system_message_is_a_conversation_like_the_others(system):
    row = {"question": "q", "chosen": "a", "rejected": "b", **system}
    assert ORCA.read(row)["prompt"] == [user("q")]


def test_alpacas_input_may_be_absent():
    assert ALPACA.read({"instruction": "q", "chosen": "a", "rejected": "b"})["prompt"] == "q"


def test_a_label_named_like_media_is_no_media():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "audio": False}
    assert PLAIN.read(row)["prompt"] == "q"


def test_content_of_a_tool_call_is_the_same_whether_null_absent_or_empty():
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    base = {"prompt": [user("q")], "rejected": [answer("no")]}
    contents = [{"content": None}, {}, {"content": ""}]
    read = [PLAIN.read(base | {"chosen": [{"role": "assistant", **c, "tool_calls": call}]}) for c in contents]
    assert read[0] == read[1] == read[2]


def test_the_docs_name_every_shape_that_is_tested():
    page = (FILES.parents[2] / "docs/data.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in FILES.glob("*.jsonl"))
    assert sorted(re.findall(r"`(\w+\.jsonl)` \|", page)) == files
