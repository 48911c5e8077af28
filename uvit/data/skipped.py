"""The list of images that could not be read and were skipped, kept in a run folder or a folder of latents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from uvit.common.files import append_new_lines
from uvit.common.messages import notify

SKIPPED_FILE = "skipped.txt"


def report_skipped(folder: Path, faults: Iterable[str]) -> None:
    """Adds skipped images to FOLDER/skipped.txt, and prints those that were not listed yet.

    Args:
        folder: a run folder, or a folder of latents.
        faults: a line for each image, as in Batch.skipped.

    Raises:
        OSError: the list cannot be written.
    """
    for line in append_new_lines(folder / SKIPPED_FILE, faults):
        notify(f"skipped: {line}")


def describe_skipped(folder: Path) -> str:
    """Returns a note on how many images are in a folder's list, or "" where there is none."""
    path = folder / SKIPPED_FILE
    return f"; {len(path.read_text().splitlines())} could not be read, listed in {path}" if path.is_file() else ""
