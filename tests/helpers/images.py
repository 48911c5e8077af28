"""Folders of images and data sets for the loaders, and images that were drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from uvit.config import DataConfig

DIGITS = tuple(map(str, range(10)))
"""Names of ten classes."""


def save_folder(root: Path, classes: Iterable[str] = ("cat", "dog"), count: int = 3) -> None:
    """Saves images of 16x24 pixels in a folder for each class; the first channel of an image is 200 times its label."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (24, 16), (number * 200, index, 7)).save(root / name / f"{index}.png")


def save_captions(folder: Path, captions: Sequence[Any], **columns: Sequence[str]) -> DataConfig:
    """Saves a data set of black images with captions in its column `text`."""
    rows = {"img": [Image.new("L", (8, 8))] * len(captions), "file": ["x"] * len(captions), "text": captions, **columns}
    datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image()).save_to_disk(folder)
    return DataConfig(name=str(folder), caption_column="text")


def read_npz(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and the labels (or prompts) of an .npz that `sample` wrote."""
    with np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"]
