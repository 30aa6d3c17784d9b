"""Atomic file operations: what is left when writing fails or the process dies half-way."""

import json
import os

import pytest

from sdpo_kernels.stepwise.common import files
from sdpo_kernels.stepwise.common.errors import UserError


def test_replace_file_leaves_the_new_content_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"one", b"", b"two"):
        files.replace_file(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.replace_file(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.json: No space left on device"):
        files.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_content_is_synced_before_the_rename(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("rename"), replace(*a))[1])
    files.replace_file(tmp_path / "a", b"x")
    assert order == ["fsync", "rename", "fsync"]  # file, name, folder


def test_a_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        files.replace_file(tmp_path / "no" / "a", b"x")


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "a.json"
    value = {"β": [1, None, 0.1], "text": "γ\n"}
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert json.loads(path.read_text()) == value
    path.write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*a\.json"):
        files.read_json(path)
    with pytest.raises(UserError, match=r"cannot read .*b\.json"):
        files.read_json(tmp_path / "b.json")


def test_publish_folder_syncs_every_file_before_the_rename(tmp_path, monkeypatch):
    staging = tmp_path / ".staging"
    (staging / "sub").mkdir(parents=True)
    (staging / "a").write_text("a")
    (staging / "sub" / "b").write_text("b")

    order = []
    sync, rename = files.sync, os.rename
    monkeypatch.setattr(files, "sync", lambda p: (order.append(p.name), sync(p))[1])
    monkeypatch.setattr(os, "rename", lambda *a: (order.append("rename"), rename(*a))[1])
    files.publish_folder(staging, tmp_path / "final")

    # the rename must not survive a crash that the content does not
    assert sorted(order[: order.index("rename")]) == [".staging", "a", "b", "sub"]
    assert order[order.index("rename") + 1 :] == [tmp_path.name]
    assert (tmp_path / "final" / "sub" / "b").read_text() == "b"
    assert not staging.exists()


def test_publish_folder_never_overwrites(tmp_path):
    for name in ("staging", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        files.publish_folder(tmp_path / "staging", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "final"


def test_remove_folder_renames_before_it_deletes(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "file").write_text("x")

    def dies(path, *_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            files.remove_folder(folder)

    assert not folder.exists()
    assert len(os.listdir(tmp_path)) == 1
    files.remove_folder(folder)  # a second call removes what the first one left
    assert os.listdir(tmp_path) == []


def test_remove_folder_and_empty_folder(tmp_path):
    folder = tmp_path / ".work"
    files.remove_folder(folder)
    for _ in range(2):
        assert files.empty_folder(folder) == folder
        assert os.listdir(folder) == []
        (folder / "file").write_text("x")
    files.remove_folder(folder)
    assert os.listdir(tmp_path) == []
