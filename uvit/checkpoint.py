"""Files of weights and training state. Everything is written aside and renamed, so that a file is whole or not there.

A folder of weights holds `config.json` and `model.safetensors`; a run folder is one (its config.json holds the whole
run, the backbone under "model"), so it loads like any other. Checkpoints for resuming lie under RUN/checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from uvit.config import CONFIG_FILE, UViTConfig, from_dict, read_json
from uvit.errors import InputError, did_you_mean
from uvit.hub import quiet_hub

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "training_state.pt"


def make_directory(path: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None


@contextlib.contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it takes its place once the block has ended without an error.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    make_directory(path.parent)
    try:
        # The suffix stays last: savers such as Pillow's choose the format by it.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text)


def write_weights(directory: Path, state_dict: dict[str, Tensor]) -> None:
    """Writes a state dict as DIRECTORY/model.safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with write_aside(directory / WEIGHTS_FILE) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        InputError: no such file, an empty one, or one that is not safetensors.
    """
    if not path.is_file():
        raise InputError(f"no weights at {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def find_pretrained(name_or_path: str | Path) -> Path:
    """Returns the folder that holds config.json and model.safetensors, fetched from the hub where it is not on disk.

    Raises:
        InputError: neither a folder nor a hub model that can be had.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"checkpoint must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, got the file {path}")
    name = str(name_or_path)
    if name.count("/") != 1 or path.parent.is_dir():  # what has a folder on disk above it is not meant for the hub
        near = did_you_mean(name, [str(folder) for folder in path.parent.glob("*") if folder.is_dir()])
        raise InputError(f"checkpoint not found: {name}{near}")
    try:
        with quiet_hub():
            files = [Path(hf_hub_download(name, file)) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"checkpoint {name!r} is no folder on disk, and the hub did not give it: {reason}") from None
    return files[0].parent


def read_pretrained(name_or_path: str | Path) -> tuple[UViTConfig, dict[str, Tensor]]:
    """Reads a backbone's config and weights from a folder, a run or the hub.

    Raises:
        InputError: nothing there, or files that are not what they should be.
    """
    directory = find_pretrained(name_or_path)
    raw = read_json(directory / CONFIG_FILE)
    config = from_dict(UViTConfig, raw.get("model", raw) if isinstance(raw, dict) else raw)
    return config, read_weights(directory / WEIGHTS_FILE)


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_*"))


def save_checkpoint(run_dir: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Writes RUN/checkpoints/step_NNNNNNNN and removes all but the `keep` newest.

    Args:
        run_dir: folder of the run.
        step: optimizer steps done.
        state: state dicts of everything that must go on where it stopped.
        keep: checkpoints to keep.
    """
    parent = run_dir / "checkpoints"
    make_directory(parent)
    target = parent / f"step_{step:08d}"
    aside = Path(tempfile.mkdtemp(dir=parent, prefix="."))
    try:
        torch.save({"step": step, **state}, aside / STATE_FILE)
        shutil.rmtree(target, ignore_errors=True)
        aside.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in checkpoint_dirs(run_dir)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """Reads the newest checkpoint of a run, on the CPU, or returns None where there is none.

    Raises:
        InputError: the file is not a whole checkpoint.
    """
    found = checkpoint_dirs(run_dir)
    if not found:
        return None
    path = found[-1] / STATE_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        raise InputError(
            f"{path} is not a whole checkpoint ({type(error).__name__}): remove its folder to go on"
        ) from None
