"""Reading a run's input: what is kept, dropped, skipped and warned about before training."""

import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from sdpo_kernels.stepwise.common import ranks
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.progress import Reporter
from sdpo_kernels.stepwise.common.progress_rows import Row
from sdpo_kernels.stepwise.common.run_progress import StagePlan
from sdpo_kernels.stepwise.data.tokenize import TokenizedPairs
from sdpo_kernels.stepwise.prepare import prepare, read_eval
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from sdpo_kernels.stepwise.state import Stage
from tests.stepwise import runs


def test_stages_are_in_the_listed_order_with_the_file_and_line_of_every_pair(tmp_path, model):
    evaluation = runs.write_rows(tmp_path / "e.jsonl", runs.make_rows(3, seed=9))
    prepared = prepare(runs.configured(tmp_path, model, eval_data=str(evaluation)))
    assert [(s.config.name, len(s.tokens)) for s in prepared.stages] == [("s1", 12), ("s2", 8)]
    assert prepared.stages[1].where == [f"{tmp_path}/data2.jsonl:{i}" for i in range(1, 9)]
    assert len(prepared.eval_tokens) == 3
    assert prepared.warnings == prepared.skipped == []
    assert prepared.stages[0].scores is None


def test_bad_rows_are_skipped_counted_and_listed(tmp_path, model, spoken):
    rows = runs.make_rows(6)
    rows[2]["chosen"] = ""
    del rows[4]["rejected"]
    data = runs.write_rows(tmp_path / "data1.jsonl", rows)
    with pytest.raises(UserError, match=rf"{data}:3: 'chosen' is empty \(and 1 more bad row\)"):
        prepare(runs.configured(tmp_path, model, sizes=(6,)))
    prepared = prepare(runs.configured(tmp_path, model, sizes=(6,), on_bad_row="skip"))
    assert prepared.stages[0].where == [f"{data}:{i}" for i in (1, 2, 4, 6)]
    assert [line.split(": ")[0] for line in prepared.skipped] == [f"{data}:3", f"{data}:5"]
    prepared.say_warnings(spoken.reporter)
    assert f"2 bad rows skipped, the first: {data}:3" in spoken.text


def test_pairs_emptied_by_truncation_are_dropped_and_counted_in_a_warning(tmp_path, model):
    rows = runs.make_rows(4)
    rows[1]["prompt"] = " ".join(["word1"] * 9)
    data = runs.write_rows(tmp_path / "data1.jsonl", rows)
    prepared = prepare(runs.configured(tmp_path, model, sizes=(4,), max_length=8))
    stage = prepared.stages[0]
    assert len(stage.tokens) == 3
    assert stage.where == [f"{data}:{i}" for i in (1, 3, 4)]
    cut, dropped = prepared.warnings
    assert dropped.startswith(f"stage s1: 1 of 4 pairs dropped, the first: {data}:2: max_length 8 leaves nothing")
    assert cut.startswith("stage s1: max_length 8 cuts 4 of 4 pairs, which lose 11 of 33 scored tokens (33.3%)")


def ten_words(prompt: int, answer: int) -> dict[str, str]:
    """A pair of a prompt and answers of so many words; with the end token, an answer has one more token."""
    texts = [[word] * count for word, count in (("word1", prompt), ("good1", answer), ("bad1", answer))]
    return dict(zip(("prompt", "chosen", "rejected"), (f" {' '.join(text)}" for text in texts), strict=True))


def test_cut_pairs_and_lost_tokens_are_a_warning_from_one_percent_on(tmp_path, model):
    """200 pairs of 2 × 5 scored tokens; each that is cut loses its two end tokens, 0.1 % of the scored tokens."""

    def prepared(cut: int):
        rows = [ten_words(3 if place < cut else 2, 4) for place in range(200)]
        runs.write_rows(tmp_path / "data1.jsonl", rows)
        evaluation = runs.write_rows(tmp_path / "e.jsonl", rows[:1] * 100)
        return prepare(runs.configured(tmp_path, model, sizes=(200,), max_length=7, eval_data=str(evaluation)))

    few = prepared(2)
    text = "stage s1: max_length 7 cuts 2 of 200 pairs, which lose 4 of 2,000 scored tokens (0.2%)"
    assert few.notes == [text]
    assert few.warnings[0] == (
        "eval_data: max_length 7 cuts 100 of 100 pairs, which lose 200 of 1,000 scored tokens (20.0%); raise "
        "max_length to keep them"
    )
    assert (few.stages[0].tokens.cut_pairs, few.stages[0].tokens.lost_tokens) == (2, 4)

    more = prepared(3)
    assert more.notes == []
    text = "stage s1: max_length 7 cuts 3 of 200 pairs, which lose 6 of 2,000 scored tokens (0.3%)"
    assert more.warnings[0] == f"{text}; raise max_length to keep them"
    assert prepared(0).notes == []


def test_a_few_long_pairs_that_lose_many_tokens_are_a_warning(tmp_path, model):
    rows = [ten_words(1, 1)] * 199 + [ten_words(1, 30)]
    runs.write_rows(tmp_path / "data1.jsonl", rows)
    (warning,) = prepare(runs.configured(tmp_path, model, sizes=(200,), max_length=7)).warnings
    assert warning.startswith("stage s1: max_length 7 cuts 1 of 200 pairs, which lose 50 of 858 scored tokens (5.8%)")


def test_pairs_that_truncation_makes_equal_are_dropped_with_the_reason(tmp_path, model):
    same = {"prompt": "word1", "chosen": " good1 good2 good3 bad1", "rejected": " good1 good2 good3 bad2"}
    data = runs.write_rows(tmp_path / "data1.jsonl", [same, ten_words(1, 1)])
    prepared = prepare(runs.configured(tmp_path, model, sizes=(2,), max_length=4))
    assert prepared.stages[0].where == [f"{data}:2"]
    reason = "max_length 4 leaves equal tokens of chosen and rejected; the pair teaches nothing"
    assert prepared.warnings[1] == f"stage s1: 1 of 2 pairs dropped, the first: {data}:1: {reason}"


def test_a_repeated_prompt_is_a_warning_of_its_stage(tmp_path, model):
    rows = runs.make_rows(3)
    rows[1] |= {side: f" {rows[1]['prompt']}{rows[1][side]}" for side in ("chosen", "rejected")}
    data = runs.write_rows(tmp_path / "data1.jsonl", rows)
    (warning,) = prepare(runs.configured(tmp_path, model, sizes=(3,))).warnings
    assert warning.startswith(f"stage s1: 1 of 3 pairs (first: {data}:2): both answers begin with the prompt, which")


def test_a_prompt_of_a_source_whose_message_the_template_drops(tmp_path):
    folder = runs.make_model(tmp_path / "with_template")
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }} {% endfor %}"
    runs.make_tokenizer(chat_template=template).save_pretrained(folder)
    messages = [{"role": "human", "content": "word1"}, {"role": "user", "content": "word2"}]
    data = runs.write_rows(tmp_path / "p.jsonl", [{"prompt": messages}])
    source = {"kind": "ranked", "judge": "builtins:len"}
    stages = [{"name": "a", "prompts": str(data), "source": source}]
    with pytest.raises(
        UserError, match=r"p.jsonl:1: the chat template drops the message of role 'human' \(prompt\[0\]"
    ):
        prepare(runs.configured(tmp_path, folder, stages=stages))


def test_scores_stay_with_their_pairs_when_others_are_dropped(tmp_path, model):
    rows = [row | {"s_chosen": i, "s_rejected": 0.5} for i, row in enumerate(runs.make_rows(4))]
    rows[1]["prompt"] = " ".join(["word1"] * 9)
    runs.write_rows(tmp_path / "data1.jsonl", rows)
    settings = {"order": "pair_accuracy", "score_column": "s", "max_length": 8}
    prepared = prepare(runs.configured(tmp_path, model, sizes=(4,), **settings))
    assert prepared.stages[0].scores.tolist() == [-0.5, 1.5, 2.5]


def test_pairs_that_stages_share_are_counted_in_a_warning(tmp_path, model):
    rows = runs.make_rows(10)
    runs.write_rows(tmp_path / "data1.jsonl", rows[:6])
    runs.write_rows(tmp_path / "data2.jsonl", rows[4:])
    evaluation = runs.write_rows(tmp_path / "e.jsonl", rows[9:])
    prepared = prepare(runs.configured(tmp_path, model, eval_data=str(evaluation)))
    assert len(prepared.warnings) == 2
    assert "'s1' and 's2' share 2 of their 6 and 6" in prepared.warnings[0]
    assert "1 of eval_data's 1 distinct pairs are also trained on in stage 's2'" in prepared.warnings[1]


def test_a_file_without_a_usable_row_is_an_error(tmp_path, model):
    runs.write_rows(tmp_path / "data1.jsonl", [{"chosen": "x"}])
    with pytest.raises(UserError, match="none of its 1 row can be used"):
        prepare(runs.configured(tmp_path, model, sizes=(1,), on_bad_row="skip"))


def test_evaluation_data_alone(tmp_path, model):
    config = runs.configured(tmp_path, model, on_bad_row="skip")
    data = runs.write_rows(tmp_path / "e.jsonl", [*runs.make_rows(2), {"chosen": "x"}])
    tokens, said, tokenizer = read_eval(config, [str(data)])
    assert len(tokens) == 2
    assert tokenizer.eos_token == "</s>"
    (line,) = said
    assert line.startswith(f"{data}:3: 'rejected' is missing; the row has the columns chosen. Name its columns with ")


ORCA = str(Path(__file__).resolve().parents[1] / "data" / "shapes" / "orca.jsonl")


def test_a_question_under_another_name_stops_the_run(tmp_path, model):
    config = runs.configured(tmp_path, model, stages=[{"name": "s1", "data": ORCA}])
    with pytest.raises(
        UserError, match=r"orca\.jsonl:1: 'prompt' is missing.* columns: \{prompt: question, system: system\}"
    ):
        prepare(config)


@pytest.mark.parametrize("level", ["run", "stage", "entry"])
def test_columns_of_a_run_a_stage_and_an_entry(tmp_path, model, level):
    """The same tokens as with TRL's column names."""
    rows = runs.make_rows(4)
    alpaca = [
        {"instruction": "good1", "input": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in rows
    ]
    path = str(runs.write_rows(tmp_path / "alpaca.jsonl", alpaca))
    columns = {"prompt": ["instruction", "input"]}
    stage = {"name": "s1", "data": path}
    if level == "stage":
        stage["columns"] = columns
    if level == "entry":
        stage["data"] = [{"path": path, "columns": columns}]
    more = {"columns": columns} if level == "run" else {"columns": {"prompt": "nowhere"}}
    prepared = prepare(runs.configured(tmp_path, model, stages=[stage], **more))
    assert prepared.unused == {}

    trl = [row | {"prompt": f"good1\n{row['prompt']}"} for row in rows]
    plain = str(runs.write_rows(tmp_path / "plain.jsonl", trl))
    alone = prepare(runs.configured(tmp_path, model, stages=[{"name": "s1", "data": plain}]))
    assert len(prepared.stages[0].tokens) == 4
    assert prepared.stages[0].tokens.content_hash() == alone.stages[0].tokens.content_hash()


def test_a_column_that_sounds_like_the_prompt_is_a_warning_and_others_are_listed(tmp_path, model):
    rows = [row | {"system": "Be brief.", "id": n} for n, row in enumerate(runs.make_rows(4))]
    data = str(runs.write_rows(tmp_path / "d.jsonl", rows))
    prepared = prepare(runs.configured(tmp_path, model, stages=[{"name": "s1", "data": data}]))
    # each is said once: the warning, or the list
    assert prepared.unused == {data: ["id"]}
    assert len([w for w in prepared.warnings if "'system' is not used" in w]) == 1
    assert not [w for w in prepared.warnings if "'id'" in w]


def test_the_runs_columns_are_optional_in_data_to_evaluate_on(tmp_path, model):
    rows = runs.make_rows(4)
    renamed = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    trl, own = (
        str(runs.write_rows(tmp_path / name, found)) for name, found in (("t.jsonl", rows), ("o.jsonl", renamed))
    )
    columns = {"prompt": "question"}
    config = runs.configured(tmp_path, model, stages=[{"name": "s1", "data": own}], columns=columns, eval_data=trl)
    prepared = prepare(config)
    assert prepared.eval_tokens.content_hash() == prepared.stages[0].tokens.content_hash()
    assert prepared.notes == [f"{trl}: has none of the columns that the run's columns name, and is read by TRL's names"]
    assert read_eval(config, [trl])[0].content_hash() == read_eval(config, [own])[0].content_hash()

    # training data, and an entry's own columns, have to be there
    for settings in ({"stages": [{"name": "s1", "data": trl}]}, {"eval_data": [{"path": trl, "columns": columns}]}):
        config = runs.configured(
            tmp_path, model, **{"stages": [{"name": "s1", "data": own}], **settings}, columns=columns
        )
        with pytest.raises(
            UserError, match="no row has the column 'question', which they name; there are chosen, prompt"
        ):
            prepare(config)


def test_prompts_that_the_template_drops_are_bad_rows(tmp_path, model):
    rows = [{"prompt": [{"role": role, "content": "word1 word2"}]} for role in ("human", "user", "gpt")]
    data = str(runs.write_rows(tmp_path / "p.jsonl", rows))
    source = {"kind": "ranked", "samples": 2, "judge": "tests.stepwise.sources.judges:good_words"}
    stages = [{"name": "s1", "prompts": data, "source": source}]
    chat = tmp_path / "chat"
    shutil.copytree(model, chat)
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    (chat / "chat_template.jinja").write_text(template)
    prepared = prepare(runs.configured(tmp_path, chat, stages=stages, on_bad_row="skip"))
    assert [row.where for row in prepared.stages[0].prompts] == [f"{data}:2"]
    assert [line.split(": ")[0] for line in prepared.skipped] == [f"{data}:1", f"{data}:3"]
    with pytest.raises(UserError, match=r"p\.jsonl:1: the chat template drops the message of role 'human'"):
        prepare(runs.configured(tmp_path, chat, stages=stages))


# ---- plain text and conversations ----

CHAT_ROW = {
    "prompt": [{"role": "user", "content": "word1"}],
    "chosen": [{"role": "assistant", "content": "good1"}],
    "rejected": [{"role": "assistant", "content": "bad1"}],
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = runs.make_model(tmp_path_factory.mktemp("chat"))
    runs.make_tokenizer(chat_template=runs.CHAT).save_pretrained(folder)
    return folder


def two_stages(tmp_path, model, first, second, **settings):
    rows = {"plain": runs.make_rows(3), "chat": [CHAT_ROW], "both": [*runs.make_rows(2), CHAT_ROW]}
    for number, kind in enumerate((first, second), 1):
        runs.write_rows(tmp_path / f"data{number}.jsonl", rows[kind])
    return prepare(runs.configured(tmp_path, model, **settings))


def test_plain_text_with_a_chat_template_is_a_note(tmp_path, model, chat_model, spoken):
    prepared = two_stages(tmp_path, chat_model, "plain", "plain", eval_data=str(tmp_path / "data1.jsonl"))
    (note,) = prepared.notes
    assert note.startswith("plain text in stage s1, stage s2, eval_data: the tokenizer's chat template is not used; ")
    prepared.say_notes(spoken.reporter)
    assert f"note       {note}" in spoken.text
    assert two_stages(tmp_path, chat_model, "chat", "chat").notes == []
    assert two_stages(tmp_path, model, "plain", "plain").notes == []  # a tokenizer without a template


@pytest.mark.parametrize(
    ("first", "second", "start"),
    [
        ("plain", "chat", "plain text in stage s1, conversations in stage s2: "),
        ("both", "chat", "plain text in stage s1 (2 of 3 rows), conversations in stage s1 (1 of 3 rows), stage s2: "),
    ],
)
def test_two_formats_in_one_run_are_a_warning(tmp_path, chat_model, first, second, start):
    prepared = two_stages(tmp_path, chat_model, first, second)
    assert [warning.startswith(start) for warning in prepared.warnings if "conversations in" in warning] == [True]
    assert prepared.notes == []


def test_evaluation_in_another_format_is_a_warning(tmp_path, chat_model):
    evaluation = runs.write_rows(tmp_path / "e.jsonl", [CHAT_ROW])
    prepared = two_stages(tmp_path, chat_model, "plain", "plain", eval_data=str(evaluation))
    (warning,) = [text for text in prepared.warnings if "conversations in" in text]
    assert warning.startswith("plain text in stage s1, stage s2, conversations in eval_data: ")


def test_prompts_of_another_format_are_a_warning(tmp_path, chat_model):
    prompts = runs.write_rows(tmp_path / "p.jsonl", [{"prompt": "word1"}])
    data = runs.write_rows(tmp_path / "d.jsonl", [CHAT_ROW])
    source = {"kind": "ranked", "judge": "builtins:len", "max_new_tokens": 8}
    stages = [{"name": "a", "prompts": str(prompts), "source": source}, {"name": "b", "data": str(data)}]
    (warning,) = prepare(runs.configured(tmp_path, chat_model, stages=stages)).warnings
    assert warning.startswith("plain text in stage a, conversations in stage b: ")


# ---- skipped rows ----


def test_bad_rows_of_a_file_that_two_stages_share_are_listed_once_and_counted_for_each(tmp_path, model, spoken):
    data = runs.write_rows(tmp_path / "d.jsonl", [*runs.make_rows(3), {"x": 1}])
    prompts = runs.write_rows(tmp_path / "p.jsonl", [{"prompt": "word1"}, {"prompt": 3}])
    source = {"kind": "ranked", "judge": "builtins:len", "max_new_tokens": 8}
    stages = [{"name": name, "data": str(data)} for name in "ab"]
    stages += [{"name": name, "prompts": str(prompts), "source": source} for name in "cd"]
    prepared = prepare(runs.configured(tmp_path, model, stages=stages, on_bad_row="skip"))
    assert [line.split(": ")[0] for line in prepared.skipped] == [f"{data}:4", f"{prompts}:2"]
    assert [stage.skipped for stage in prepared.stages] == [1, 1, 1, 1]
    prepared.say_warnings(spoken.reporter)
    assert "2 bad rows skipped, the first: " in spoken.text


def test_a_warning_about_a_file_that_two_stages_share_is_printed_once(tmp_path, model, spoken):
    data = runs.write_rows(tmp_path / "d.jsonl", [row | {"system": "x"} for row in runs.make_rows(3)])
    stages = [{"name": name, "data": str(data)} for name in "ab"]
    prepare(runs.configured(tmp_path, model, stages=stages)).say_warnings(spoken.reporter)
    assert spoken.text.count("the column 'system' is not used") == 1


# ---- prompts and max_length ----


@pytest.mark.parametrize(
    ("most", "warnings"),
    [
        (5, []),
        (6, ["stage a: 1 of 2 prompts exceed max_length (8) with max_new_tokens (6): ", "max_length of 9 keeps all"]),
        (8, ["stage a: 2 of 2 prompts exceed max_length (8) with max_new_tokens (8): ", "max_length of 11 keeps all"]),
    ],
)
def test_prompts_that_leave_no_room_for_an_answer_are_a_warning(tmp_path, model, most, warnings):
    prompts = runs.write_rows(tmp_path / "p.jsonl", [{"prompt": "word1"}, {"prompt": "word1 word2 word3"}])
    source = {"kind": "ranked", "judge": "builtins:len", "max_new_tokens": most}
    stages = [{"name": "a", "prompts": str(prompts), "source": source}]
    found = prepare(runs.configured(tmp_path, model, stages=stages, max_length=8)).warnings
    assert len(found) == bool(warnings)
    assert all(text in found[0] for text in warnings)


# ---- columns of files on the command line ----


def test_a_file_of_the_run_is_read_with_its_own_columns(tmp_path, model, monkeypatch):
    rows = runs.make_rows(4)
    renamed = [{"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows]
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    names = ("entry", "stage", "eval")
    files = {name: str(runs.write_rows(tmp_path / f"{name}.jsonl", renamed)) for name in names}
    stages = [
        {"name": "a", "data": [{"path": files["entry"], "columns": columns}]},
        {"name": "b", "data": files["stage"], "columns": columns},
    ]
    evaluation = [{"path": files["eval"], "columns": columns}]
    config = runs.configured(tmp_path, model, stages=stages, eval_data=evaluation)
    trl = runs.write_rows(tmp_path / "trl.jsonl", rows)
    wanted = read_eval(config, [str(trl)])[0].content_hash()
    monkeypatch.chdir(tmp_path)
    for name in names:  # also by another path of the same file
        for path in (files[name], f"{name}.jsonl"):
            assert read_eval(config, [path])[0].content_hash() == wanted

    # another file with these names has no settings: the error says where the command takes them
    other = str(runs.write_rows(tmp_path / "other.jsonl", renamed))
    with pytest.raises(UserError) as error:
        read_eval(config, [other], None, "on the command line: 'columns={}'")
    assert str(error.value).endswith("; on the command line: 'columns={chosen: good, rejected: bad}'")
    config = config.model_copy(update={"columns": config.stages[1].columns})
    assert read_eval(config, [other])[0].content_hash() == wanted


def test_tokenizing_is_counted(tmp_path, model):
    """Rows of progress for what takes long with much data: each file is read, and its pairs are counted."""
    shown = []

    class Listening(Reporter):
        @contextmanager
        def waiting(self, what):
            shown.append(what)
            yield

        @contextmanager
        def task(self, name, total, done=0, **_):
            row = Row(name, total)
            row.update = lambda done, note="": shown.append(f"{name} {done}/{total}")
            yield row

    config = runs.configured(tmp_path, model, sizes=(600,))
    assert len(prepare(config, reporter=Listening()).stages[0].tokens) == 600
    assert shown == [
        f"loading the tokenizer of {model}",
        "reading stage s1",
        "tokenizing stage s1 250/600",
        "tokenizing stage s1 500/600",
        "tokenizing stage s1 600/600",
        "trying what training needs: model, saving, trainer, disk space",
    ]


class Planned(Stage):
    """A stage that has not started, without a run."""

    record: ClassVar = {"state": "pending"}

    def __init__(self, data, args):
        self.data, self.args = data, args


def test_the_plan_of_a_stage_counts_steps_and_tokens(tmp_path, model, monkeypatch):
    trainer = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    config = runs.configured(tmp_path, model, sizes=(13,), trainer=trainer)
    (data,) = prepare(config).stages
    stage = Planned(data, training_arguments(config, data.config, tmp_path, tmp_path))
    mean = float(data.tokens.lengths.sum()) / 13
    assert stage.plan == StagePlan(4, pytest.approx(4 * mean))  # 7 batches, two a step
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    assert stage.plan == StagePlan(2, pytest.approx(12 * mean))  # 3 batches of 6
    stage.data = replace(data, tokens=TokenizedPairs.concatenate([]))  # not generated yet
    assert stage.plan == StagePlan(None)
    monkeypatch.setattr(Planned, "record", {"state": "done", "steps": 7})
    assert stage.plan == StagePlan(7, done=7)
