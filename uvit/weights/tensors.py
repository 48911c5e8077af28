"""Files of weights: safetensors, and the `.pth` files of the paper's code, read without running code in them."""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from uvit.common.errors import InputError, short_repr
from uvit.common.files import atomic_write
from uvit.config import WEIGHTS_FILE

HASH_KEY = "hash"
"""In a file's metadata, by which damaged weights are noticed."""


def hash_weights(state_dict: Mapping[str, Tensor]) -> str:
    """Returns a hash of the weights: the first 16 hexadecimal digits of SHA-256 over names and float32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _sort_metadata(path: Path) -> None:
    """Sorts a safetensors file's metadata, which the library orders at random: equal weights are equal bytes."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        # The format allows spaces at a header's end, so that its size stays.
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def write_weights(directory: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Writes a state dict to DIRECTORY/model.safetensors, as write_tensors."""
    write_tensors(directory / WEIGHTS_FILE, state_dict)


def write_tensors(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Writes tensors to a safetensors file, with their hash, atomically.

    Raises:
        InputError: it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", HASH_KEY: hash_weights(tensors)})
            _sort_metadata(temporary)
    except SafetensorError as error:  # raised on a full disk, among others
        raise InputError(f"cannot write to {path}: {error}") from None


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Opens a safetensors file, to read its metadata or single tensors.

    Raises:
        InputError: no such file, or one that is not valid.
    """
    if not isfile(path):
        raise InputError(f"no weights at {path}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a valid safetensors file: {error}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file, and compares its weights with the hash that it has if this package wrote it.

    Raises:
        InputError: no such file, one that is not valid, or weights of another hash.
    """
    with open_weights(path) as file:
        expected = (file.metadata() or {}).get(HASH_KEY)
        weights = load_file(path)
    if expected is not None and (found := hash_weights(weights)) != expected:
        raise InputError(f"{path} is damaged, its weights must have hash {expected}, got {found}: copy it again")
    return weights


def load_tensors_only(path: Path) -> Any:
    """Loads a file of torch.save to the CPU, without running code in its pickle, and without warnings.

    Raises:
        Exception: of any type, for a broken file or a pickle with code.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def read_pth(path: Path) -> dict[str, Tensor]:
    """Reads a state dict of the paper's code, a `.pth` file, without running code in its pickle.

    Raises:
        InputError: a broken file, or one that holds anything but tensors by name.
    """
    try:
        weights = load_tensors_only(path)
    except Exception as error:
        raise InputError(f"{path} is not a valid weights-only file ({type(error).__name__})") from None
    return check_plain(weights, path)


def check_plain(weights: Any, path: Path) -> dict[str, Tensor]:
    """Returns what was read from a file, which must be plain tensors by name.

    Raises:
        InputError: anything else.
    """
    if not isinstance(weights, dict):
        raise InputError(f"{path} must hold tensors by name, got {type(weights).__name__}")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path} must hold tensors by name, got {type(value).__name__} by {short_repr(name)}")
    # A small pickle may claim a tensor of any size by repeating values, and a model of that size would fill the memory.
    if any(value.layout is not torch.strided or value.device.type != "cpu" for value in weights.values()):
        raise InputError(f"{path} must hold plain tensors, got other kinds")
    storages = {(storage := value.untyped_storage()).data_ptr(): storage.nbytes() for value in weights.values()}
    claimed = sum(value.nbytes for value in weights.values())
    if claimed > sum(storages.values()):
        raise InputError(
            f"{path} must hold all values of its tensors, {claimed:,} bytes, got {sum(storages.values()):,}"
        )
    return weights
