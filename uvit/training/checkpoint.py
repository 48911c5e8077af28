"""Checkpoints, from which a run resumes: written atomically, and read without running code in them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from uvit.common.errors import InputError
from uvit.common.files import atomic_folder, remove_leftovers
from uvit.config import CHECKPOINT_FOLDER, CONFIG_FILE, STEP_PREFIX, Config, checkpoint_dirs, save_json, step_name
from uvit.weights.tensors import load_tensors_only

STATE_FILE = "training_state.pt"
MARKER_FILE = "complete.json"
"""Written last, with the size and hash of the state file, so that an incomplete copy is detected."""


def _describe(path: Path, thorough: bool = True) -> dict[str, Any]:
    """Returns the marker's content for a state file; if not `thorough`, only its size, without reading the file."""
    if not thorough:
        return {"size": path.stat().st_size}
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def find_config(run_dir: Path) -> Path | None:
    """Returns the path of the config in a run's newest checkpoint, or None where there is none."""
    found = [folder / CONFIG_FILE for folder in reversed(checkpoint_dirs(run_dir)) if (folder / CONFIG_FILE).is_file()]
    return found[0] if found else None


def save_checkpoint(run_dir: Path, config: Config, step: int, state: dict[str, Any], keep: int | None) -> None:
    """Writes RUN/checkpoints/step_00000100 atomically, and then removes all but the `keep` newest checkpoints.

    Args:
        run_dir: folder of the run.
        config: of the run.
        step: optimizer steps done.
        state: state dicts of everything that must be restored to resume.
        keep: number of checkpoints to keep; None keeps all.

    Raises:
        InputError: it cannot be written; earlier checkpoints are still there.
    """
    target = run_dir / CHECKPOINT_FOLDER / step_name(step)
    remove_leftovers(target.with_name(f"{STEP_PREFIX}*"))
    with atomic_folder(target, replace=True) as temporary:
        try:
            with open(temporary / STATE_FILE, "wb") as file:
                torch.save({"step": step, **state}, file)
        except RuntimeError as error:  # torch.save hides the reason behind a RuntimeError of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from None
        save_json(temporary / CONFIG_FILE, config)
        (temporary / MARKER_FILE).write_text(json.dumps(_describe(temporary / STATE_FILE)) + "\n")
    if keep is None:
        return
    num_complete = 0
    for folder in reversed(checkpoint_dirs(run_dir)):
        if num_complete >= keep:
            shutil.rmtree(folder, ignore_errors=True)
        elif _find_fault(folder, thorough=False) is None:
            num_complete += 1


def _find_fault(folder: Path, thorough: bool = True) -> str | None:
    """Returns what is wrong with a checkpoint, or None for a complete one; `thorough` reads all of it."""
    try:
        marker = json.loads((folder / MARKER_FILE).read_text())
        found = _describe(folder / STATE_FILE, thorough)
        if not thorough and isinstance(marker, dict):
            marker.pop("sha256", None)
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return f"its {MARKER_FILE} is not JSON"
    return None if marker == found else f"its {STATE_FILE} is not what {MARKER_FILE} says"


def find_checkpoint(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """Finds the newest complete checkpoint of a run.

    Returns:
        Its folder, or None where there is no checkpoint at all; and newer ones that are broken, with their faults.

    Raises:
        InputError: there are checkpoints, but none is complete.
    """
    broken: dict[Path, str] = {}
    for folder in reversed(checkpoint_dirs(run_dir)):
        if (fault := _find_fault(folder)) is None:
            return folder, broken
        broken[folder] = fault
    if broken:
        folder, fault = next(iter(broken.items()))
        raise InputError(
            f"{folder} is not a complete checkpoint ({fault}), and no older one is: remove it to start over"
        )
    return None, broken


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


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """Reads the newest complete checkpoint of a run to the CPU, or returns None where there is none.

    Raises:
        InputError: as find_checkpoint and read_state.
    """
    folder, _ = find_checkpoint(run_dir)
    return None if folder is None else read_state(folder)
