"""The exceptions that end a command with one line: `uvit.common.cli.run` turns them into exit statuses."""

from __future__ import annotations

import difflib
import re
import reprlib
import signal
from collections.abc import Iterable
from typing import Any

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal may act on, or cannot print: control characters, changes of direction, halves of a character."""


class InputError(ValueError):
    """A value from the user that cannot be used: says what was given and what was expected, in one line."""


class TrainingError(Exception):
    """A run that cannot go on, though nothing given was wrong: says why, and what is left of it, in one line."""


class Interrupted(Exception):
    """A command that a signal ended in good order.

    Args:
        signum: the signal.
        left: what was done before the end, for the user.
    """

    def __init__(self, signum: int, left: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {left}")
        self.signum = signum


class _Shortened(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlong, self.maxlevel = 60, 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to spell out longer ones.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"an integer of {x.bit_length()} bits"


def short_repr(value: Any) -> str:
    """Returns `repr(value)`, shortened where it is long or nested deeply: what a message shows of a value."""
    return _Shortened().repr(value)


def one_line(error: BaseException | str, limit: int | None = None) -> str:
    """Returns an exception's text in one line.

    Args:
        error: the exception, or its text.
        limit: characters to keep; None keeps all.
    """
    return " ".join(str(error).split())[:limit]


def missing_package(what: str, package: str) -> InputError:
    """Returns the error of a package that is not installed.

    Args:
        what: what needs it, such as `ONNX`.
        package: its name, as pip installs it.
    """
    return InputError(f"{what} needs the package {package}, which is not installed: pip install {package}")


def printable(text: str) -> str:
    r"""Spells out what a terminal may act on, such as `\x1b`: for text that comes from data or a checkpoint."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Returns `, did you mean 'NAME'?` for the nearest known name, or an empty string where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
