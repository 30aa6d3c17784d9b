"""Rows of prompts for generated pairs: read like pairs, so that generation and training see the same tokens."""

from __future__ import annotations

import json

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.pairs import PairSource, read_pairs
from sdpo_kernels.stepwise.data.prompts import PromptRow, read_prompts
from sdpo_kernels.stepwise.data.shapes import Shape
from sdpo_kernels.stepwise.data.tokenize import tokenize_pairs
from sdpo_kernels.stepwise.settings.columns import ColumnSettings
from tests.stepwise.data.test_render import tokenizer_of

# writes tools, options and the conversation
TOOLS = """{{ tools | tojson if tools else "" }}{{ mood | default("") }}
{%- for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{{ eos_token }}
{%- endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""

TOOL = {"name": "w", "parameters": {"city": {"type": "string", "enum": None}}}
CALL = {"function": {"name": "w", "arguments": {"city": "Paris", "expression": None}}}
ASK = [
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "grey"},
]
CLEAN = '[{"name": "w", "parameters": {"city": {"type": "string"}}}]'


def read(tmp_path, *rows: dict, shape: Shape | None = None, on_bad_row="error") -> list[PromptRow]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts([PairSource(str(file), shape or Shape())], on_bad_row)[0]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
def test_generation_and_training_see_the_same_tokens(tmp_path, tools):
    (row,) = read(tmp_path, {"prompt": ASK, "tools": tools, "chat_template_kwargs": {"mood": "!", "x": None}})
    tokenizer = tokenizer_of(TOOLS)
    text = row.text(tokenizer)
    assert text.startswith(CLEAN + "!user: Weather?</s>")
    assert '{"city": "Paris"}' in text

    # the pair is written to a file, and read from it when the stage trains
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(row.pair("four", "five")))
    for pair in (read_pairs([str(pairs)], on_bad_row="error").pairs[0], row.pair_of("four", "five")):
        tokens = tokenize_pairs([pair], tokenizer, max_length=999, truncation="keep_start")
        ids, start = tokens[0].chosen
        assert ids[:start].tolist() == row.ids(tokenizer)
        assert ids.tolist() == row.whole_ids(tokenizer, "four")


def test_the_judge_gets_the_whole_row_as_it_is(tmp_path):
    """So does the hash of the prompts."""
    talk = [{"role": "user", "content": "q", "name": None}]
    rows = [
        {"prompt": "q", "answer": "a", "tests": {"in": None}},
        {"prompt": "p", "chosen": "x", "rejected": [1]},
        {"prompt": talk, "tools": [], "chat_template_kwargs": {"a": None}},
    ]
    found = read(tmp_path, *rows)
    assert [row.values for row in found] == rows
    assert (found[2].prompt, found[2].tools, found[2].chat_template_kwargs) == (
        [{"role": "user", "content": "q"}],
        None,
        {},
    )
    (renamed,) = read(tmp_path, {"question": "q", "n": 1}, shape=Shape(ColumnSettings(prompt=("question",))))
    assert renamed.values == {"question": "q", "n": 1, "prompt": "q"}


def test_columns_name_prompt_and_system(tmp_path):
    shape = Shape(ColumnSettings(prompt=("question",), system="system", chosen="good"))
    first, second = read(tmp_path, {"question": "q", "system": "s"}, {"question": "p"}, shape=shape)
    assert first.prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert second.prompt == [{"role": "user", "content": "p"}]
    with pytest.raises(UserError, match=r"no row has the column 'question', which they name; there are prompt"):
        read(tmp_path, {"prompt": "q"}, shape=shape)
    with pytest.raises(UserError, match=r"prompts.jsonl: columns: no row has the column 'systm'"):
        read(tmp_path, {"question": "q"}, shape=Shape(ColumnSettings(prompt=("question",), system="systm")))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"tools": "[", "prompt": "q"}, "'tools' is broken JSON"),
        ({"chat_template_kwargs": {"tokenize": True}, "prompt": "q"}, "'tokenize' is set by the driver"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part of type 'image'"),
        ({"prompt": None}, "'prompt' is missing"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi."}]},
            "'conversations' ends with an assistant's message, must end with the user's to be a prompt",
        ),
    ],
)
def test_bad_rows_say_why(tmp_path, row, problem):
    with pytest.raises(UserError) as raised:
        read(tmp_path, row)
    assert str(raised.value).startswith(f"{tmp_path}/prompts.jsonl:1: ")
    assert problem in str(raised.value)
    assert [kept.prompt for kept in read(tmp_path, row, {"prompt": "fine"}, on_bad_row="skip")] == ["fine"]


@pytest.mark.parametrize("conversations", [None, 3, [{"from": "gpt", "value": "Hi."}]])
def test_conversations_beside_a_prompt_are_another_column(tmp_path, conversations):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is"}]
    shape = Shape(ColumnSettings(prompt=("question",)))
    for question in ("2+2?", messages):
        (row,) = read(tmp_path, {"question": question, "conversations": conversations}, shape=shape)
        assert row.prompt == question


def test_the_runs_columns_are_optional(tmp_path):
    shape = Shape(ColumnSettings(prompt=("question",), system="system"), columns_optional=True)
    assert read(tmp_path, {"prompt": "q"}, {"prompt": "r", "system": "s"}, shape=shape)[1].prompt == "r"
    (row,) = read(tmp_path, {"question": "q"}, shape=shape)
    assert row.prompt == [{"role": "user", "content": "q"}]
    with pytest.raises(UserError, match="'prompt' is empty"):
        read(tmp_path, {"question": [], "system": "s"}, shape=shape)


def test_sharegpt_conversations_that_end_with_the_user_are_prompts(tmp_path):
    (row,) = read(tmp_path, {"conversations": [{"from": "human", "value": "Hi"}]})
    assert row.prompt == [{"role": "user", "content": "Hi"}]
