"""The state that a run goes on from: written whole or not at all, and read without running code."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from uvit.common.errors import InputError
from uvit.common.files import make_directory, remove_leftovers, sync, temporary_path
from uvit.config import CHECKPOINT_FOLDER, CONFIG_FILE, STEP_PREFIX, Config, checkpoint_dirs, step_name, to_json
from uvit.weights.tensors import load_tensors_only

STATE_FILE = "training_state.pt"
MARKER_FILE = "complete.json"
"""Written last: its state file's size and hash, so that a torn copy is known from a whole one."""


def _describe(path: Path, thorough: bool = True) -> dict[str, Any]:
    """Returns what the marker says of a state file; only what is known without reading it where not `thorough`."""
    if not thorough:
        return {"size": path.stat().st_size}
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def find_config(run_dir: Path) -> Path | None:
    """Returns the config that the newest checkpoint of a run was made with, or None where there is none."""
    found = [folder / CONFIG_FILE for folder in reversed(checkpoint_dirs(run_dir)) if (folder / CONFIG_FILE).is_file()]
    return found[0] if found else None


def save_checkpoint(run_dir: Path, config: Config, step: int, state: dict[str, Any], keep: int | None) -> None:
    """Writes RUN/checkpoints/step_00000100, whole or not at all, and then removes all but the `keep` newest.

    Args:
        run_dir: folder of the run.
        config: what it was made with.
        step: optimizer steps done.
        state: state dicts of everything that must go on where it stopped.
        keep: checkpoints to keep; None keeps all.

    Raises:
        InputError: it cannot be written; the checkpoints before it are still there.
    """
    target = run_dir / CHECKPOINT_FOLDER / step_name(step)
    make_directory(target.parent)
    remove_leftovers(target.with_name(f"{STEP_PREFIX}*"))
    temporary = temporary_path(target)
    try:
        temporary.mkdir()
        with open(temporary / STATE_FILE, "wb") as file:
            torch.save({"step": step, **state}, file)
        sync(temporary / STATE_FILE)
        (temporary / CONFIG_FILE).write_text(to_json(config))
        sync(temporary / CONFIG_FILE)
        (temporary / MARKER_FILE).write_text(json.dumps(_describe(temporary / STATE_FILE)) + "\n")
        sync(temporary / MARKER_FILE)
        sync(temporary)
        shutil.rmtree(target, ignore_errors=True)  # a step that is saved again
        temporary.replace(target)
        sync(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save hides the reason behind a RuntimeError of its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"cannot write {target}: {getattr(reason, 'strerror', None) or reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep is None:
        return
    num_whole = 0
    for folder in reversed(checkpoint_dirs(run_dir)):
        if num_whole >= keep:
            shutil.rmtree(folder, ignore_errors=True)
        elif _find_fault(folder, thorough=False) is None:
            num_whole += 1


def _find_fault(folder: Path, thorough: bool = True) -> str | None:
    """Says what is wrong with a checkpoint, or returns None for a whole one; `thorough` reads all of it."""
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
    """Returns the newest whole checkpoint of a run, and what is wrong with newer ones.

    Returns:
        Its folder, or None where there is no checkpoint at all; and the broken ones passed over, with their faults.

    Raises:
        InputError: there are checkpoints, but none is whole.
    """
    broken: dict[Path, str] = {}
    for folder in reversed(checkpoint_dirs(run_dir)):
        if (fault := _find_fault(folder)) is None:
            return folder, broken
        broken[folder] = fault
    if broken:
        folder, fault = next(iter(broken.items()))
        raise InputError(f"{folder} is not a whole checkpoint ({fault}), and no older one is: remove it to start anew")
    return None, broken


def read_state(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint on the CPU, without running what a pickle may hold.

    Raises:
        InputError: the file is not a whole checkpoint.
    """
    path = folder / STATE_FILE
    try:
        state = load_tensors_only(path)
    except Exception as error:
        raise InputError(f"{path} is not a whole checkpoint ({type(error).__name__}): remove its folder") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} must hold a dict, got {type(state).__name__}")
    return state


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """Reads the newest whole checkpoint of a run, on the CPU, or returns None where there is none.

    Raises:
        InputError: as find_checkpoint and read_state.
    """
    folder, _ = find_checkpoint(run_dir)
    return None if folder is None else read_state(folder)
