"""Files that are whole or not there: written aside, flushed to the disk, then renamed; and folders held by one process.

A kill leaves at most a hidden file or folder beside the whole ones, which `remove_leftovers` removes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from uvit.errors import InputError, printable

SKIPPED_FILE = "skipped.txt"
"""A folder's list of the items that were left out as broken."""

LOCK_FILE = ".lock"

RESULT_FILE = "evaluation.json"
"""A run's figures and their protocol."""


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


def sync(path: Path) -> None:
    """Waits until a file, or the names that a folder holds, are on the disk and outlive a loss of power."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # not all systems sync folders
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def aside_of(path: Path) -> Path:
    """Returns the hidden path beside `path` at which this process makes what will take its place."""
    # The suffix stays last: savers such as Pillow's choose the format by it.
    return path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes were making for `path`, whose name may be a pattern such as `step_*.png`."""
    for leftover in path.parent.glob(f".{path.stem}-*{path.suffix}"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                leftover.unlink()


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
    aside = aside_of(target)
    try:
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)  # safetensors leaves files that their owner alone may read
        sync(aside)
        aside.replace(target)
        sync(target.parent)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def write_together(path: Path) -> Iterator[Path]:
    """Yields a path of the same name in a hidden folder, for what may need more files beside it.

    Once the block has ended without an error, all files in the folder take their places beside `path`, the one of its
    name last: it is whole, with those that it refers to, or not there.

    Raises:
        InputError: the files cannot be made, written or put in their places.
    """
    make_directory(path.parent)
    if os.path.isdir(path):
        raise InputError(f"cannot write to {path}: it is a folder")
    target = path.resolve()
    folder = aside_of(target)
    try:
        folder.mkdir()
        yield folder / target.name
        *others, last = sorted(folder.iterdir(), key=lambda file: file.name == target.name)
        for file in (*others, last):
            sync(file)
        if others:
            target.unlink(missing_ok=True)  # an older one must not meet these
        for file in (*others, last):
            file.replace(target.parent / file.name)
        sync(target.parent)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds lines to a text file, all or none of them.

    Raises:
        OSError: they cannot be written, such as on a full disk.
    """
    content = "".join(f"{line}\n" for line in lines).encode()
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(content):
                written += file.write(content[written:])
        except OSError:
            file.truncate(size)
            raise


def add_lines(path: Path, lines: Iterable[str]) -> list[str]:
    """Adds lines to a text file that it does not have yet, and returns these.

    Raises:
        OSError: as append_lines.
    """
    wanted = dict.fromkeys(printable(" ".join(line.split())) for line in lines)
    if not wanted:
        return []
    known = set(path.read_text().splitlines()) if path.is_file() else set()
    new = [line for line in wanted if line not in known]
    append_lines(path, new)
    return new


def describe_skipped(folder: Path) -> str:
    """Says how many items were left out as broken, by a folder's list of them; nothing where there is none."""
    path = folder / SKIPPED_FILE
    return f"; {len(path.read_text().splitlines())} could not be read, listed in {path}" if path.is_file() else ""


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps other processes from holding a folder, until the block ends or this process does, however it does.

    Raises:
        InputError: another process holds it, or it cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    path = folder / LOCK_FILE
    try:
        path.touch()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    with open(path, "a+b", buffering=0) as file:  # what a full disk refuses must not be tried again at the end
        try:
            # A record lock is the process's own; flock's would live on in the loader's workers after a crash.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = printable(file.read().decode(errors="replace")) or "another process"
            raise InputError(f"{folder} is in use by {holder}: wait for it to end, or use another folder") from None
        except OSError as error:
            print(f"warning: cannot lock {folder} ({error.strerror}): start no second run in it", file=sys.stderr)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
