from __future__ import annotations

import pytest
from tqdm import tqdm

from uvit.common.messages import notify, warn, warn_on_failure


def test_only_failed_writes_become_warnings(capsys):
    with warn_on_failure("file.txt"):
        raise OSError(28, "No space left on device")
    assert capsys.readouterr().err == (
        "warning: cannot write file.txt, training continues: [Errno 28] No space left on device\n"
    )
    with pytest.raises(ZeroDivisionError), warn_on_failure("file.txt"):
        raise ZeroDivisionError


def test_lines_go_above_a_progress_bar(capsys):
    with tqdm(total=2) as bar:
        bar.update()
        notify("a line")
        warn("another")
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "a line" in lines and "warning: another" in lines


def test_other_errors_can_become_warnings_too(capsys):
    with warn_on_failure("to a tracker", (ZeroDivisionError,)):
        raise ZeroDivisionError("two\nlines")
    assert capsys.readouterr().err == "warning: cannot write to a tracker, training continues: two lines\n"
    with pytest.raises(OSError, match="disk"), warn_on_failure("to a tracker", (ZeroDivisionError,)):
        raise OSError("disk")
