"""The one exception for what a user got wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A value from the user that cannot be used: says what was given and what was expected, in one line."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Returns `, did you mean 'NAME'?` for the nearest known name, or an empty string where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
