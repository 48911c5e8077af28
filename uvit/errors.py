"""The exceptions that end a command with one line: `uvit.cli.run` turns them into exit statuses."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


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


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Returns `, did you mean 'NAME'?` for the nearest known name, or an empty string where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
