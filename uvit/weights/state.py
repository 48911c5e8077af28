"""The files of a checkpoint, from which a run resumes, or only its average is read: without running code in them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from uvit.common.errors import InputError
from uvit.weights.tensors import check_plain, load_tensors_only

STATE_FILE = "training_state.pt"
MARKER_FILE = "complete.json"
"""Written last, with the size and hash of the state file, so that an incomplete copy is detected."""


def describe_state(path: Path, thorough: bool = True) -> dict[str, Any]:
    """Returns the marker's content for a state file; if not `thorough`, only its size, without reading the file."""
    if not thorough:
        return {"size": path.stat().st_size}
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def find_fault(folder: Path, thorough: bool = True) -> str | None:
    """Returns what is wrong with a checkpoint, or None for a complete one; `thorough` reads all of it."""
    try:
        marker = json.loads((folder / MARKER_FILE).read_text())
        found = describe_state(folder / STATE_FILE, thorough)
        if not thorough and isinstance(marker, dict):
            marker.pop("sha256", None)
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return f"its {MARKER_FILE} is not JSON"
    return None if marker == found else f"its {STATE_FILE} is not what {MARKER_FILE} says"


def read_state(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU, without running code in its pickle.

    Raises:
        InputError: an invalid file.
    """
    path = folder / STATE_FILE
    try:
        state = load_tensors_only(path)
    except Exception as error:
        raise InputError(f"{path} is not a valid checkpoint ({type(error).__name__}): remove its folder") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} must hold a dict, got {type(state).__name__}")
    return state


def read_average(folder: Path) -> dict[str, Tensor]:
    """Reads the averaged weights of a checkpoint.

    Raises:
        InputError: a checkpoint that is incomplete or invalid.
    """
    if (fault := find_fault(folder)) is not None:
        raise InputError(f"{folder} is not a complete checkpoint ({fault})")
    return check_plain(read_state(folder).get("ema"), folder / STATE_FILE)
