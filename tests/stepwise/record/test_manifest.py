"""manifest.json: created once, then compared; metrics.jsonl: appended to and rewound."""

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.record.manifest import Manifest, MetricsFile

HEADER = {"version": "0", "config": {"beta": 0.1, "stages": [{"name": "a"}, {"name": "b"}]}, "eval_data_hash": None}


def planned(**changes):
    stages = [
        {"name": name, "index": i, "state": "pending", "pairs": 3, "dropped": 0, "data_hash": f"h{i}", "beta": 0.1}
        | {"loss": "sigmoid", "reference": "previous", "policy": "previous"}
        for i, name in enumerate("ab", 1)
    ]
    stages[1].update(changes)
    return stages


def test_created_then_read_back_with_its_progress(tmp_path):
    manifest = Manifest.open(tmp_path, HEADER, planned())
    manifest.update_stage(1, {"state": "done", "steps": 4})
    again = Manifest.open(tmp_path, HEADER, planned())
    assert [stage["state"] for stage in again.stages] == ["done", "pending"]
    assert again.stages[0]["steps"] == 4
    assert again.data["initial_eval"] is None


def test_another_config_is_an_error_that_lists_every_difference(tmp_path):
    Manifest.open(tmp_path, HEADER, planned())
    other = HEADER | {"config": {"beta": 0.2, "stages": [{"name": "a"}, {"name": "c"}]}}
    with pytest.raises(UserError) as error:
        Manifest.open(tmp_path, other, planned())
    assert "beta: 0.1 -> 0.2" in str(error.value)
    assert "stages.1.name: b -> c" in str(error.value)
    assert f"{tmp_path} already contains a run with different settings" in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("data_hash", "other"), ("pairs", 4), ("dropped", 1), ("beta", 0.2)])
def test_other_data_is_an_error_that_names_the_stage(tmp_path, key, value):
    before = (Manifest.open(tmp_path, HEADER, planned()).path).read_bytes()
    with pytest.raises(UserError, match=rf"b\.{key}: .* -> {value}"):
        Manifest.open(tmp_path, HEADER, planned(**{key: value}))
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_other_evaluation_data_is_an_error(tmp_path):
    Manifest.open(tmp_path, HEADER | {"eval_data_hash": "one"}, planned())
    with pytest.raises(UserError, match="eval_data_hash: one -> two"):
        Manifest.open(tmp_path, HEADER | {"eval_data_hash": "two"}, planned())


def test_a_broken_manifest_is_an_error(tmp_path):
    (tmp_path / "manifest.json").write_text('{"stages": [')
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
        Manifest.open(tmp_path, HEADER, planned())


def line(stage, step, **values):
    return {"stage/name": "x", "stage/index": stage, "step": step} | (values or {"loss": 0.5})


def test_rewind_keeps_the_lines_up_to_a_checkpoint(tmp_path):
    file = MetricsFile(tmp_path)
    for stage, steps in ((1, 3), (2, 4), (3, 2)):
        for step in range(1, steps + 1):
            file.append(line(stage, step))
    file.rewind(2, 2)
    assert [(x["stage/index"], x["step"]) for x in file.lines()] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]


def test_a_stage_that_starts_over_keeps_none_of_its_lines(tmp_path):
    """An evaluation before the first step has step 0; otherwise a kill would leave it twice."""
    file = MetricsFile(tmp_path)
    file.append(line(1, 5))
    file.append(line(2, 0, eval_loss=0.7))
    file.append(line(2, 1))
    file.rewind(2, None)
    assert [(x["stage/index"], x["step"]) for x in file.lines()] == [(1, 5)]


def test_a_half_line_is_removed_and_whole_lines_keep_their_bytes(tmp_path):
    file = MetricsFile(tmp_path)
    file.append(line(1, 1, loss=0.1 + 0.2, name="β"))
    whole = file.path.read_bytes()
    with file.path.open("a") as stream:
        stream.write('{"stage/name": "x", "stage/index": 1, "st')
    assert len(file.lines()) == 1
    file.rewind(1, 1)
    assert file.path.read_bytes() == whole


def test_of_stage_leaves_out_evaluations(tmp_path):
    file = MetricsFile(tmp_path)
    assert file.lines() == []
    file.append(line(1, 1))
    file.append(line(1, 1, eval_loss=0.4))
    file.append(line(2, 1))
    assert file.of_stage(1) == [line(1, 1)]
