"""Files that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from uvit.errors import InputError, printable


def make_directory(path: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None


@contextlib.contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it takes its place once the block has ended without an error.

    Raises:
        InputError: the file cannot be made, written or put in its place.
    """
    make_directory(path.parent)
    if os.path.isdir(path):
        raise InputError(f"cannot write to {path}: it is a folder")
    target = path.resolve()  # a link stays a link
    # The suffix stays last: savers such as Pillow's choose the format by it.
    aside = target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")
    try:
        aside.touch()
        yield aside
        aside.replace(target)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def add_lines(path: Path, lines: Iterable[str]) -> list[str]:
    """Adds lines to a text file that it does not have yet, and returns these."""
    wanted = dict.fromkeys(printable(" ".join(line.split())) for line in lines)
    if not wanted:
        return []
    known = set(path.read_text().splitlines()) if path.is_file() else set()
    new = [line for line in wanted if line not in known]
    with open(path, "a") as file:
        file.writelines(f"{line}\n" for line in new)
    return new


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text)
