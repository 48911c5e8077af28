"""Checkpoints, from which a run resumes: written atomically, and read without running code in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from uvit.common.errors import InputError
from uvit.common.files import atomic_folder, remove_leftovers
from uvit.config import CHECKPOINT_FOLDER, CONFIG_FILE, STEP_PREFIX, Config, checkpoint_dirs, save_json, step_name
from uvit.weights.state import MARKER_FILE, STATE_FILE, describe_state, find_fault, read_state


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
        (temporary / MARKER_FILE).write_text(json.dumps(describe_state(temporary / STATE_FILE)) + "\n")
    if keep is None:
        return
    num_complete = 0
    for folder in reversed(checkpoint_dirs(run_dir)):
        if num_complete >= keep:
            shutil.rmtree(folder, ignore_errors=True)
        elif find_fault(folder, thorough=False) is None:
            num_complete += 1


def find_checkpoint(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """Finds the newest complete checkpoint of a run.

    Returns:
        Its folder, or None where there is no checkpoint at all; and newer ones that are broken, with their faults.

    Raises:
        InputError: there are checkpoints, but none is complete.
    """
    broken: dict[Path, str] = {}
    for folder in reversed(checkpoint_dirs(run_dir)):
        if (fault := find_fault(folder)) is None:
            return folder, broken
        broken[folder] = fault
    if broken:
        folder, fault = next(iter(broken.items()))
        raise InputError(
            f"{folder} is not a complete checkpoint ({fault}), and no older one is: remove it to start over"
        )
    return None, broken


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """Reads the newest complete checkpoint of a run to the CPU, or returns None where there is none.

    Raises:
        InputError: as find_checkpoint and read_state.
    """
    folder, _ = find_checkpoint(run_dir)
    return None if folder is None else read_state(folder)
