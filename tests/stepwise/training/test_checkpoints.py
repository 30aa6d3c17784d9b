"""Which checkpoint counts: the newest complete one; incomplete ones are removed."""

import json
import os

import pytest

from sdpo_kernels.stepwise.training.checkpoints import LISTING, SAVING, is_complete, latest_checkpoint, write_listing

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def checkpoint(folder, step, listed=True):
    path = folder / f"checkpoint-{step}"
    (path / "sub").mkdir(parents=True)
    for name in (*FILES, "sub/more.bin"):
        (path / name).write_bytes(os.urandom(64))
    if listed:
        write_listing(path)
    return path


def test_the_newest_complete_one_by_number_not_by_name(tmp_path):
    for step in (9, 10, 2):
        checkpoint(tmp_path, step)
    assert latest_checkpoint(tmp_path).name == "checkpoint-10"


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", [*FILES, "sub/more.bin"])
def test_a_missing_or_short_file_makes_it_incomplete(tmp_path, name):
    path = checkpoint(tmp_path, 3)
    assert is_complete(path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    assert not is_complete(path)
    (path / name).unlink()
    assert not is_complete(path)


@pytest.mark.parametrize("damage", ["unlisted", "half listing", "no optimizer"])
def test_incomplete_ones_are_removed_and_the_previous_one_is_used(tmp_path, damage):
    good, bad = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8, listed=damage != "unlisted")
    if damage == "half listing":
        (bad / LISTING).write_text((bad / LISTING).read_text()[:20])
    if damage == "no optimizer":
        (bad / "optimizer.pt").unlink()
    assert latest_checkpoint(tmp_path) == good
    assert not bad.exists()


def test_leftovers_of_a_kill_are_removed(tmp_path):
    good = checkpoint(tmp_path, 4)
    checkpoint(tmp_path / SAVING, 8)
    (tmp_path / ".checkpoint-3.removing").mkdir()
    (tmp_path / "checkpoint-5x").mkdir()
    assert latest_checkpoint(tmp_path) == good
    assert os.listdir(tmp_path) == ["checkpoint-4"]


def test_the_listing_is_not_listed_and_names_every_file(tmp_path):
    path = checkpoint(tmp_path, 1)
    assert set(json.loads((path / LISTING).read_text())) == {*FILES, "sub/more.bin"}
