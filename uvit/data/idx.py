"""Folders of IDX files, the format of MNIST and its kin, read into memory."""

from __future__ import annotations

import gzip
import math
import zlib
from os.path import isdir, isfile
from pathlib import Path

import numpy as np

from uvit.common.errors import InputError, one_line
from uvit.config import DataConfig
from uvit.data.batch import MIN_IMAGES, ImageSpec
from uvit.data.embedded import Arrays

PREFIXES = {"test": "t10k"}
"""What the files of a split begin with, where it is not the split's name: MNIST's test part has 10,000 images."""
IMAGES, LABELS = "images{}idx3-ubyte{}", "labels{}idx1-ubyte{}"
BYTES = 0x08
"""The code of uint8 in a file's first four bytes, which are 0, 0, the type and the number of axes."""


def is_idx_data(name: str) -> bool:
    """Returns whether a data set's name is a folder with IDX files in it."""
    return isdir(name) and any(True for _ in Path(name).glob("*[-.]idx[13]-ubyte*"))


def load_idx(config: DataConfig, spec: ImageSpec, split: str) -> Arrays:
    """Loads a split of a folder of IDX files, plain or gzip, such as `train-images-idx3-ubyte.gz`.

    The labels are named by `config.class_names`, or else by their numbers, and grey images are repeated for RGB models.

    Raises:
        InputError: a file that is missing or broken, files that do not belong together, images of another size than the
            model's, or captions asked for.
    """
    folder = Path(config.name)
    if spec.captions:
        raise InputError(f"data {config.name!r} must have captions, got IDX files, which have images and labels only")
    images_file = _find(folder, split, IMAGES)
    if images_file is None:
        described = _describe(split, IMAGES)
        raise InputError(f"split {split!r} of data {config.name!r} must be {described}, found no such file")
    images = _read(images_file, num_axes=3)
    if len(images) < MIN_IMAGES:
        raise InputError(f"{images_file} must have {MIN_IMAGES} images or more, got {len(images)}")
    channels, *size = spec.shape or (1, *images.shape[1:])
    if images.shape[1:] != tuple(size):
        found, expected = ("x".join(map(str, each)) for each in (images.shape[1:], size))
        raise InputError(f"images of data {config.name!r} are {found}, got a model for {expected}")
    pixels = np.broadcast_to(images[..., None], (*images.shape, channels))  # without a copy
    labels, names = _read_labels(config, spec, split, images_file, len(images))
    return Arrays(pixels, labels, names, (channels, *images.shape[1:]))


def _read_labels(
    config: DataConfig, spec: ImageSpec, split: str, images_file: Path, num_images: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns a label for each image and the names of the labels; zeros and no names where they are not read."""
    file = None if spec.labels is False else _find(Path(config.name), split, LABELS)
    if file is None:
        if spec.labels:
            described = _describe(split, LABELS)
            raise InputError(f"labels of {images_file} must be {described} beside it, found no such file")
        return np.zeros(num_images, np.int64), ()
    labels = _read(file, num_axes=1).astype(np.int64)
    if len(labels) != num_images:
        raise InputError(f"{file} must have a label for each of {num_images} images, got {len(labels)}")
    names = config.class_names or tuple(map(str, range(labels.max() + 1)))
    if labels.max() >= len(names):
        named = f"0 to {len(names) - 1}, which data.class_names names"
        raise InputError(f"labels of {file} must be {named}, got {labels.max()}")
    return labels, names


def _names(split: str, kind: str) -> list[str]:
    """Returns the names by which a file of a split is published."""
    prefix = PREFIXES.get(split, split)
    return [f"{prefix}-{kind.format(dot, suffix)}" for dot in "-." for suffix in ("", ".gz")]


def _describe(split: str, kind: str) -> str:
    return f"{_names(split, kind)[0]}, plain or .gz"


def _find(folder: Path, split: str, kind: str) -> Path | None:
    """Returns the file of a split, or None where there is none."""
    return next((folder / name for name in _names(split, kind) if isfile(folder / name)), None)


def _read(path: Path, num_axes: int) -> np.ndarray:
    """Reads an IDX file of uint8 with a number of axes.

    Raises:
        InputError: it cannot be read, or it is not such a file from its first to its last byte.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {one_line(error, 100)}") from None
    expected = bytes([0, 0, BYTES, num_axes])
    if content[:4] != expected:
        given = content[:4].hex(" ") or "an empty file"
        raise InputError(f"{path} must begin with {expected.hex(' ')}, as an IDX file of such data, got {given}")
    start = 4 + 4 * num_axes
    if len(content) < start:
        raise InputError(f"{path} must have a header of {start} bytes, got {len(content)}: copy it again")
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    if len(content) - start != math.prod(shape):
        given = f"{'x'.join(map(str, shape))} bytes after its header, got {len(content) - start}"
        raise InputError(f"{path} must have {given}: copy it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
