from __future__ import annotations

import os
import signal
import sys

import pytest
from helpers.commands import run_python
from helpers.runs import ROOT

from uvit.common.cli import run
from uvit.common.files import atomic_write


def test_a_shell_sees_one_line_and_exit_2(tmp_path):
    result = run_python(str(ROOT / "sample.py"), "--checkpoint", "nowhere", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: checkpoint not found: nowhere\n"


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_nothing_half_written(signum, status, tmp_path, monkeypatch, capsys):
    def stopped(arguments):
        with atomic_write(tmp_path / "file.txt") as aside:
            aside.write_text("half")
            os.kill(os.getpid(), signum)
            signal.pause()

    # A shell starts what it puts into the background with SIGINT ignored.
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "argv", ["stopped"])
    with pytest.raises(SystemExit) as exit:
        run(stopped)
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])
    assert exit.value.code == status
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err
