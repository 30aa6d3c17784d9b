"""manifest.json: created once, then compared; metrics.jsonl: appended to and rewound."""

import pytest

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.record.manifest import Manifest, MetricsFile

CONFIG = {"beta": 0.1, "stages": [{"name": "a"}, {"name": "b"}]}
HEADER = {"version": "0", "config": CONFIG, "eval_data_hash": None}


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


def started(tmp_path, *states) -> Manifest:
    """The manifest of a run whose stages have these states."""
    manifest = Manifest.open(tmp_path, HEADER, planned())
    for index, state in enumerate(states, 1):
        manifest.update_stage(index, {"state": state, "eval": "scores"})
    return manifest


def test_another_config_is_an_error_that_lists_every_difference(tmp_path):
    started(tmp_path, "done")
    config = {"beta": 0.2, "seed": 1, "stages": [{"name": "a", "beta": 0.3}, {"name": "c"}]}
    with pytest.raises(UserError) as error:
        Manifest.open(tmp_path, HEADER | {"config": config}, planned())
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{tmp_path} already contains a run with different settings")
    assert sorted(lines[1:]) == [
        "  seed: absent -> 1 (the weights so far depend on it)",
        "  stages.a.beta: 0.1 -> 0.3 (the weights so far depend on it)",
    ]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ("ba", "order of stages: a, b -> b, a"),
        ("a", "order of stages: a, b -> a"),
        ("cab", "order of stages: a, b -> c, a"),
    ],
)
def test_stages_that_have_started_keep_their_places(tmp_path, names, line):
    started(tmp_path, "done", "training")
    header = HEADER | {"config": {"beta": 0.1, "stages": [{"name": name} for name in names]}}
    with pytest.raises(UserError, match=rf"{line} \(they have been trained in this order\)"):
        Manifest.open(tmp_path, header, planned())


@pytest.mark.parametrize(("key", "value"), [("data_hash", "other"), ("pairs", 4), ("dropped", 1), ("beta", 0.2)])
def test_other_data_is_an_error_that_names_the_stage(tmp_path, key, value):
    before = started(tmp_path, "done", "training").path.read_bytes()
    with pytest.raises(UserError, match=rf"stages\.b\.{key}: .* -> {value} \("):
        Manifest.open(tmp_path, HEADER, planned(**{key: value}))
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("key", ["data_hash", "pairs", "dropped", "beta"])
def test_other_data_of_a_stage_that_has_not_started_is_taken(tmp_path, key):
    started(tmp_path, "done")
    manifest = Manifest.open(tmp_path, HEADER, planned(**{key: 7}))
    assert manifest.stages[1][key] == 7
    assert Manifest.open(tmp_path, HEADER, planned(**{key: 7})).data == manifest.data


def test_other_evaluation_data_drops_the_evaluations_on_the_old(tmp_path):
    Manifest.open(tmp_path, HEADER | {"eval_data_hash": "one"}, planned())
    manifest = started(tmp_path, "done")
    manifest.data["initial_eval"] = "scores"
    manifest.save()
    for same in ("one", None):
        assert Manifest.open(tmp_path, HEADER | {"eval_data_hash": same}, planned()).data["initial_eval"] == "scores"
    data = Manifest.open(tmp_path, HEADER | {"eval_data_hash": "two"}, planned()).data
    assert (data["eval_data_hash"], data["initial_eval"], data["stages"][0]["eval"]) == ("two", None, None)


def test_another_template_time_is_an_error_once_a_stage_has_started(tmp_path):
    first, second = (HEADER | {"template_time": f"2026-11-2{day}T00:00:00"} for day in (8, 9))
    Manifest.open(tmp_path, first, planned())
    Manifest.open(tmp_path, second, planned())
    started(tmp_path, "training")
    with pytest.raises(UserError, match="template_time: 2026-11-28T00:00:00 -> 2026-11-29T00:00:00"):
        Manifest.open(tmp_path, second, planned())


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
