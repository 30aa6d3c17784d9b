"""YAML 1.2 in and out: files that hold no settings, and that anything written reads back equal."""

import math
from pathlib import Path

import pytest
import yaml  # PyYAML reads YAML 1.1, as many tools do; huggingface_hub requires it
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.settings.yaml_file import read_settings, write_settings


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes) -> str:
    Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return "run.yaml"


def refusal(path: str) -> str:
    with pytest.raises(UserError) as raised:
        read_settings(path)
    return str(raised.value)


FILES = [
    ("", "run.yaml: is empty, must hold at least model, output_dir and stages"),
    ("# only a remark\n", "run.yaml: is empty"),
    ("- a\n- b\n", "run.yaml: holds a list, must hold keys such as 'model: …' at the top"),
    ("just text", "run.yaml: holds a single value ('just text')"),
    ("a: [1\nb: 2\n", "run.yaml:2: is not valid YAML: "),
    ("a: 1\n\tb: 2\n", "run.yaml:2: is not valid YAML: found character '\\t' that cannot start any token"),
    ("a: 1\nb: 2\na: 3\n", "run.yaml:3: is not valid YAML: the key 'a' is given twice"),
    ("t:\n  lr: 1\n  lr: 2\n", "run.yaml:3: is not valid YAML: the key 'lr' is given twice"),
    ("a: !!python/name:os.system\n", "run.yaml:1: is not valid YAML: could not determine a constructor"),
    ("a: " + "9" * 5000, "run.yaml:1: is not valid YAML: Exceeds the limit"),
    ("a: " + "[" * 5000, "run.yaml: is not valid YAML: "),
    ("a: !!omap [b: 1]\n", "run.yaml:1: is not valid YAML: could not determine a constructor"),
    ("a: !!float fast\n", "run.yaml:1: is not valid YAML: could not convert string to float: 'fast'"),
    ("a: 1\nb:\n  <<: {c: 1}\n  d: 2\n  d: 3\n", "run.yaml:5: is not valid YAML: the key 'd' is given twice"),
    ("? [1, [2]]\n: 3\n", "run.yaml:1: is not valid YAML: found unhashable key"),
    ('a: "many\n\n  lines"\na: 2\n', "run.yaml:4: is not valid YAML: the key 'a' is given twice"),
    (b"a: \xff\n", "run.yaml: is not UTF-8 text (byte 3)"),
    (b"a: \x00\n", "run.yaml: is not valid YAML: unacceptable character"),
]


@pytest.mark.parametrize(("text", "expected"), FILES, ids=[repr(expected) for _, expected in FILES])
def test_a_file_that_is_no_mapping_is_one_clear_line(text, expected):
    message = refusal(write(text))
    assert message.startswith(expected)
    assert "\n" not in message


def test_missing_file_and_folder(tmp_path):
    assert refusal(str(tmp_path / "none.yaml")) == f"{tmp_path}/none.yaml: no such file"
    assert refusal(str(tmp_path)) == f"{tmp_path}: is a folder, must be a YAML file"


READINGS = {
    "5e-7": 5e-7, ".5e3": 500.0, "1.": 1.0, "-.inf": -math.inf, "010": 10, "0o10": 8, "0x1F": 31, "+5": 5,
    "~": None, "": None, "TRUE": True, "{a: [1, b]}": {"a": [1, "b"]},
    **{text: text for text in ("no", "on", "Yes", "1_000", "0b1", "-0x1", "=", "2024-01-01", "12:30:45", "-_", "1e")},
}  # fmt: skip


@pytest.mark.parametrize("text", READINGS)
def test_scalars_are_those_of_the_core_schema_of_yaml_1_2(text):
    for head in ("", "%YAML 1.1\n---\n"):
        value = read_settings(write(f"{head}key: {text}\n"))["key"]
        assert value == READINGS[text]
        assert type(value) is type(READINGS[text])


def test_merge_keys_give_defaults_that_own_keys_override():
    text = "a: &a {x: 0, z: 1}\nin:\n  b: &b {<<: *a, x: 1}\nc: {<<: *b, x: 2}\nd: {<<: [*b, *a]}\n"
    settings = read_settings(write(text))
    assert settings["in"]["b"] == {"x": 1, "z": 1}
    assert settings["c"] == {"x": 2, "z": 1}
    assert settings["d"] == {"x": 1, "z": 1}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
AMBIGUOUS = [
    "no", "y", "on", "1e-5", ".5e3", "null", "<<", "010", "0o7", "0x1", "0b1", "~", "1_000", "12:30:45", "2024-01-01",
    "=",
]  # fmt: skip
KEYS = st.text(max_size=8) | st.sampled_from(AMBIGUOUS)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS | KEYS, lambda t: st.lists(t, max_size=3) | st.dictionaries(KEYS, t, max_size=3), max_leaves=6
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
@example(tree={"rate": 1e-7, "large": 1e300, "least": -5e-324, "infinite": -math.inf})
@example(tree={word: word for word in AMBIGUOUS})
@example(tree={"breaks of Unicode": "a\x85b\u2028c\u2029d\ufeffe", "\x85": ["\x85"]})
def test_settings_survive_writing_and_reading_by_yaml_1_2_and_1_1(tree):
    text = write_settings(tree)
    assert read_settings(write(text)) == tree
    assert yaml.safe_load(text) == tree
