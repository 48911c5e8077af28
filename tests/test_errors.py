"""Messages, and the table of them in docs/errors.md."""

from __future__ import annotations

import ast
import re
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from uvit.common.errors import InputError, Interrupted, did_you_mean, missing_package, one_line, printable, short_repr

ROOT = Path(__file__).parent.parent
TABLES = (ROOT / "docs/errors.md").read_text().splitlines()
ROWS = [line for line in TABLES if line.startswith("| ") and not line.startswith("| what went wrong |")]
CODE = [*ROOT.glob("*.py"), *ROOT.glob("uvit/**/*.py")]


def text_of(node: ast.AST, known: Mapping[str, str]) -> str:
    """The text of an expression, with … for what is filled in, unless that is a name for text in the same function."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part, known) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name):
            return known.get(name, "…")
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left, known) + text_of(right, known)
        case ast.Call(func=ast.Attribute(attr="_require"), args=[_, _, expected]):  # of a section of the config
            return f"… must be {text_of(expected, known)}, got …"
    return "…"


def messages() -> set[str]:
    """Every text of the code, each whole."""
    found = set()
    for path in CODE:
        tree = ast.parse(path.read_text())
        for scope in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]:
            known: dict[str, str] = {}
            for node in ast.walk(scope):
                match node:
                    case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant() | ast.JoinedStr() as value):
                        known[name] = text_of(value, known)
            expressions = [node.value for node in ast.walk(scope) if isinstance(node, ast.Expr)]
            docstrings = [value for value in expressions if isinstance(value, ast.Constant)]
            found |= {text_of(node, known) for node in ast.walk(scope) if node not in docstrings}
    return found


MESSAGES = messages()


def is_printed(message: str) -> bool:
    """Whether a message of the table, or all of it but its ends, is in a text of the code, to the letter."""
    return any(message.strip("… ") in text for text in MESSAGES)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_messages_of_the_table_are_those_of_the_code(row):
    _, wrong, printed, advice, _ = row.split("|")
    assert wrong.strip() and advice.strip()
    given = [message.strip("`").removeprefix("warning: ") for message in re.findall(r"``.*?``|`.*?`", printed)]
    assert given
    for message in given:
        assert sum(letter.isalpha() for letter in message) >= 8 and is_printed(message), message


@pytest.mark.parametrize(
    "message",
    [
        "image … of the data … cannot be read: …",
        "cannot write …: …",
        "must be below … in size, got … or more",
        "… is not a complete chekpoint",
        "step … could not be saved (…): skipped",
    ],
)
def test_other_messages_are_not(message):
    assert not is_printed(message)


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
