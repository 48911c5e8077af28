"""Weights of a backbone, on disk and on the hub.

A folder of weights holds `config.json` and `model.safetensors`. A run folder is one (its config.json holds the whole
run, the backbone under "model"), so it loads like any other. Published `.pth` files load as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from uvit.config import CONFIG_FILE, UViTConfig, from_dict, read_json
from uvit.errors import InputError, shown
from uvit.files import write_aside
from uvit.hub import find_folder
from uvit.published import infer_config

WEIGHTS_FILE = "model.safetensors"
PUBLISHED_FILE = "nnet_ema.pth"
"""Name of the averaged weights in a checkpoint folder of the reference code."""


def hash_weights(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, its first 16 letters: tells weights apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_weights(directory: Path, state_dict: dict[str, Tensor]) -> None:
    """Writes a state dict as DIRECTORY/model.safetensors, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    path = directory / WEIGHTS_FILE
    try:
        with write_aside(path) as aside:
            save_file(tensors, aside, metadata={"format": "pt"})
    except SafetensorError as error:  # how it tells of a full disk
        raise InputError(f"cannot write to {path}: {error}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        InputError: no such file, an empty one, or one that is not safetensors.
    """
    if not isfile(path):
        raise InputError(f"no weights at {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def load_without_code(path: Path) -> Any:
    """Reads a file of torch.save on the CPU; a pickle's code is not run, nor warned of before it is refused.

    Raises:
        Exception: whatever broken bytes, or a pickle with code, lead to.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def read_published(path: Path) -> dict[str, Tensor]:
    """Reads a state dict of the reference code, a `.pth` file, without running what a pickle may hold.

    Raises:
        InputError: a file that is not whole, or that holds anything but tensors by name.
    """
    try:
        weights = load_without_code(path)
    except Exception as error:
        raise InputError(f"{path} is not a whole file of weights alone ({type(error).__name__})") from None
    if not isinstance(weights, dict):
        raise InputError(f"{path} must hold tensors by name, got {type(weights).__name__}")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path} must hold tensors by name, got {type(value).__name__} by {shown(name)}")
    # A pickle may repeat few values as a tensor of any size, which a model of that size would take memory for.
    if any(value.layout is not torch.strided or value.device.type != "cpu" for value in weights.values()):
        raise InputError(f"{path} must hold plain tensors, got other kinds")
    storages = {(held := value.untyped_storage()).data_ptr(): held.nbytes() for value in weights.values()}
    claimed = sum(value.nbytes for value in weights.values())
    if claimed > sum(storages.values()):
        raise InputError(
            f"{path} must hold all values of its tensors, {claimed:,} bytes, got {sum(storages.values()):,}"
        )
    return weights


def find_pretrained(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns what holds the weights: a published `.pth` file, or a folder with config.json and model.safetensors.

    What is not on disk is fetched from the hub.

    Args:
        name_or_path: which.
        revision: as for uvit.hub.find_folder, like the next three.
        token: of the hub.
        cache_dir: where the hub's files are kept.
        local_files_only: whether to take only what was fetched before.

    Raises:
        InputError: nothing on disk by that name, and no hub model that can be had, or a revision of what is on disk.
    """
    path = Path(name_or_path)
    if revision is None and isfile(path):
        return path
    files = (CONFIG_FILE, WEIGHTS_FILE)
    folder = find_folder(
        str(name_or_path),
        "checkpoint",
        files,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    published = folder / PUBLISHED_FILE
    return published if isfile(published) and not isfile(folder / WEIGHTS_FILE) else folder


def read_pretrained(path: Path, **known: Any) -> tuple[UViTConfig, dict[str, Tensor]]:
    """Reads a backbone's config and weights.

    Args:
        path: what find_pretrained found.
        **known: fields of UViTConfig; those of a published file that its tensors do not tell.

    Raises:
        InputError: files that are not there, or not what they should be.
    """
    if path.is_file():
        weights = read_published(path)
        try:
            return infer_config(weights, **known), weights
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    raw = read_json(path / CONFIG_FILE)
    config = from_dict(UViTConfig, raw.get("model", raw) if isinstance(raw, dict) else raw)
    return dataclasses.replace(config, **known), read_weights(path / WEIGHTS_FILE)
