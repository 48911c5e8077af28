from __future__ import annotations

import pytest

from uvit.common.messages import warn_on_failure


def test_only_failed_writes_become_warnings(capsys):
    with warn_on_failure("file.txt"):
        raise OSError(28, "No space left on device")
    assert capsys.readouterr().err == (
        "warning: cannot write file.txt, training continues: [Errno 28] No space left on device\n"
    )
    with pytest.raises(ZeroDivisionError), warn_on_failure("file.txt"):
        raise ZeroDivisionError
