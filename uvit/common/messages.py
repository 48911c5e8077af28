"""Lines on standard error, above a progress bar that may be there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from uvit.common.errors import InputError, one_line


def notify(text: str) -> None:
    """Prints a line on standard error."""
    tqdm.write(text, file=sys.stderr)


def warn(text: str) -> None:
    """Prints a warning on standard error."""
    notify(f"warning: {text}")


@contextmanager
def warn_on_failure(what: str, errors: tuple[type[Exception], ...] = (OSError, InputError)) -> Iterator[None]:
    """Turns a failed write, such as on a full disk, into a warning: training can go on without it.

    Args:
        what: what is written.
        errors: what counts as such a failure.
    """
    try:
        yield
    except errors as error:
        warn(f"cannot write {what}, training goes on: {one_line(error)}")
