from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field, replace

import pytest

from uvit.common.cli import command_line, parse, run
from uvit.common.errors import InputError, Interrupted, TrainingError
from uvit.common.files import atomic_write


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_nothing_half_written(signum, status, tmp_path, capsys):
    def stopped(arguments):
        with atomic_write(tmp_path / "file.txt") as aside:
            aside.write_text("half")
            os.kill(os.getpid(), signum)
            signal.pause()

    # A shell starts what it puts into the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as exit:
        run(stopped)
    signal.signal(signal.SIGINT, before)
    assert exit.value.code == status
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    """How fast."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    count: int = 1
    """How many."""
    flag: bool = False
    """Whether."""
    words: tuple[str, ...] = ()
    """Which."""
    inner: Inner = field(default_factory=Inner)


def test_options_replace_defaults():
    assert parse(Arguments, []) == Arguments()
    words = "--count 3 --flag True --words a b --inner.rate 1e-3".split()
    assert parse(Arguments, words) == Arguments(count=3, flag=True, words=("a", "b"), inner=Inner(rate=1e-3))
    default = Arguments(count=7, inner=Inner(rate=2.0))
    assert parse(Arguments, ["--flag", "True"], default=default) == replace(default, flag=True)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--cuont", "3"], ["--cuont", "did you mean --count?"]),
        (["--inner.rte", "3"], ["--inner.rte", "did you mean --inner.rate?"]),
        (["--count", "many"], ["--count", "'many'"]),
        (["--count"], ["--count"]),
        (["--zzz"], ["--zzz"]),
        (["stray"], ["stray"]),
    ],
)
def test_parse_errors_are_one_line(words, messages, capsys):
    with pytest.raises(InputError) as error:
        parse(Arguments, words)
    assert all(message in str(error.value) for message in messages), str(error.value)
    assert "\n" not in str(error.value) and "│" not in str(error.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("program", "shown"), [("/somewhere/draw.py", "draw.py"), ("python -m uvit draw", "python -m uvit draw")]
)
def test_help_names_the_program_its_operands_and_every_option(program, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as exit:
        parse(Arguments, ["--help"], "What it does.", "CONFIG")
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and printed.startswith(f"usage: {shown} CONFIG [")
    for text in ("What it does.", "--count", "How many.", "--inner.rate", "How fast."):
        assert text in printed


@pytest.mark.parametrize(
    ("program", "command"), [("train.py", "python sample.py"), ("python -m uvit train", "python -m uvit sample")]
)
def test_other_commands_are_named_in_the_way_this_one_was_called(program, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    assert command_line("sample") == command


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (InputError("two\nlines and \x1b"), 2, "error: two lines and \\x1b\n"),
        (TrainingError("it cannot go on"), 1, "error: it cannot go on\n"),
        (Interrupted(signal.SIGTERM, "at step 3"), 143, "stopped by SIGTERM at step 3\n"),
        (KeyboardInterrupt(), 130, "\nstopped by Ctrl-C\n"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_errors_and_signals_become_one_line_and_an_exit_status(error, status, printed, rank, monkeypatch, capsys):
    """What all processes have in common is printed by the first."""

    def fail(arguments):
        raise error

    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as exit:
        run(fail)
    assert exit.value.code == status
    shared = isinstance(error, (TrainingError, Interrupted))
    assert capsys.readouterr().err == ("" if shared and rank == "1" else printed)


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda arguments: 1 / 0)
