"""Files that are whole or absent: written to a temporary path, flushed to the disk, then renamed; and locked folders.

A kill leaves at most a hidden file or folder beside the whole ones, which `remove_leftovers` removes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from uvit.common.errors import InputError, one_line, printable
from uvit.common.messages import warn

LOCK_FILE = ".lock"


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


def temporary_path(path: Path) -> Path:
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
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it takes its place once the block has ended without an error.

    Raises:
        InputError: the file cannot be made, written or put in its place.
    """
    make_directory(path.parent)
    if os.path.isdir(path):
        raise InputError(f"cannot write to {path}: it is a folder")
    target = path.resolve()  # a link stays a link
    temporary = temporary_path(target)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors leaves files that their owner alone may read
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write_group(path: Path) -> Iterator[Path]:
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
    folder = temporary_path(target)
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


def append_new_lines(path: Path, lines: Iterable[str]) -> list[str]:
    """Adds lines to a text file that it does not have yet, and returns these.

    Raises:
        OSError: as append_lines.
    """
    wanted = dict.fromkeys(printable(one_line(line)) for line in lines)
    if not wanted:
        return []
    known = set(path.read_text().splitlines()) if path.is_file() else set()
    new = [line for line in wanted if line not in known]
    append_lines(path, new)
    return new


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes, until the block ends or this process does, however it ends.

    Raises:
        InputError: another process has locked it, or it cannot be written to.
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
            warn(f"cannot lock {folder} ({error.strerror}): start no second run in it")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
