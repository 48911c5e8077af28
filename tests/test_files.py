from __future__ import annotations

import os

import pytest

from uvit.errors import InputError
from uvit.files import make_directory, write_aside, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), write_aside(path) as aside:
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


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write to .*file/folder: .*/file is not a folder"),
        write_aside(tmp_path / "file" / "folder" / "grid.png"),
    ):
        pass
    with pytest.raises(InputError, match=r"cannot write to .*file: .*file is not a folder"):
        make_directory(tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""
