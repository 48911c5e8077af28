from __future__ import annotations

import os
import resource
import signal

import pytest
import torch

from uvit.common.errors import InputError
from uvit.common.files import (
    append_lines,
    atomic_folder,
    atomic_write,
    lock_folder,
    make_directory,
    remove_leftovers,
    write_text,
)
from uvit.config import WEIGHTS_FILE
from uvit.weights.tensors import write_weights


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_not_replaced_and_a_link_stays_one(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        write_text(tmp_path / "folder", "")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"


def test_files_have_the_users_mode(tmp_path):
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "private", "")
    finally:
        os.umask(before)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    for number in range(2):  # safetensors makes a file of its own, and replaces one
        write_text(tmp_path / "text", "")
        write_weights(tmp_path, {"weight": torch.full((2,), number)})
        assert (tmp_path / WEIGHTS_FILE).stat().st_mode == (tmp_path / "text").stat().st_mode


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write to .*file/folder: .*/file is not a folder"),
        atomic_write(tmp_path / "file" / "folder" / "grid.png"),
    ):
        pass
    with pytest.raises(InputError, match=r"cannot write to .*file: .*file is not a folder"):
        make_directory(tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


def test_lines_are_added_all_or_none(tmp_path):
    path = tmp_path / "lines.txt"
    append_lines(path, ["one", "two"])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # a disk with room for 20 bytes of a file
    try:
        with pytest.raises(OSError, match="File too large"):
            append_lines(path, ["three", "four" * 10])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert path.read_text() == "one\ntwo\n"


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    for name in (".step_1-77.png", ".step_2-78.png", ".other-77.png", "step_1.png"):
        (tmp_path / name).write_text("")
    (tmp_path / ".step_3-79").mkdir()
    remove_leftovers(tmp_path / "step_*.png")
    remove_leftovers(tmp_path / "step_*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other-77.png", "step_1.png"]


def test_a_lock_ends_with_its_process_even_if_a_child_lives_on(tmp_path):
    reading, writing = os.pipe()
    if not (holder := os.fork()):
        with lock_folder(tmp_path):
            if not (child := os.fork()):
                signal.pause()
            os.write(writing, child.to_bytes(4, "little"))
            signal.pause()
    child = int.from_bytes(os.read(reading, 4), "little")
    try:
        with (
            pytest.raises(InputError, match=f"is in use by process {holder} on .*: wait for it to end"),
            lock_folder(tmp_path),
        ):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with lock_folder(tmp_path):
            assert (tmp_path / ".lock").is_file()
        assert list(tmp_path.iterdir()) == []
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_cannot_be_locked(tmp_path):
    with (
        pytest.raises(InputError, match=r"cannot write to .*nowhere: No such file or directory"),
        lock_folder(tmp_path / "nowhere"),
    ):
        pass


def test_a_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(KeyError), atomic_folder(target) as temporary:
        (temporary / "part.txt").write_text("half")
        raise KeyError
    assert not list(target.parent.iterdir())
    for text in ("first", "second"):
        with atomic_folder(target, replace=text == "second") as temporary:
            (temporary / "file.txt").write_text(text)
            assert not (target / "file.txt").is_file() or (target / "file.txt").read_text() == "first"
        assert (target / "file.txt").read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    with (
        pytest.raises(InputError, match=r"cannot write to .*folder: Directory not empty"),
        atomic_folder(target) as new,
    ):
        (new / "file.txt").write_text("third")
    assert (target / "file.txt").read_text() == "second"
