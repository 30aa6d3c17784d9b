"""A run whose chat template prints the date: tokens stay those of its first start, whatever day it is continued on."""

import json
from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.record import template_time as clock
from sdpo_kernels.stepwise.score import score_run
from sdpo_kernels.stepwise.settings.run_file import dump_config, load_config
from tests.stepwise import runs
from tests.stepwise.test_check import checked

JUDGE = "tests.stepwise.sources.judges:good_words"
DATED = "{{ 'word' ~ strftime_now('%d') | int }} " + runs.CHAT
FIRST, LATER = datetime(2026, 11, 8, 23, 30), datetime(2026, 11, 9, 7, 0)


@pytest.fixture
def today(monkeypatch):
    """Set the machine's clock, as transformers and the driver read it; with None, reading it is an error."""

    def set_clock(now):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                assert now is not None, "the machine's clock was read"
                return now

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(clock, "datetime", Clock)

    return set_clock


@pytest.fixture(scope="module")
def dated_model(tmp_path_factory):
    folder = runs.make_model(tmp_path_factory.mktemp("dated") / "model")
    runs.make_tokenizer(chat_template=DATED).save_pretrained(folder)
    return folder


def conversation(row):
    chosen, rejected = ([{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected"))
    return {"prompt": [{"role": "user", "content": row["prompt"]}], "chosen": chosen, "rejected": rejected}


@pytest.fixture
def dated(tmp_path, dated_model):
    """Configs of one run on conversations, with evaluation pairs."""

    def configured(**settings):
        for number, size in enumerate((8, 8), 1):
            rows = [conversation(row) for row in runs.make_rows(size, seed=number)]
            runs.write_rows(tmp_path / f"data{number}.jsonl", rows)
        evaluation = runs.write_rows(tmp_path / "e.jsonl", [conversation(row) for row in runs.make_rows(5, seed=9)])
        settings = {"eval_data": str(evaluation)} | settings
        return runs.configured(tmp_path, dated_model, sizes=(8, 8), **settings)

    return configured


def manifest_of(config):
    return json.loads(open(f"{config.output_dir}/manifest.json").read())


def stopped(config, monkeypatch, stage="s2"):
    """Start the run, and stop it in this stage."""
    with monkeypatch.context() as patch:
        runs.stop_at(patch, stage=stage, step=1)
        with pytest.raises(KeyboardInterrupt):
            runs.train(config)
    return manifest_of(config)


def test_a_run_is_resumed_checked_and_scored_a_day_later(dated, today, monkeypatch, capsys):
    config = dated()
    today(FIRST)
    first = stopped(config, monkeypatch)
    assert first["template_time"] == "2026-11-08T23:30:00"
    assert first["config"]["template_time"] is None

    today(LATER)
    text = checked(config)
    assert "1 of 2 stages done" in text
    assert "clock      the chat template reads the date: 2026-11-08T23:30:00 throughout the run" in text
    done = runs.train(config)
    assert [s["data_hash"] for s in done["stages"]] == [s["data_hash"] for s in first["stages"]]
    assert done["template_time"] == first["template_time"]

    # the last stage, which was trained today, has the tokens of the first day too
    score_run(config, [], [], as_json=True)
    scores = list(json.loads(capsys.readouterr().out).values())
    kept = [done["initial_eval"], *(stage["eval"] for stage in done["stages"])]
    assert [s["pair_accuracy"] for s in scores] == [k["pair_accuracy"] for k in kept]
    assert [s["gamma"] for s in scores] == pytest.approx([k["gamma"] for k in kept], rel=1e-6)

    # without the fixed clock the tokens would be others
    assert prepare(config).stages[0].tokens.content_hash() != first["stages"][0]["data_hash"]
    assert prepare(config, FIRST).stages[0].tokens.content_hash() == first["stages"][0]["data_hash"]


def test_the_setting_gives_equal_runs_on_any_day(dated, today, tmp_path):
    hashes = []
    for day, folder in ((FIRST, "a"), (LATER, "b")):
        today(day)
        manifest = runs.train(dated(template_time="2026-11-05", output_dir=str(tmp_path / folder)))
        assert manifest["template_time"] == manifest["config"]["template_time"] == "2026-11-05T00:00:00"
        hashes.append([stage["data_hash"] for stage in manifest["stages"]])
    assert hashes[0] == hashes[1]
    assert runs.fingerprint(tmp_path / "a") == runs.fingerprint(tmp_path / "b")


def test_another_setting_is_another_run(dated, today):
    today(FIRST)
    runs.train(dated())
    for stops in (runs.train, checked):
        with pytest.raises(UserError, match="template_time: 2026-11-08T23:30:00 -> 2026-11-09T00:00:00"):
            stops(dated(template_time="2026-11-09"))


@pytest.mark.parametrize("stops", [False, True])
def test_a_run_of_an_earlier_version_resumes_with_the_date_of_its_creation(dated, today, monkeypatch, stops):
    config = dated()
    today(FIRST)
    first = stopped(config, monkeypatch) if stops else runs.train(config)
    created = FIRST.astimezone(clock.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    old = {key: value for key, value in first.items() if key != "template_time"} | {"created": created}
    old["config"] = {key: value for key, value in first["config"].items() if key != "template_time"}
    with open(f"{config.output_dir}/manifest.json", "w") as file:
        json.dump(old, file)

    today(LATER)
    assert "stages done" in checked(config)
    done = runs.train(config)
    assert [stage["state"] for stage in done["stages"]] == ["done", "done"]
    assert [s["data_hash"] for s in done["stages"]] == [s["data_hash"] for s in first["stages"]]


SOURCES = {
    "ranked": {"judge": JUDGE, "samples": 6},
    "discriminator": {"judge": JUDGE, "samples": 4, "budget": 4},
    "self_augmented": {"pairs": 8, "segment_tokens": 2},
    "active": {"judge": JUDGE, "samples": 3, "acquire": 3},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_generated_pairs_have_the_date_of_the_start_too(kind, dated, today, monkeypatch, tmp_path):
    """Prompts, samples, scored answers and the pairs of both stages."""
    words = "good1 good2 good3"
    rows = [{"prompt": [{"role": "user", "content": f"word{i} word{i}"}], "answer": words} for i in range(12)]
    prompts = runs.write_rows(tmp_path / "prompts.jsonl", rows)
    source = {"kind": kind, "max_new_tokens": 40} | SOURCES[kind]
    settings = {"stages": [{"name": name, "prompts": str(prompts), "source": source} for name in ("s1", "s2")]}
    settings |= {"policy": "initial", "reference": "initial"} if kind == "active" else {}

    today(FIRST)
    config = dated(**settings, eval_data=None)
    stopped(config, monkeypatch, stage="s1")

    # the machine's clock is not read again, by the driver or by a template
    today(None)
    runs.train(config)
    first, second = (tmp_path / "run" / f"stage-{i}-s{i}" / "pairs.jsonl" for i in (1, 2))
    assert first.read_text()
    assert second.read_text()


def test_the_setting_is_read_back_and_a_wrong_one_is_named(tmp_path, model):
    config = runs.configured(tmp_path, model, template_time="2026-11-28T10:00:00+01:00")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert clock.template_time(config) == datetime.fromisoformat("2026-11-28T10:00:00+01:00")
    for wrong in (2026, "tomorrow", True):
        with pytest.raises(
            UserError, match=rf"template_time: was {wrong!r}, must be a date such as 2026-11-28".lower()
        ):
            runs.configured(tmp_path, model, template_time=wrong)
