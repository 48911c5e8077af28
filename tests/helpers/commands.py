"""Commands, in this process and in others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from helpers.malicious import WORDS
from helpers.runs import ROOT

import uvit.__main__
from uvit.common.cli import run

COMMANDS = {name: import_module(f"uvit.commands.{name}").main for name in uvit.__main__.COMMANDS}
"""The main of each command."""
PROGRESS_BAR = re.compile(r"\s*|.*(image|eval)(/s)?\]")


def refused(
    name: str, arguments: str | list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> str:
    """Runs a command that must end with one line on standard error and exit status 2, and returns the line."""
    words = arguments.split() if isinstance(arguments, str) else [*map(str, arguments)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as exit:
        run(COMMANDS[name])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not PROGRESS_BAR.fullmatch(line)]
    assert WORDS not in printed.out
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, which finds the package wherever it runs."""
    environment = {"PYTHONPATH": str(ROOT), **os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
