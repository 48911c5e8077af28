"""Folders of IDX files, as MNIST and its kin are published."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np


def write_idx(path: Path, values: np.ndarray) -> None:
    """Writes an array of uint8 as an IDX file; one that ends in .gz is compressed."""
    content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def save_idx(
    folder: Path, num_train: int = 20, num_test: int = 10, size: tuple[int, int] = (8, 8), names: str = "-{}-ubyte"
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Saves random images of ten classes, in equal parts, and returns the images and labels of each file prefix.

    Args:
        folder: where to, created if missing.
        num_train: images of the training part; 0 leaves it out.
        num_test: images of the test part; 0 leaves it out.
        size: (height, width).
        names: end of the files' names, around `idx3` or `idx1`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng, saved = np.random.default_rng(0), {}
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        if count:
            images = rng.integers(0, 256, (count, *size)).astype(np.uint8)
            labels = (np.arange(count) % 10).astype(np.uint8)
            write_idx(folder / f"{prefix}-images{names.format('idx3')}", images)
            write_idx(folder / f"{prefix}-labels{names.format('idx1')}", labels)
            saved[prefix] = images, labels
    return saved
