"""Atomic writes (to a temporary path, flushed to disk, then renamed), appending to text files, and folder locks.

A killed process leaves at most a hidden file or folder behind, which `remove_leftovers` removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from uvit.common.errors import InputError, one_line, printable
from uvit.common.messages import warn

LOCK_FILE = ".lock"
MAX_STEM = 100
"""Bytes of a file's name in that of its temporary file; file systems take 255 in all."""


_made: list[Path] = []
"""The folders that this process has made, in the order of their making."""


def make_directory(path: Path) -> None:
    """Creates a folder and its parents.

    Raises:
        InputError: it cannot be created.
    """
    missing = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        _made.extend(reversed(missing))
    except OSError as error:
        in_the_way = [each for each in (path, *path.parents) if os.path.lexists(each) and not os.path.isdir(each)]
        reason = f"{in_the_way[0]} is not a folder" if in_the_way else error.strerror
        raise InputError(f"cannot write to {path}: {reason}") from None


def remove_made() -> None:
    """Removes the folders that this process has made and in which nothing is, after an error."""
    for path in reversed(_made):
        with contextlib.suppress(OSError):
            path.rmdir()
    _made.clear()


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk and survives a loss of power."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # not all systems sync folders
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Returns the hidden path beside `path` where this process writes what will replace it."""
    # The suffix stays last: libraries such as Pillow choose the format by it. A long name must not become too long.
    return path.with_name(f".{_short(path.stem)}-{os.getpid()}{path.suffix}")


def _short(stem: str) -> str:
    """Returns a name, or its beginning and a hash where it is long."""
    encoded = stem.encode(errors="replace")
    if len(encoded) <= MAX_STEM:
        return stem
    return encoded[:MAX_STEM].decode(errors="ignore") + hashlib.sha256(encoded).hexdigest()[:8]


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes left unfinished for `path`, which may be a pattern such as `step_*.png`."""
    for leftover in path.parent.glob(f".{_short(path.stem)}-*{path.suffix}"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                leftover.unlink()


def refuse_folder(path: Path) -> None:
    """Checks that a file to write is no folder.

    Raises:
        InputError: it is.
    """
    if os.path.isdir(path):
        raise InputError(f"cannot write to {path}: it is a folder")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it replaces `path` once the block has ended without an error.

    Raises:
        InputError: the file cannot be created, written or renamed.
    """
    make_directory(path.parent)
    refuse_folder(path)
    target = path.resolve()  # a link stays a link
    temporary = temporary_path(target)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner may read
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
    """Yields a path of the same name in a hidden folder, for a file that may need others beside it.

    Once the block has ended without an error, all files in the folder are moved beside `path`, the one of its name
    last: it is there only when the files that it refers to are.

    Raises:
        InputError: the files cannot be created, written or moved.
    """
    make_directory(path.parent)
    refuse_folder(path)
    target = path.resolve()
    folder = temporary_path(target)
    try:
        folder.mkdir()
        yield folder / target.name
        *others, last = sorted(folder.iterdir(), key=lambda file: file.name == target.name)
        for file in (*others, last):
            sync(file)
        if others:
            target.unlink(missing_ok=True)  # an older one must not refer to these
        for file in (*others, last):
            file.replace(target.parent / file.name)
        sync(target.parent)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yields a new folder to write files to; it takes the place of `path` once the block ends without an error.

    Args:
        path: where it goes.
        replace: whether an existing folder there is removed first; otherwise one with files in it is an error.

    Raises:
        InputError: the folder or a file in it cannot be created, written or moved into place.
    """
    make_directory(path.parent)
    temporary = temporary_path(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends lines to a text file, all or none of them.

    Raises:
        OSError: they cannot be written, for example on a full disk.
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
    """Appends the lines that a text file does not have yet, and returns them.

    Raises:
        OSError: as append_lines.
    """
    unique = dict.fromkeys(printable(one_line(line)) for line in lines)
    if not unique:
        return []
    known = set(path.read_text(errors="replace").splitlines()) if path.is_file() else set()
    new = [line for line in unique if line not in known]
    append_lines(path, new)
    return new


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes until the block or this process ends, even if it is killed.

    Raises:
        InputError: it is locked by another process, or cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    path = folder / LOCK_FILE
    refuse_folder(path)
    try:
        path.touch()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    with open(path, "a+b", buffering=0) as file:  # unbuffered: a write that failed must not be retried on close
        try:
            # A record lock belongs to the process; flock's would live on in the loader's workers after a crash.
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
