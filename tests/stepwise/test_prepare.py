"""Reading a run's input: what is kept, dropped, skipped and warned about before training."""

from pathlib import Path

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.prepare import prepare, read_eval
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
    with pytest.raises(UserError, match=rf"{data}:3: 'chosen' is empty \(and 1 more bad rows\)"):
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
    (warning,) = prepared.warnings
    assert warning.startswith(f"stage s1: 1 of 4 pairs dropped, the first: {data}:2: max_length 8 leaves nothing")


def test_scores_stay_with_their_pairs_when_others_are_dropped(tmp_path, model):
    rows = [row | {"s_chosen": i, "s_rejected": 0.5} for i, row in enumerate(runs.make_rows(4))]
    rows[1]["prompt"] = " ".join(["word1"] * 9)
    runs.write_rows(tmp_path / "data1.jsonl", rows)
    settings = {"order": "reward_accuracy", "score_column": "s", "max_length": 8}
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
    with pytest.raises(UserError, match="none of its 1 rows can be used"):
        prepare(runs.configured(tmp_path, model, sizes=(1,), on_bad_row="skip"))


def test_evaluation_data_alone(tmp_path, model):
    config = runs.configured(tmp_path, model, on_bad_row="skip")
    data = runs.write_rows(tmp_path / "e.jsonl", [*runs.make_rows(2), {"chosen": "x"}])
    tokens, said, tokenizer = read_eval(config, [str(data)])
    assert len(tokens) == 2
    assert tokenizer.eos_token == "</s>"
    assert said == [f"{data}:3: 'rejected' is missing; a row needs chosen and rejected (and may have prompt)"]


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
    assert prepared.unused == {data: ["id", "system"]}
    assert [w for w in prepared.warnings if "'system' is not used" in w]
    assert not [w for w in prepared.warnings if "'id'" in w]
