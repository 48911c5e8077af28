"""`python -m uvit`: the table of commands."""

from __future__ import annotations

import sys

import pytest
from helpers.commands import COMMANDS, run_python

import uvit.__main__
from uvit.common.cli import run

NAMES = "train, sample, evaluate, encode, app, average, convert, export, push, card"


def test_help_lists_the_commands(capsys):
    uvit.__main__.main(["--help"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*COMMANDS] == NAMES.split(", ")
    assert all(len(line.split()) > 2 for line in lines)
    assert last == "python -m uvit COMMAND --help lists the options of each."


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_of_its_own(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["uvit"])
    with pytest.raises(SystemExit) as exit:
        uvit.__main__.main([name, "--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0
    assert printed.startswith(f"usage: python -m uvit {name} ") and len(printed.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], "nothing"),
        (["dance"], "'dance'"),
        (["trian", "configs/digits.py"], "'trian', did you mean 'train'?"),
        (["--halp"], "'--halp'"),
    ],
)
def test_an_unknown_command_is_one_line_and_exit_2(arguments, given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["uvit", *arguments])
    with pytest.raises(SystemExit) as exit:
        run(uvit.__main__.main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: the first argument must be one of {NAMES}, got {given}\n"


def test_commands_run_from_any_folder(tmp_path):
    result = run_python("-m", "uvit", "sample", "--checkpoint", "nowhere", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: checkpoint not found: nowhere\n"
