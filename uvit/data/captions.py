"""Captions of a folder's images: metadata.csv and metadata.jsonl, or a text file beside each image."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from uvit.common.errors import InputError, one_line
from uvit.config import NO_TEXT

METADATA = ("metadata.csv", "metadata.jsonl")
FILE_COLUMN = "file_name"
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
"""Names that are tried where there are several columns of text."""
SIDECAR = ".txt"

Names = tuple[str, ...]
"""A path relative to the folder."""


def read_metadata(path: str) -> list[dict[str, Any]]:
    """Reads the lines of a metadata.csv or .jsonl; numbers are text, as they are written.

    Raises:
        InputError: it cannot be read, or has no column `file_name`.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.endswith(".csv"):
                table = csv.DictReader(file, strict=True)
                rows = [_named_cells(row, table.line_num) for row in table]
            else:
                rows = [json.loads(line, parse_int=str, parse_float=str) for line in file if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path}: it is not UTF-8") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {one_line(error, 100)}") from None
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get(FILE_COLUMN), str):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"each line of {path} must have a {FILE_COLUMN}, got {columns}")
    return rows


def _named_cells(row: dict[str, Any], line: int) -> dict[str, Any]:
    if None in row:  # where csv puts cells without a column
        raise ValueError(f"line {line} has more cells than columns")
    return row


def caption_column(path: str, rows: Sequence[Mapping[str, Any]], wanted: str | None) -> str | None:
    """Returns the column of captions: the one named, else the only one with a usual name, else the only one of text.

    Raises:
        InputError: none of this name, or several that could be meant.
    """
    columns = dict.fromkeys(name for row in rows for name in row if name != FILE_COLUMN)
    if wanted in columns:
        return wanted
    if wanted is not None:
        names = ", ".join((FILE_COLUMN, *columns))
        raise InputError(f"{path} must have a column {wanted!r} of captions, got {names}")
    texts = [name for name in columns if all(isinstance(row.get(name), str | list | None) for row in rows)]
    likely = [name for name in columns if name in CAPTION_COLUMNS] or texts
    if len(likely) > 1:
        raise InputError(f"{path} has several columns of captions, {', '.join(likely)}: choose one by caption_column")
    return likely[0] if likely else None


def captions_in(value: Any, path: str) -> tuple[str, ...]:
    """Returns the captions in a cell: none, one, or a list of them; blank ones are none.

    Raises:
        InputError: something else than texts.
    """
    values = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
    for each in values:
        if not isinstance(each, str) or NO_TEXT.search(each):
            raise InputError(f"captions in {path} must be texts, got {each!r:.100}")
    return tuple(each for each in values if each.strip())


def read_captions(
    folder: Path, files: Sequence[Names], images: Sequence[Names], root: Names, wanted: str | None
) -> tuple[dict[Names, tuple[str, ...]], set[Names]]:
    """Reads the captions of images, from metadata or else from the text file beside each.

    Args:
        folder: the folder.
        files: all in it.
        images: those to describe.
        root: where they are; metadata in it and around it are read.
        wanted: column of the captions, or None.

    Returns:
        The captions of each image that has some, and the files that they were in.

    Raises:
        InputError: a file that cannot be read, or two lines for one image.
    """
    captions: dict[Names, tuple[str, ...]] = {}
    sources: dict[Names, Names] = {}
    for source in (each for each in files if each[-1] in METADATA):
        place = source[:-1]
        if place[: len(root)] != root[: len(place)]:
            continue
        path = os.path.join(folder, *source)
        rows = read_metadata(path)
        column = caption_column(path, rows, wanted)
        if column is None:
            continue
        for row in rows:
            image = PurePath(os.path.normpath(os.path.join(*place, row[FILE_COLUMN]))).parts
            if image in captions:
                raise InputError(f"{'/'.join(image)!r} must have one line of metadata, got two, one in {path}")
            sources[image], captions[image] = source, captions_in(row.get(column), path)
    beside = {_without_ending(names): names for names in files if names[-1].lower().endswith(SIDECAR)}
    for image in images:
        sidecar = beside.get(_without_ending(image))
        if image not in captions and sidecar is not None:
            path = os.path.join(folder, *sidecar)
            sources[image], captions[image] = sidecar, captions_in(read_text(path).strip(), path)
    return {image: texts for image, texts in captions.items() if texts}, set(sources.values())


def _without_ending(names: Names) -> Names:
    return *names[:-1], os.path.splitext(names[-1])[0]


def read_text(path: str) -> str:
    """Reads a text file.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path}: it is not UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
