"""Images that could not be read and were left out: a list in the folder that they are missing from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from uvit.common.files import append_new_lines
from uvit.common.messages import notify

SKIPPED_FILE = "skipped.txt"


def report_skipped(folder: Path, faults: Iterable[str]) -> None:
    """Lists what was left out in FOLDER/skipped.txt, and prints what is new there.

    Args:
        folder: a run, or a folder of latents.
        faults: a line for each image, as Batch.skipped has them.

    Raises:
        OSError: the list cannot be written.
    """
    for line in append_new_lines(folder / SKIPPED_FILE, faults):
        notify(f"skipped: {line}")


def describe_skipped(folder: Path) -> str:
    """Says how many images a folder's list has; nothing where there is none."""
    path = folder / SKIPPED_FILE
    return f"; {len(path.read_text().splitlines())} could not be read, listed in {path}" if path.is_file() else ""
