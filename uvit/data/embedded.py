"""Small data sets that are kept in memory: digits, photos, and the arrays of an .npz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from uvit.common.errors import InputError, one_line
from uvit.data.batch import MIN_IMAGES, Batch

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_SHARE = 0.2
HELD_OUT_SEED = 0
PHOTO_NAMES = ("temple", "flower")
PHOTO_SHAPE = (3, 32, 32)
NUM_PHOTO_CROPS = 5_000
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8, one in five held out (stratified, with a fixed seed)."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = DIGIT_NAMES
    shape: tuple[int, int, int] = (1, 8, 8)

    @classmethod
    def load(cls, train: bool) -> Digits:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        kept, held_out = train_test_split(
            np.arange(len(digits.target)), test_size=HELD_OUT_SHARE, stratify=digits.target, random_state=HELD_OUT_SEED
        )
        chosen = np.sort(kept if train else held_out)
        images = np.rint(digits.images[chosen, None] * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 … 16
        return cls(torch.from_numpy(images), torch.from_numpy(digits.target[chosen]))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        labels = self.labels[list(indices)]
        captions = [(f"a handwritten {self.class_names[label]}",) for label in labels]
        return Batch(self.images[list(indices)], labels, captions)


@dataclass(frozen=True)
class Photos:
    """Crops of scikit-learn's two sample photographs: the training part from the left, the held-out from the right.

    There are equally many of each photograph, at positions with a fixed seed.
    """

    photos: Sequence[np.ndarray]
    """(H, W, 3) uint8 each."""
    corners: np.ndarray
    """(N, 2) row and column of each crop's upper left corner."""
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = PHOTO_NAMES

    @classmethod
    def load(cls, shape: tuple[int, int, int], train: bool) -> Photos:
        from sklearn.datasets import load_sample_images

        photos = load_sample_images().images
        border = round(photos[0].shape[1] * (1 - HELD_OUT_SHARE))
        photos = [photo[:, :border] if train else photo[:, border:] for photo in photos]
        count = round(NUM_PHOTO_CROPS * (1 - HELD_OUT_SHARE if train else HELD_OUT_SHARE))
        max_corner = [side - crop for side, crop in zip(photos[0].shape, shape[1:])]
        if min(max_corner) < 0:
            part, (height, width) = "training" if train else "held-out", photos[0].shape[:2]
            raise InputError(
                f"the {part} part of photos is {height}x{width}, got a model for {shape[1]}x{shape[2]} images"
            )
        corners = np.random.default_rng(HELD_OUT_SEED).integers(max_corner, size=(count, 2), endpoint=True)
        return cls(photos, corners, shape)

    def __len__(self) -> int:
        return len(self.corners)

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        labels = np.asarray(indices) % len(self.photos)
        images = np.empty((len(labels), *self.shape), np.uint8)
        for number, (label, (top, left)) in enumerate(zip(labels, self.corners[list(indices)])):
            crop = self.photos[label][top : top + self.shape[1], left : left + self.shape[2]]
            images[number] = rearrange(crop, "H W C -> C H W")
        captions = [(f"a photograph of a {self.class_names[label]}",) for label in labels]
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), captions)


@dataclass(frozen=True)
class Arrays:
    """Images and labels of an .npz, as ADM's evaluator reads them: arr_0 (N, H, W, C) uint8, arr_1 (N,)."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]

    @classmethod
    def load(cls, path: Path, shape: tuple[int, int, int] | None) -> Arrays:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                images = arrays["arr_0"]
                labels = arrays["arr_1"] if "arr_1" in arrays else np.zeros(0)
        except Exception as error:  # a broken archive may raise any type
            raise InputError(f"cannot read images (arr_0) of {path}: {one_line(error, 100)}") from None
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8 or len(images) < MIN_IMAGES:
            found = f"{images.shape} {images.dtype}"
            raise InputError(f"arr_0 of {path} must be uint8 images (N, H, W, 1 or 3), two or more, got {found}")
        found_shape = (images.shape[3], *images.shape[1:3])
        if shape not in (None, found_shape):
            raise InputError(f"images of {path} are {found_shape}, expected {shape}")
        labelled = labels.shape == (len(images),) and labels.dtype.kind in "iu"
        if labelled and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
            raise InputError(
                f"arr_1 of {path} must be labels of 0 to {MAX_CLASSES - 1}, got {labels.min()} to {labels.max()}"
            )
        if not labelled:
            return cls(images, np.zeros(len(images), np.int64), (), found_shape)
        return cls(images, labels.astype(np.int64), tuple(map(str, range(labels.max() + 1))), found_shape)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        chosen = list(indices)
        images = rearrange(torch.from_numpy(self.images[chosen]), "B H W C -> B C H W")
        return Batch(images, torch.from_numpy(self.labels[chosen]), [])
