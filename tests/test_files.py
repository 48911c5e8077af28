from __future__ import annotations

import pytest

from uvit.errors import InputError
from uvit.files import write_aside, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), write_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write to .*folder: Not a directory"),
        write_aside(tmp_path / "file" / "folder" / "grid.png"),
    ):
        pass
