"""Files of tensors by name: safetensors, and the `.pth` files of the reference code, read without running code."""

from __future__ import annotations

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

from uvit.common.errors import InputError, short_repr
from uvit.common.files import atomic_write
from uvit.config import WEIGHTS_FILE


def hash_weights(state_dict: Mapping[str, Tensor]) -> str:
    """Returns the hash of the weights: the first 16 hexadecimal digits of SHA-256 over tensors by name."""
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
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
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


def load_tensors_only(path: Path) -> Any:
    """Reads a file of torch.save on the CPU; a pickle's code is not run, nor warned of before it is refused.

    Raises:
        Exception: whatever broken bytes, or a pickle with code, lead to.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def read_pth(path: Path) -> dict[str, Tensor]:
    """Reads a state dict of the reference code, a `.pth` file, without running what a pickle may hold.

    Raises:
        InputError: a file that is not whole, or that holds anything but tensors by name.
    """
    try:
        weights = load_tensors_only(path)
    except Exception as error:
        raise InputError(f"{path} is not a whole file of weights alone ({type(error).__name__})") from None
    if not isinstance(weights, dict):
        raise InputError(f"{path} must hold tensors by name, got {type(weights).__name__}")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path} must hold tensors by name, got {type(value).__name__} by {short_repr(name)}")
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
