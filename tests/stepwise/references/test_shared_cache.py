"""`reference_cache`: a second run on the same model and pairs scores nothing, and nothing wrong is ever read."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from sdpo_kernels.stepwise.check import check_run
from sdpo_kernels.stepwise.common.errors import UserError
from sdpo_kernels.stepwise.common.files import replace_file
from sdpo_kernels.stepwise.models.load import Loaded, add_adapter
from sdpo_kernels.stepwise.prepare import prepare
from sdpo_kernels.stepwise.references.cache import write_scores
from sdpo_kernels.stepwise.references.scorer import Scorer
from sdpo_kernels.stepwise.references.shared_cache import SharedEntry, made_by
from sdpo_kernels.stepwise.run import run
from sdpo_kernels.stepwise.settings.lora import LoraSettings
from sdpo_kernels.stepwise.settings.trainer_arguments import training_arguments
from tests.stepwise import runs
from tests.stepwise.ranks_of_a_run import Ranks
from tests.stepwise.runs import Child, die

SCORES = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.5]])
ALL = np.arange(3)


@pytest.fixture
def scored(monkeypatch) -> list[str]:
    """What `Scorer.score` is called for: the label and the number of pairs."""
    calls: list[str] = []
    genuine = Scorer.score

    def score(self, loaded, tokens, label):
        calls.append(f"{label}: {len(tokens)}")
        return genuine(self, loaded, tokens, label)

    monkeypatch.setattr(Scorer, "score", score)
    return calls


def settings(folder: Path, model: Path, **more) -> Path:
    """A run of two stages with ranked order and evaluation; its cache is folder/cache."""
    evaluation = folder / "eval.jsonl"
    if not evaluation.exists():
        runs.write_rows(evaluation, runs.make_rows(5, seed=9))
    given = {"reference_cache": str(folder / "cache"), "eval_data": str(evaluation), "order": "pair_accuracy"}
    return runs.write_settings(folder, model, **given | more)


def again(folder: Path, model: Path, name: str, **more):
    """Train the same in another output_dir; its folder and what it says."""
    config = runs.load_config(settings(folder, model, output_dir=str(folder / name), **more))
    spoken = runs.Spoken(folder)
    before = len(spoken.text)
    run(config, spoken.reporter)
    return Path(config.output_dir), spoken.text[before:]


# ---- runs ----


def test_a_second_run_scores_nothing_and_trains_the_same(tmp_path, model, scored):
    without, _ = again(tmp_path, model, "without", reference_cache=None)
    assert not (tmp_path / "cache").exists()

    wanted = scored.copy()
    scored.clear()
    first, said = again(tmp_path, model, "first")
    assert scored == [label for label in wanted if label != "stage 1 of 2 s1: references: 12"]  # ranked by it before

    scored.clear()
    second, said = again(tmp_path, model, "second")
    assert scored == []
    assert f"references: read 16 log-probs of 8 pairs from {tmp_path / 'cache'}/" in said
    assert "evaluation: read 10 log-probs of 5 pairs from" in said
    assert "ranking by the initial model: read 24 log-probs of 12 pairs from" in said
    assert runs.fingerprint(second) == runs.fingerprint(first) == runs.fingerprint(without)
    assert not list((tmp_path / "cache").glob(".*"))


def test_another_learning_rate_beta_or_loss_reads_the_first_references(tmp_path, model, scored):
    again(tmp_path, model, "first")
    scored.clear()
    again(tmp_path, model, "second", beta=0.3, loss="hinge", trainer={"learning_rate": 1e-3, "seed": 5})
    assert [label.rpartition(":")[0] for label in scored] == [
        "stage 1 of 2 s1: evaluation", "stage 2 of 2 s2: references", "stage 2 of 2 s2: evaluation",
    ]  # fmt: skip


CHANGES = {
    "another pair": {},
    "another model": {},
    "bf16": {"trainer": {"bf16": True}},
    "a bfloat16 base": {"dtype": "bfloat16", "lora": {}},
    "max_length": {"max_length": 900},
    "padded": {"batching": "padded"},
    "two prompts": {"prefix_sharing": "off"},
    "ld_alpha": {"loss": "ld_dpo", "loss_options": {"ld_alpha": 0.5}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_numbers_is_scored_anew(tmp_path, model, scored, change):
    again(tmp_path, model, "first", eval_data=None, order="given")
    wanted = scored.copy()
    assert len(wanted) == 2
    scored.clear()

    if change == "another pair":
        for number in (1, 2):
            data = tmp_path / f"data{number}.jsonl"
            data.write_text(data.read_text().replace("good", "bad", 1))
    other = runs.make_model(tmp_path / "other", seed=1) if change == "another model" else model
    again(tmp_path, other, "second", eval_data=None, order="given", **CHANGES[change])
    assert scored == wanted


def test_every_one_of_several_references_is_read(tmp_path, model, scored):
    others = [str(runs.make_model(tmp_path / f"m{seed}", seed=seed)) for seed in (1, 2)]
    more = {"reference": "multi", "multi": {"models": others}, "order": "given"}
    first, _ = again(tmp_path, model, "first", **more)
    assert any("multi.models.1" in label for label in scored)
    scored.clear()
    second, _ = again(tmp_path, model, "second", **more)
    assert scored == []
    assert runs.fingerprint(second) == runs.fingerprint(first)


def test_a_run_that_needs_more_pairs_scores_only_those(tmp_path, model, scored):
    few = {"order": "given", "eval_data": None, "trainer": {"max_steps": 1}}
    again(tmp_path, model, "few", **few)
    assert scored[0] == "stage 1 of 2 s1: references: 4"
    scored.clear()
    _, said = again(tmp_path, model, "all", order="given", eval_data=None)
    assert "stage 1 of 2 s1: references: read 8 log-probs of 4 pairs from" in said
    assert scored[0] == "stage 1 of 2 s1: references: 8"

    # and what it scored has been added
    scored.clear()
    again(tmp_path, model, "third", order="given", eval_data=None)
    assert scored == []


def test_a_damaged_entry_is_scored_anew_with_a_warning(tmp_path, model, scored, caplog):
    first, _ = again(tmp_path, model, "first")
    scored.clear()
    for path in (tmp_path / "cache").iterdir():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # the last bit of a log-prob: finite, and wrong
        path.write_bytes(content)
    second, _ = again(tmp_path, model, "second")
    assert len(scored) == 6
    assert "is not what was written under this name; it is scored anew" in caplog.text
    assert runs.fingerprint(second) == runs.fingerprint(first)

    scored.clear()
    again(tmp_path, model, "third")
    assert scored == []


def dies_while_writing(call: int) -> None:
    """Die before the `call`-th file of the cache gets its name."""
    genuine, count = os.replace, 0

    def replace(source, target):
        nonlocal count
        count += Path(target).parent.name == "cache"
        if count == call:
            die()
        genuine(source, target)

    os.replace = replace


def test_a_killed_run_leaves_nothing_broken(tmp_path, model, scored, caplog):
    yaml = settings(tmp_path, model)
    command = ("train", yaml, f"output_dir={tmp_path / 'run'}", "--quiet")
    child = Child(tmp_path, *command, fault=dies_while_writing, options=[3])
    assert child.wait() == -signal.SIGKILL, child.text
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2
    assert len(list((tmp_path / "cache").glob(".*.tmp"))) == 1

    # another run takes the two that are whole, and the killed one goes on
    other, _ = again(tmp_path, model, "other")
    assert len(scored) == 4
    child = Child(tmp_path, *command)
    assert child.wait() == 0, child.text
    assert "anew" not in caplog.text + child.text
    assert runs.fingerprint(tmp_path / "run") == runs.fingerprint(other)


def test_two_runs_at_once_and_one_on_two_ranks_share_a_folder(tmp_path, model, scored):
    yaml = settings(tmp_path, model, trainer={"per_device_train_batch_size": 2})
    both = [Child(tmp_path, "train", yaml, "--quiet", f"output_dir={tmp_path / name}") for name in "ab"]
    assert [child.wait() for child in both] == [0, 0], [child.text for child in both]
    assert runs.fingerprint(tmp_path / "a") == runs.fingerprint(tmp_path / "b")
    again(tmp_path, model, "c", trainer={"per_device_train_batch_size": 2})
    assert scored == []

    # rank 0 reads for both: their first references are those of one process
    ranks = Ranks(tmp_path, "train", yaml, f"output_dir={tmp_path / 'two'}")
    assert ranks.wait() == [0, 0], ranks.text
    assert "ranking by the initial model: read 24 log-probs of 12 pairs" in ranks.text
    name = "stage-1-s1/reference_logps.safetensors"
    mine, theirs = (load_file(tmp_path / run / name) for run in ("two", "a"))
    assert all(mine[key].equal(theirs[key]) for key in theirs)


def test_two_ranks_write_what_one_process_reads(tmp_path, model, scored):
    yaml = settings(tmp_path, model, order="given", eval_data=None)
    ranks = Ranks(tmp_path, "train", yaml)
    assert ranks.wait() == [0, 0], ranks.text
    again(tmp_path, model, "one", order="given", eval_data=None)
    assert scored == ["stage 2 of 2 s2: references: 8"]  # of a model that two ranks have trained, rounded otherwise


# ---- entries ----


def entry(folder: Path, key: str = "key", **more) -> SharedEntry:
    return SharedEntry.of(folder, key, more, lambda text: None)


def test_an_entry_gives_what_was_added(tmp_path):
    said: list[str] = []
    ours = SharedEntry.of(tmp_path / "new" / "cache", "key", {}, said.append)
    scores = torch.full((3, 2), torch.nan)
    assert ours.fill(scores, ALL).tolist() == [0, 1, 2]

    ours.add(SCORES, np.array([1]))
    assert ours.fill(scores, ALL).tolist() == [0, 2]
    assert scores[1].equal(SCORES[1])
    ours.add(SCORES, np.array([0, 2]))
    assert ours.fill(scores, np.array([0, 2])).tolist() == []
    assert scores.equal(SCORES)
    assert said == [f"read 2 log-probs of 1 pair from {ours.path}", f"read 4 log-probs of 2 pairs from {ours.path}"]


def renamed(path: Path) -> None:
    other = entry(path.parent, "other")
    other.add(SCORES, ALL)
    shutil.move(other.path, path)


DAMAGE = {
    "cannot be read": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "cannot be read (": lambda path: path.write_bytes(b""),
    "is not what was written": renamed,
    "under this name": lambda path: write_scores(path, SCORES, "key"),
    "does not hold 3 pairs": lambda path: write_scores(path, SCORES[:2], "key"),
    "does not hold": lambda path: path.write_bytes(save({"chosen": SCORES.double(), "rejected": SCORES})),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_file_that_is_not_whole_or_not_its_own_is_never_taken(tmp_path, caplog, reason):
    ours = entry(tmp_path)
    ours.add(SCORES - 9, ALL)
    DAMAGE[reason](ours.path)
    scores = torch.full((3, 2), torch.nan)
    assert ours.fill(scores, ALL).tolist() == [0, 1, 2]
    assert scores.isnan().all()
    assert reason in caplog.text
    ours.add(SCORES, ALL)
    assert ours.read(3).equal(SCORES)


def test_many_writers_never_show_a_half_written_entry(tmp_path, caplog):
    found: list[torch.Tensor | None] = []

    def write(row: int) -> None:
        for _ in range(30):
            ours = entry(tmp_path)
            ours.add(SCORES, np.array([row]))
            found.append(ours.read(3))

    threads = [threading.Thread(target=write, args=[row]) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caplog.text == ""
    assert len(found) == 90
    for scores in found:
        assert scores is not None
        assert scores[~scores.isnan()].equal(SCORES[~scores.isnan()])
    assert [path.name for path in tmp_path.iterdir()] == [entry(tmp_path).path.name]


def test_the_key_has_the_adapters_scale_the_machine_and_the_batches(tmp_path, model, monkeypatch):
    """They are in no weight and in no setting of the run's own key."""
    config = runs.configured(tmp_path, model, lora={"r": 2})
    args = training_arguments(config, config.stages[0], tmp_path, tmp_path)
    scorer = Scorer.of(config, args, 0, runs.Spoken(tmp_path).reporter)

    def path(batches: int = 1, **lora) -> Path:
        loaded = scorer.load(str(model))
        loaded.by_sequence = by_sequence
        if lora:
            add_adapter(loaded, LoraSettings(**lora))
        return entry(tmp_path, **made_by(loaded, config, torch.device("cpu"), batches)).path

    by_sequence = True
    plain, adapted = path(), path(r=2, target_modules=("q_proj", "v_proj"))
    assert path() == plain == path(batches=2)
    assert adapted == path(r=2, target_modules=("v_proj", "q_proj"))
    found = [plain, adapted, path(r=2, alpha=7, target_modules=("q_proj", "v_proj"))]

    by_sequence = False
    found += [path(), path(batches=2)]
    by_sequence = True
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found.append(path())
    monkeypatch.undo()
    monkeypatch.setenv("SDPO_BACKEND", "eager")
    found.append(path())
    assert len(set(found)) == len(found)


def test_the_key_has_the_code_that_comes_with_a_model(tmp_path, model, monkeypatch):
    config = runs.configured(tmp_path, model, trust_remote_code=True)

    class Own(torch.nn.Module):
        __module__ = "transformers_modules.own.modeling"

    def code() -> object:
        return made_by(Loaded(Own(), packed=True, by_sequence=True), config, torch.device("cpu"), None)["code"]

    module = types.ModuleType(Own.__module__)
    module.__file__ = str(tmp_path / "modeling.py")
    monkeypatch.setitem(sys.modules, Own.__module__, module)
    (tmp_path / "modeling.py").write_text("import layers")
    (tmp_path / "layers.py").write_text("x = 1")
    first = code()
    assert len(first) == 2
    (tmp_path / "layers.py").write_text("x = 2")
    assert first != code()


# ---- settings ----


def test_the_folder_is_absolute(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = runs.configured(tmp_path, model, reference_cache="~/cache")
    assert config.reference_cache == str(tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path, model):
    replace_file(tmp_path / "file", b"")
    config = runs.configured(tmp_path, model, reference_cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"reference_cache: was '.*cache', must be a folder; .*file is a file"):
        prepare(config)


def test_check_says_what_the_folder_has_and_makes_none(tmp_path, model, spoken):
    config = runs.configured(tmp_path, model, reference_cache=str(tmp_path / "cache"))
    check_run(config, spoken.reporter)
    assert f"cache      {tmp_path / 'cache'} (empty)" in spoken.text
    assert not (tmp_path / "cache").exists()

    entry(tmp_path / "cache").add(SCORES, ALL)
    check_run(config, spoken.reporter)
    assert "cache (1 set of log-probs, 0.0 MiB)" in spoken.text


def test_the_setting_may_change_between_two_invocations(tmp_path, model, scored):
    run_folder, _ = again(tmp_path, model, "first", reference_cache=None)
    scored.clear()
    _, said = again(tmp_path, model, "first", reference_cache=str(tmp_path / "elsewhere"))
    assert f"nothing to do: all 2 stages in {run_folder} are done" in said
    assert scored == []
