"""Files that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from uvit.errors import InputError, printable

SKIPPED_FILE = "skipped.txt"
"""A folder's list of the items that were left out as broken."""


def make_directory(path: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        in_the_way = [each for each in (path, *path.parents) if os.path.lexists(each) and not os.path.isdir(each)]
        reason = f"{in_the_way[0]} is not a folder" if in_the_way else error.strerror
        raise InputError(f"cannot write to {path}: {reason}") from None


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


def describe_skipped(folder: Path) -> str:
    """Says how many items were left out as broken, by a folder's list of them; nothing where there is none."""
    path = folder / SKIPPED_FILE
    return f"; {len(path.read_text().splitlines())} could not be read, listed in {path}" if path.is_file() else ""


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text)
