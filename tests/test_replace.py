"""A file or a folder is put in place whole, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from a3po_megatron.errors import RequestError, RunFailed
from a3po_megatron.files.replace import move, partial_of, partials, replacing, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: BaseException) -> None:
    path.write_text("half")
    raise error


@pytest.mark.parametrize("synced", [False, True])
def test_the_old_file_stands_until_the_new_one_is_whole(synced: bool, tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_whole(path, "old", synced)
    with replacing(path, synced) as partial:
        partial.write_text("n")
        assert path.read_text() == "old"
        assert partials(tmp_path) == [partial]
        partial.write_text("new: ü")
    assert (names(tmp_path), path.read_bytes()) == (["latest"], "new: ü".encode())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")
    with pytest.raises(type(error)), replacing(tmp_path / "a") as partial:
        write_half(partial, error)
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "old")


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    partial_of(tmp_path / "a").write_text("a long rest of before")
    write_whole(tmp_path / "a", "new")
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "new")


def test_two_that_write_the_same_file_at_once_do_not_mix(tmp_path: Path) -> None:
    with replacing(tmp_path / "a", by="rank-0") as one, replacing(tmp_path / "a", by="rank-1") as other:
        one.write_text("one")
        other.write_text("other")
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "one")  # who ends last


def test_bytes_that_must_outlive_the_machine_are_on_the_disk_before_they_have_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("sync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths))[1])
    write_whole(tmp_path / "a", "x", synced=True)
    assert calls == ["sync", "rename"]
    write_whole(tmp_path / "a", "x")
    assert calls == ["sync", "rename", "rename"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new"
    for error, raised in ((OSError(errno.EIO, "Input/output error"), RunFailed), (RequestError("no"), RequestError)):
        with pytest.raises(raised), whole_folder(target) as partial:
            write_half(partial / "a", error)
        assert names(tmp_path) == []
    with whole_folder(target) as partial:
        (partial / "a").write_text("x")
        assert not target.exists()
        with pytest.raises(RequestError, match="another process is writing this folder"), whole_folder(target):
            pass
    assert (names(tmp_path), names(target)) == (["new"], ["a"])
    with pytest.raises(RequestError, match="is not an empty folder"), whole_folder(target):
        pass


def test_a_name_that_is_taken_is_given_to_what_moves_there(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of-{name}").touch()
        (tmp_path / f"{name}.txt").write_text(name)
    move(tmp_path / "new", tmp_path / "old")
    move(tmp_path / "new.txt", tmp_path / "old.txt")
    assert names(tmp_path) == ["old", "old.txt"]
    assert (names(tmp_path / "old"), (tmp_path / "old.txt").read_text()) == (["of-new"], "new")
