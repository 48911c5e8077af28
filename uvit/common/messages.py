"""Prints lines without breaking a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from uvit.common.errors import InputError, one_line


def notify(text: str) -> None:
    """Prints a line on standard error."""
    tqdm.write(text, file=sys.stderr)


def tell(text: str) -> None:
    """Prints a line on standard output: standard error has nothing but the error where a command fails."""
    tqdm.write(text)


def warn(text: str) -> None:
    """Prints a warning on standard error."""
    notify(f"warning: {text}")


@contextmanager
def warn_on_failure(what: str, errors: tuple[type[Exception], ...] = (OSError, InputError)) -> Iterator[None]:
    """Turns a failed write, for example on a full disk, into a warning, so that training continues.

    Args:
        what: what is written.
        errors: exceptions that count as a failed write.
    """
    try:
        yield
    except errors as error:
        warn(f"cannot write {what}, training continues: {one_line(error)}")
