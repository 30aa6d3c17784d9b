"""Reading preference data: all types of sources, implicit prompts, the error line of each bad row, scores, sharing."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.data.pairs import Pair, PairData, PairSource, read_pairs, shared_pairs
from sdpo_kernels.stepwise.data.prompts import read_prompts
from sdpo_kernels.stepwise.data.shapes import Shape
from sdpo_kernels.stepwise.settings.columns import ColumnSettings

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

PLAIN = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
USER = {"role": "user", "content": "Sky?"}
BLUE = {"role": "assistant", "content": "Blue."}
RED = {"role": "assistant", "content": "Red."}
CHAT = {"prompt": [USER], "chosen": [BLUE], "rejected": [RED]}


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_lines(*rows: dict | str | bytes, name: str = "d.jsonl") -> str:
    """Writes a JSONL file of `rows` (strings and bytes unchanged) and returns its name."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    Path(name).write_bytes(b"".join(line + b"\n" for line in lines))
    return name


def refusal(*sources: str, on_bad_row: str = "error", score_column: str | None = None) -> str:
    with pytest.raises(UserError) as raised:
        read_pairs(sources, on_bad_row=on_bad_row, score_column=score_column)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def the_pair(*rows: dict, score_column: str | None = None) -> Pair:
    data = read_pairs([write_lines(*rows)], on_bad_row="error", score_column=score_column)
    assert data.skipped == []
    (pair,) = data.pairs
    return pair


def write_as(kind: str, rows: list[dict]) -> str:
    name = f"d.{kind}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "jsonl":
        Path(name).write_text(text)
    elif kind == "jsonl.gz":
        Path(name).write_bytes(gzip.compress(text.encode()))
    elif kind == "json":
        Path(name).write_text(json.dumps(rows, indent=1))
    else:
        pq.write_table(pa.Table.from_pylist(rows), name)
    return name


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
@pytest.mark.parametrize("row", [PLAIN, CHAT], ids=["plain", "chat"])
def test_every_file_type_gives_the_same_pairs(kind, row):
    rows = [row, {**row, "source": "ignored", "id": 3}]
    data = read_pairs([write_as(kind, rows)], on_bad_row="error")
    assert data.skipped == []
    places = ["d.jsonl:1", "d.jsonl:2"] if kind == "jsonl" else [f"d.{kind}:1", f"d.{kind}:2"]
    if kind in ("json", "parquet"):
        places = [f"d.{kind}:row 1", f"d.{kind}:row 2"]
    assert data.pairs == [Pair(row["prompt"], row["chosen"], row["rejected"], where) for where in places]
    assert data.pairs[0].is_conversational == (row is CHAT)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.text(max_size=8), TEXTS, TEXTS).filter(lambda r: r[1] != r[2]), min_size=1, max_size=4),
    kind=st.sampled_from(["jsonl", "jsonl.gz", "json", "parquet"]),
    chat=st.booleans(),
)
def test_any_text_is_read_back_unchanged(rows, kind, chat):
    def wrap(role, text):
        return [{"role": role, "content": text}] if chat else text

    written = [
        {"prompt": wrap("user", p), "chosen": wrap("assistant", c), "rejected": wrap("assistant", r)}
        for p, c, r in rows
    ]
    pairs = read_pairs([write_as(kind, written)], on_bad_row="error").pairs
    assert [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs] == written


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "who"),
    [
        ([USER], [USER, BLUE], [USER, RED], "'chosen' and 'rejected' repeat"),
        ([SYSTEM, USER], [SYSTEM, USER, BLUE], [SYSTEM, USER, RED], "'chosen' and 'rejected' repeat"),
        ([SYSTEM, USER], [USER, BLUE], [USER, RED], "'chosen' and 'rejected' repeat"),
        ([USER], [BLUE], [USER, RED], "'rejected' repeats"),
        ([USER, BLUE], [USER, BLUE, USER], [BLUE], "'chosen' repeats"),
    ],
)
def test_answers_that_repeat_the_messages_of_the_prompt(prompt, chosen, rejected, who):
    text = refusal(write_lines({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    cause = f"{who} the messages of 'prompt'; leave them out of the answers, or leave out 'prompt'"
    assert text == f"d.jsonl:1: {cause}; set on_bad_row: skip to leave bad rows out"


def test_an_answer_may_say_again_what_the_prefill_says():
    pair = the_pair({"prompt": [USER, BLUE], "chosen": [BLUE], "rejected": [RED]})
    assert (pair.chosen, pair.rejected) == ([BLUE], [RED])


def test_several_sources_are_read_in_order():
    first = write_lines(PLAIN, name="a.jsonl")
    second = write_lines(PLAIN, "", PLAIN, "   ", name="b.jsonl")
    pairs = read_pairs([second, first], on_bad_row="error").pairs
    assert [pair.where for pair in pairs] == ["b.jsonl:1", "b.jsonl:3", "a.jsonl:1"]


def test_byte_order_mark_and_windows_line_endings_are_accepted():
    row = json.dumps(PLAIN).encode()
    Path("d.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n" + row + b"\r\n")
    assert len(read_pairs(["d.jsonl"], on_bad_row="error").pairs) == 2
    Path("d.json").write_bytes(b"\xef\xbb\xbf[" + row + b"]")
    assert len(read_pairs(["d.json"], on_bad_row="error").pairs) == 1


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue", "The sky is red", ("The sky is", " blue", " red")),
        ("Q: a\nA: x", "Q: a\nA: y", ("Q: a\nA:", " x", " y")),
        ("abc", "abd", ("ab", "c", "d")),
        ("abc", "xyz", ("", "abc", "xyz")),
        # TRL's negative index gives the prompt "ab" here, which only one of them starts with
        ("ab ", "xyz", ("", "ab ", "xyz")),
        ("abc", "abcd", ("ab", "c", "cd")),
    ],
)
def test_implicit_prompt_of_strings(chosen, rejected, expected):
    source = PairSource(write_lines({"chosen": chosen, "rejected": rejected}), Shape(implicit_prompt=True))
    (pair,) = read_pairs([source], on_bad_row="error").pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


def test_implicit_prompt_of_messages():
    pair = the_pair({"chosen": [USER, BLUE], "rejected": [USER, RED]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], [BLUE], [RED])
    longer = the_pair({"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, BLUE]})
    assert (longer.prompt, longer.chosen, longer.rejected) == ([USER], [BLUE, USER, BLUE], [BLUE])


@settings(max_examples=200, deadline=None)
@given(
    start=st.text(max_size=6),
    chosen=st.text("ab ", min_size=1, max_size=5),
    rejected=st.text("ab ", min_size=1, max_size=5),
)
def test_implicit_prompt_equals_trls(start, chosen, rejected):
    data_utils = pytest.importorskip("trl.data_utils")
    from sdpo_kernels.stepwise.data.pairs import _split_prompt

    chosen, rejected = start + chosen, start + rejected
    if chosen == rejected or chosen[0] != rejected[0]:
        return  # equal texts are a bad row; without a common prefix TRL's chosen[-1] reads the end of the text
    theirs = data_utils.extract_prompt({"chosen": chosen, "rejected": rejected})
    assert _split_prompt(chosen, rejected) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_tools_and_template_options_are_kept():
    tools = [{"type": "function", "function": {"name": "f"}}]
    pair = the_pair({**CHAT, "tools": json.dumps(tools), "chat_template_kwargs": {"thinking": False}})
    assert pair.tools == tools
    assert pair.chat_template_kwargs == {"thinking": False}
    assert the_pair({**CHAT, "tools": tools}).tools == tools
    assert the_pair({**CHAT, "tools": None}).tools is None


def test_a_message_with_tool_calls_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    assert the_pair({**CHAT, "chosen": [call]}).chosen == [call | {"content": ""}]


def changed(row: dict, **values) -> dict:
    return {key: value for key, value in {**row, **values}.items() if value is not ...}


BAD_ROWS = [
    (b'{"prompt": "a", "chosen": "b"', "broken JSON: Expecting ',' delimiter at column 30"),
    (b"[" * 100_000, "broken JSON: "),
    (b'{"chosen": ' + b"9" * 5000 + b"}", "broken JSON: Exceeds the limit"),
    (b'{"prompt": "caf\xe9", "chosen": "b", "rejected": "c"}', "is not UTF-8 (byte 15 of the line is 0xe9)"),
    (b'{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}', "'prompt' is not Unicode text: half a surrogate pair"),
    (b"[1, 2]", "is a list, must be an object with chosen and rejected"),
    (b"null", "is null, must be an object with chosen and rejected"),
    (b'"x"', "is a string, must be an object with chosen and rejected"),
    (b"3", "is a number, must be an object with chosen and rejected"),
    (
        changed(PLAIN, rejected=...),
        "'rejected' is missing; the row has the columns prompt, chosen. Name its columns with columns: {rej",
    ),
    (changed(PLAIN, chosen=...), "'chosen' is missing"),
    (changed(PLAIN, chosen=3), "'chosen' is of type int, must be a string or a list of messages"),
    (changed(PLAIN, prompt=None), "'prompt' is null, must be a string or a list of messages"),
    (changed(PLAIN, chosen={"a": 1}), "'chosen[0]' has no role, must have one such as user or assistant"),
    (changed(PLAIN, chosen=""), "'chosen' is empty"),
    (changed(PLAIN, rejected=" \n"), "'rejected' is empty"),
    (changed(PLAIN, rejected=" 4"), "'chosen' and 'rejected' are equal; the pair teaches nothing"),
    (changed(CHAT, rejected=[BLUE]), "'chosen' and 'rejected' are equal; the pair teaches nothing"),
    (
        changed(CHAT, rejected="Red."),
        "prompt is a list of messages, chosen is a list of messages, rejected is a string;",
    ),
    (changed(PLAIN, chosen=[BLUE]), "prompt is a string, chosen is a list of messages, rejected is a string;"),
    (changed(CHAT, chosen=[]), "'chosen' is empty"),
    (changed(CHAT, prompt=[]), "'prompt' has no messages; a conversation needs at least one"),
    ({"chosen": [USER, BLUE], "rejected": [RED]}, "'chosen' and 'rejected' share no first message"),
    (changed(CHAT, chosen=[{"role": "assistant", "content": " "}]), "'chosen' is empty"),
    (changed(CHAT, chosen=["Blue."]), "'chosen[0]' is of type str, must be a message with role and content"),
    (changed(CHAT, prompt=[{"content": "x"}]), "'prompt[0]' has no role"),
    (changed(CHAT, prompt=[USER, {"role": 3, "content": "x"}]), "'prompt[1]' has no role"),
    (changed(CHAT, prompt=[{"role": "user"}]), "'prompt[0]' has no content"),
    (
        changed(CHAT, prompt=[{"role": "user", "content": [{"type": "image"}]}]),
        "'prompt[0].content' has a part of type 'image'",
    ),
    (changed(CHAT, images=["a.png"]), "'images' is set; only text can be trained on here"),
    (
        changed(PLAIN, prompt=...),
        "'prompt' is missing; the row has the columns chosen, rejected. Name its columns with",
    ),
    (changed(CHAT, tools="[1"), "'tools' is broken JSON: "),
    (changed(CHAT, tools={"a": 1}), "'tools' is of type dict, must be a list"),
    (changed(CHAT, chat_template_kwargs={"tokenize": True}), "chat_template_kwargs: 'tokenize' is set by the driver"),
    (changed(CHAT, chat_template_kwargs=[1]), "'chat_template_kwargs' is of type list, must be an object"),
]


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS, ids=[problem[:50] for _, problem in BAD_ROWS])
def test_a_bad_row_is_one_clear_line_or_is_skipped(row, problem):
    path = write_lines(PLAIN, row, PLAIN)
    message = refusal(path)
    assert message.startswith(f"d.jsonl:2: {problem}")
    assert message.endswith("; set on_bad_row: skip to leave bad rows out")
    data = read_pairs([path], on_bad_row="skip")
    assert [pair.where for pair in data.pairs] == ["d.jsonl:1", "d.jsonl:3"]
    (skipped,) = data.skipped
    assert skipped.startswith(f"d.jsonl:2: {problem}")


def test_the_first_bad_row_is_shown_and_the_others_counted():
    first = write_lines(PLAIN, "{", "[]", name="a.jsonl")
    second = write_lines("3", PLAIN, name="b.jsonl")
    assert refusal(first, second).startswith("a.jsonl:2: broken JSON")
    assert " (and 2 more bad rows); set on_bad_row: skip" in refusal(first, second)
    skipped = read_pairs([first, second], on_bad_row="skip").skipped
    assert [line.split(": ")[0] for line in skipped] == ["a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]


def test_a_parquet_string_that_is_not_utf8_is_a_bad_row():
    good = pa.array([b"a", b"b", b"c"])
    broken = pa.array([b"x", b"\xff", b"z"])
    table = pa.table({"prompt": good.cast(pa.string()), "chosen": good.cast(pa.string())})
    table = table.append_column("rejected", pa.StringArray.from_buffers(3, *broken.buffers()[1:]))
    pq.write_table(table, "d.parquet")
    assert refusal("d.parquet").startswith("d.parquet:row 2: is not UTF-8 (byte 0 of a string)")
    assert len(read_pairs(["d.parquet"], on_bad_row="skip").pairs) == 2


def spoil(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


ZIPPED = gzip.compress(json.dumps(PLAIN).encode() * 50)
BAD_FILES = [
    ("d.jsonl", b"", "d.jsonl: has no rows"),
    ("d.jsonl", b"\n\n", "d.jsonl: has no rows"),
    ("d.json", b"[]", "d.json: has no rows"),
    ("d.json", b"", "d.json:1: broken JSON: Expecting value"),
    ("d.json", b'[{"a": 1},\n{]', "d.json:2: broken JSON: Expecting property name"),
    ("d.json", b"{}\n{}\n", "d.json:2: broken JSON: Extra data (if it has one object per line, name it .jsonl)"),
    ("d.json", b'{"train": []}', "d.json: contains an object, must contain a list of objects"),
    ("d.json", b'["\xff"]', "d.json: is not UTF-8 (byte 2)"),
    ("d.json", b"[" * 100_000, "d.json: broken JSON: "),
    ("d.jsonl.gz", b"plain text", "d.jsonl.gz: is not a complete gzip file: Not a gzipped file"),
    ("d.jsonl.gz", ZIPPED[:-9], "d.jsonl.gz: is not a complete gzip file: Compressed file ended"),
    ("d.jsonl.gz", ZIPPED[:20] + b"\x00" * 9 + ZIPPED[29:], "d.jsonl.gz: is not a complete gzip file: "),
    ("d.jsonl.gz", gzip.compress(b""), "d.jsonl.gz: has no rows"),
    ("d.parquet", b"", "d.parquet: is not a readable Parquet file: "),
    ("d.parquet", b"PAR1 not really PAR1", "d.parquet: is not a readable Parquet file: "),
    ("d.csv", b"chosen,rejected\n", "d.csv: unknown file type, must end in .jsonl, .jsonl.gz, .json, .parquet"),
]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES, ids=[expected[:50] for *_, expected in BAD_FILES])
def test_a_file_that_cannot_be_read_is_one_clear_line(name, content, expected, on_bad_row):
    assert refusal(spoil(name, content), on_bad_row=on_bad_row).startswith(expected)


def test_a_missing_file_or_a_folder_is_one_clear_line():
    Path("data").mkdir()
    for name in ("none.jsonl", "x/none.parquet", "data/none.csv", "a/b/c", "/" + "x" * 300):
        assert refusal(name) == f"{name}: no such file"
    assert refusal("data").startswith("data: is a folder, must be a file (.jsonl")


def test_an_empty_parquet_table_has_no_rows():
    pq.write_table(pa.table({"chosen": pa.array([], pa.string()), "rejected": pa.array([], pa.string())}), "d.parquet")
    assert refusal("d.parquet") == "d.parquet: has no rows"


def test_skipping_every_row_of_a_source_is_an_error():
    good = write_lines(PLAIN, name="good.jsonl")
    bad = write_lines("{", "[]", name="bad.jsonl")
    message = refusal(good, bad, on_bad_row="skip")
    assert message.startswith("bad.jsonl: none of its 2 rows can be used; the first: bad.jsonl:1: broken JSON")


def test_scores():
    row = {**PLAIN, "s_chosen": 3, "s_rejected": 0.5, "m": -1.5}
    assert the_pair(row).score is None
    assert the_pair(row, score_column="s").score == 2.5
    assert the_pair(row, score_column="m").score == -1.5
    pq.write_table(pa.Table.from_pylist([row]), "d.parquet")
    assert read_pairs(["d.parquet"], on_bad_row="error", score_column="s").pairs[0].score == 2.5


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({}, "score_column 's': needs 's_chosen' and 's_rejected', or 's'"),
        ({"s_chosen": 1}, "score_column 's': needs 's_chosen' and 's_rejected', or 's'"),
        ({"s": "high"}, "'s' is 'high', must be a finite number"),
        ({"s": True}, "'s' is True, must be a finite number"),
        ({"s_chosen": 1, "s_rejected": None}, "'s_rejected' is None, must be a finite number"),
        ({"s": float("nan")}, "'s' is nan, must be a finite number"),
    ],
)
def test_a_wrong_score_is_a_bad_row(extra, problem):
    assert refusal(write_lines({**PLAIN, **extra}), score_column="s").startswith(f"d.jsonl:1: {problem}")


@pytest.fixture
def datasets():
    return pytest.importorskip("datasets", reason="datasets is not installed: it loads from the Hub")


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [("org/name", "org/name", "train"), ("org/name:test", "org/name", "test"), ("o/n:train[:2]", "o/n", "train[:2]")],
)
def test_a_hub_dataset(monkeypatch, datasets, source, name, split):
    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return datasets.Dataset.from_list([{**CHAT, "extra": "not read"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (pair,) = read_pairs([source], on_bad_row="error").pairs
    assert asked == [(name, split)]
    assert pair == Pair([USER], [BLUE], [RED], f"{source}:row 1")


def test_a_hub_dataset_that_cannot_be_loaded(monkeypatch, datasets):
    def load_dataset(path, split):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub\nor is private")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("org/name") == (
        "org/name: no such file, and it cannot be loaded from the Hub: "
        "DatasetNotFoundError: Dataset 'org/name' doesn't exist on the Hub"
    )


def test_shared_pairs():
    def pairs(*answers: str) -> list[Pair]:
        return [Pair("p", answer, "no", f"x:{place}", score=place) for place, answer in enumerate(answers)]

    assert (
        shared_pairs({"a": pairs("1", "2", "2"), "b": pairs("3")}) == []
    )  # a repeated pair within one stage is not shared
    assert shared_pairs({"a": pairs("1", "2", "2"), "b": pairs("2", "3", "4"), "c": pairs("9")}) == [
        "stages 'a' and 'b' share 1 of their 2 and 3 distinct pairs: "
        "the reference of the later stage was trained on them"
    ]
    assert len(shared_pairs({"a": pairs("1"), "b": pairs("1"), "c": pairs("1")})) == 3

    assert shared_pairs({"a": pairs("1"), "eval_data": pairs("1", "2")}) == [
        "1 of eval_data's 2 distinct pairs are also trained on in stage 'a': scores on eval_data will be too high"
    ]

    # the order of a message's keys does not matter
    chat = Pair([USER], [BLUE], [RED], "x:1")
    reordered = Pair([dict(reversed(USER.items()))], [BLUE], [RED], "y:7")
    assert len(shared_pairs({"a": [chat], "b": [reordered]})) == 1


COUNTS = {
    "compact/stage1_grammar.jsonl": 2000,
    "compact/stage2_commonsense.jsonl": 2000,
    "compact/stage3_reasoning.jsonl": 2000,
    "compact/eval.jsonl": 500,
    "chat_short/stage1_qa_feedback.jsonl": 1314,
    "full/stage2_ultrafeedback.jsonl.gz": 840,
    "full/eval.jsonl.gz": 501,
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_real_files_have_no_bad_rows(name):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    data = read_pairs([str(DATA / name)], on_bad_row="error")
    assert isinstance(data, PairData)
    assert len(data.pairs) == COUNTS[name]
    assert all(pair.is_conversational == (not name.startswith("compact")) for pair in data.pairs)


def test_the_real_stages_share_no_pairs():
    names = [name for name in COUNTS if name.startswith("compact")]
    if not all((DATA / name).exists() for name in names):
        pytest.skip(f"{DATA}/compact is absent")
    assert shared_pairs({name: read_pairs([str(DATA / name)], on_bad_row="error").pairs for name in names}) == []


FILES = Path(__file__).resolve().parents[2] / "data" / "shapes"
SHAPES = {
    "orca.jsonl": Shape(ColumnSettings(prompt=("question",), system="system")),
    "alpaca.jsonl": Shape(ColumnSettings(prompt=("instruction", "input"))),
}


@pytest.mark.parametrize("path", sorted(path for path in FILES.glob("*.jsonl") if path.name != "images.jsonl"), ids=str)
def test_every_shape_gives_pairs_with_its_question(path):
    data = read_pairs([PairSource(str(path), SHAPES.get(path.name, Shape()))], on_bad_row="error")
    assert len(data.pairs) == 4
    assert "What is 2+2?" in json.dumps(data.pairs[0].prompt)
    assert "Name a primary colour." in json.dumps(data.pairs[1].prompt)
    if path.name != "tool_calls.jsonl":
        assert "four" in json.dumps(data.pairs[0].chosen)
        assert "five" in json.dumps(data.pairs[0].rejected)


def test_unused_columns_are_listed_by_source(tmp_path):
    rows = [{**PLAIN, "id": 1}, {**PLAIN, "source": "x"}]
    first, second = write_lines(*rows, name="a.jsonl"), write_lines(PLAIN, name="b.jsonl")
    table = pa.Table.from_pylist([{**PLAIN, "embedding": [0.5]}])
    pq.write_table(table, "c.parquet")
    data = read_pairs([first, second, "c.parquet"], on_bad_row="error")
    assert data.unused == {"a.jsonl": ["id", "source"], "c.parquet": ["embedding"]}


def test_a_score_column_is_used():
    path = write_lines({**PLAIN, "score_chosen": 2, "score_rejected": 1, "other": 3})
    assert read_pairs([path], on_bad_row="error", score_column="score").unused == {path: ["other"]}


@pytest.mark.parametrize("writer", ["pyarrow", "datasets", "datasets from JSON"])
def test_parquet_gives_the_pairs_that_json_lines_give(writer, tmp_path):
    """Structures of Parquet have all fields of all rows, as nulls, and `datasets` 5 stores mixed ones as JSON."""
    path = FILES / "tool_calls.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if writer == "pyarrow":
        pq.write_table(pa.Table.from_pylist(rows), "d.parquet")
    else:
        datasets = pytest.importorskip("datasets", reason="datasets is not installed: it writes this file")
        stored = datasets.Dataset.from_list(rows)
        if writer == "datasets from JSON":
            stored = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "c"))
            assert "arrow.json" in str(stored.data.schema)
        stored.to_parquet("d.parquet")
    wanted = read_pairs([str(path)], on_bad_row="error").pairs
    found = read_pairs(["d.parquet"], on_bad_row="error").pairs
    assert [(p.prompt, p.chosen, p.rejected, p.tools) for p in found] == [
        (p.prompt, p.chosen, p.rejected, p.tools) for p in wanted
    ]
    assert found[2].chosen[0]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


def test_an_empty_list_of_tools_is_no_tools():
    assert the_pair({**CHAT, "tools": []}).tools is None


def test_a_column_that_no_row_has_is_an_error():
    path = write_lines({"question": "q", "chosen": " a", "rejected": " b"})
    shape = Shape(ColumnSettings(prompt=("question",), system="sytem"))
    with pytest.raises(UserError, match=r"d\.jsonl: columns: no row has the column 'sytem'"):
        read_pairs([PairSource(path, shape)], on_bad_row="error")


def test_an_error_lists_the_columns_of_a_parquet_file_that_were_not_loaded():
    """Only what may be read is loaded; what is there under other names must be named all the same."""
    pq.write_table(pa.Table.from_pylist([{"question": "2+2?", "good": "4", "bad": "5"}]), "d.parquet")
    text = refusal("d.parquet")
    assert "'chosen' is missing; the row has the columns question, good, bad. " in text
    assert "columns: {prompt: question, chosen: good, rejected: bad}" in text
    pq.write_table(pa.Table.from_pylist([{"question": "2+2?", "chosen": "4", "rejected": "5"}]), "d.parquet")
    assert "'prompt' is missing; the row has the columns chosen, rejected, question. " in refusal("d.parquet")


def test_a_broken_first_line_does_not_decide_which_columns_a_source_has():
    """The run's columns are optional in evaluation data; `prompt` is another column here."""
    row = {"question": "2+2?", "prompt": "id-7", "chosen": "4", "rejected": "5"}
    shape = Shape(ColumnSettings(prompt=("question",)), columns_optional=True)
    path = write_lines("{broken", row)
    data = read_pairs([PairSource(path, shape)], on_bad_row="skip")
    assert [pair.prompt for pair in data.pairs] == ["2+2?"]
    assert data.own_names == []
    prompts, _ = read_prompts([PairSource(path, shape)], "skip")
    assert [prompt.prompt for prompt in prompts] == ["2+2?"]


@pytest.mark.parametrize("calls", [2, True, {"a": None}, [3, {"function": 4}]])
def test_columns_that_nothing_reads_may_have_any_tool_calls(calls):
    row = {"prompt": "?", "chosen": "4", "rejected": "5", "turns": [{"tool_calls": calls}]}
    data = read_pairs([write_as("jsonl", [row])], on_bad_row="error")
    assert [(pair.chosen, pair.rejected) for pair in data.pairs] == [("4", "5")]
    assert data.nulls == {}


def test_nulls_in_arguments_are_counted_where_somebody_may_have_written_them():
    def row(**arguments):
        calls = [{"type": "function", "function": {"name": "w", "arguments": arguments}}]
        return {**CHAT, "chosen": [{"role": "assistant", "content": "", "tool_calls": calls}]}

    rows = [row(city="Paris", unit=None), row(city="Rome", unit="C"), row(city="Oslo", unit=None)]
    for kind, counts in (("jsonl", {"d.jsonl": 2}), ("parquet", {})):
        data = read_pairs([write_as(kind, rows)], on_bad_row="error")
        assert data.nulls == counts
        found = [pair.chosen[0]["tool_calls"][0]["function"]["arguments"] for pair in data.pairs]
        assert found == [{"city": "Paris"}, {"city": "Rome", "unit": "C"}, {"city": "Oslo"}]

    # as JSON text they stay
    text = row()
    text["chosen"][0]["tool_calls"][0]["function"]["arguments"] = '{"city": "Paris", "unit": null}'
    (pair,) = read_pairs([write_lines(text)], on_bad_row="error").pairs
    assert pair.chosen[0]["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris", "unit": null}'
