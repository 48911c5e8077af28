"""Messages, and the table of them in docs/errors.md."""

from __future__ import annotations

import ast
import re
import signal
from pathlib import Path

import pytest

from uvit.common.errors import InputError, Interrupted, did_you_mean, missing_package, one_line, printable, short_repr

ROOT = Path(__file__).parent.parent
TABLES = (ROOT / "docs/errors.md").read_text().splitlines()
ROWS = [line for line in TABLES if line.startswith("| ") and not line.startswith("| what went wrong |")]
CODE = [*ROOT.glob("*.py"), *ROOT.glob("uvit/**/*.py")]


def literals() -> list[str]:
    """Every string of the code, with … for what an f-string fills in."""
    found = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


LITERALS = literals()


def test_the_table_has_many_messages():
    assert len(ROWS) >= 40


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_messages_of_the_table_are_in_the_code(row):
    """What stands between the … of a message stands in a string of the code."""
    _, wrong, printed, advice, _ = row.split("|")
    assert wrong.strip()
    assert advice.strip()
    fragments = [part for message in re.findall(r"`(.*?)`", printed) for part in message.split("…") if len(part) > 2]
    assert fragments
    for fragment in fragments:
        assert any(fragment in literal for literal in LITERALS), fragment


def test_values_in_messages_are_short_and_printable():
    assert short_repr("fast") == "'fast'" and short_repr((32, 33)) == "(32, 33)"
    assert len(short_repr("x" * 10**6)) < 120 and len(short_repr(10**1000)) < 80
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    assert len(short_repr(nested)) < 50
    assert printable("a\x1b[31m\u202eb é 漢") == r"a\x1b[31m\u202eb é 漢"


def test_one_line_joins_the_lines_of_an_exception():
    assert one_line(ValueError("two\n  lines\tand  more")) == "two lines and more"
    assert one_line("  as it is ") == "as it is"
    assert one_line("a\nlong text", limit=6) == "a long"
    assert one_line(ValueError()) == ""


def test_a_missing_package_says_how_to_install_it():
    error = missing_package("ONNX", "onnxruntime")
    assert isinstance(error, InputError)
    assert str(error) == "ONNX needs the package onnxruntime, which is not installed: pip install onnxruntime"


def test_the_nearest_name_is_suggested():
    assert did_you_mean("tain", ["train", "sample"]) == ", did you mean 'train'?"
    assert did_you_mean("zzz", ["train", "sample"]) == did_you_mean("train", []) == ""


def test_an_interruption_names_its_signal():
    end = Interrupted(signal.SIGTERM, "at step 3, saved")
    assert end.signum == signal.SIGTERM and str(end) == "stopped by SIGTERM at step 3, saved"
