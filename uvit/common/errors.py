"""The exceptions that end a command, which `uvit.common.cli.run` turns into exit statuses, and text for messages."""

from __future__ import annotations

import difflib
import re
import reprlib
import signal
from collections.abc import Iterable
from typing import Any

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal may act on, or cannot print: control characters, text direction overrides, lone surrogates."""


class InputError(ValueError):
    """An invalid value from the user: says in one line what was given and what was expected."""


class TrainingError(Exception):
    """A run that cannot continue, through no fault of its input: says in one line why, and what was saved."""


class Interrupted(Exception):
    """A command that a signal stopped cleanly.

    Args:
        signum: the signal.
        outcome: where it stopped and what was saved, for the user.
    """

    def __init__(self, signum: int, outcome: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} {outcome}")
        self.signum = signum


class _Shortened(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlong, self.maxlevel = 60, 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to convert longer ones to text.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"an integer of {x.bit_length()} bits"


def short_repr(value: Any) -> str:
    """Returns `repr(value)` for a message, shortened where it is long or deeply nested."""
    return _Shortened().repr(value)


def one_line(error: BaseException | str, limit: int | None = None) -> str:
    """Returns an exception's text as one line.

    Args:
        error: the exception, or its text.
        limit: maximum number of characters; None keeps all.
    """
    return " ".join(str(error).split())[:limit]


def missing_package(what: str, package: str) -> InputError:
    """Returns the error for a package that is not installed.

    Args:
        what: what needs it, such as `ONNX`.
        package: its name for pip.
    """
    return InputError(f"{what} needs the package {package}, which is not installed: pip install {package}")


def printable(text: str) -> str:
    r"""Escapes what a terminal may act on, as `\x1b`: for text that comes from data or a checkpoint."""
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Returns `, did you mean 'NAME'?` for the closest known name, or an empty string where none is close."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
