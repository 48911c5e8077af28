"""Data sets: images with labels and captions, read in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from uvit.config import DataConfig
from uvit.errors import InputError
from uvit.hub import quiet_hub
from uvit.images import fit_image, open_image

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_SHARE = 0.2
HELD_OUT_SEED = 0
PHOTO_NAMES = ("temple", "flower")
PHOTO_SHAPE = (3, 32, 32)
NUM_PHOTO_CROPS = 5_000
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
"""Usual names, where a data set has several columns of text."""
MIN_IMAGES = 2
MAX_CLASSES = 100_000


class Batch(NamedTuple):
    """Items of a data set."""

    images: Tensor
    """(B, C, H, W) uint8; of a data set of latents, their moments (B, 2C, h, w)."""
    labels: Tensor
    """(B,) int64; zeros where the data has none."""
    captions: Sequence[Sequence[str]]
    """The captions of each item, of which training draws one; an empty list where the data has none."""
    context: Tensor | None = None
    """(B, num_context_tokens, context_dim) features of the captions, where the data holds them."""
    empty_context: Tensor | None = None
    """(1, num_context_tokens, context_dim) features of the empty caption, where the data holds them."""
    skipped: Sequence[str] = ()
    """What was wrong with items that were left out."""

    def to(self, device: torch.device) -> Batch:
        """Moves the tensors to a device, without waiting for them."""

        def move(part: Any) -> Any:
            return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part

        return Batch(*map(move, self))

    def __add__(self, other: Any) -> Batch:
        """Joins two batches of one data set."""

        def join(a: Any, b: Any) -> Any:
            if isinstance(a, Tensor):
                return torch.cat([a, b])
            return None if a is None else [*a, *b]

        return Batch(*map(join, self, other))._replace(empty_context=self.empty_context)


class ImageData(Protocol):
    """A data set that is read in batches."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, or (C, h, w) of its latents."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        """Reads items; what is left to chance, such as the place of a crop, is drawn from `rng`.

        Broken items are left out and listed where the data's config says so.

        Raises:
            InputError: a broken item, where they are not left out.
        """
        ...


def read_all(data: ImageData) -> Batch:
    """Reads a whole data set."""
    return data.read(range(len(data)), np.random.default_rng(0))


@dataclass(frozen=True)
class Wanted:
    """What is read of a data set."""

    shape: tuple[int, int, int] | None
    """(C, H, W) that images get; C is 1 for grey, 3 for RGB. None is that of the first image, which all must have."""
    labels: bool | None
    """Whether labels are read; None is where the data has them."""
    captions: bool | None
    """Whether captions are read; None is where the data has them."""


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8, every fifth held out (stratified, fixed by a seed)."""

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
    """Crops of scikit-learn's two sample photographs, the training part from their left, the held-out from the right.

    As many crops of each, at places fixed by a seed.
    """

    photos: Sequence[np.ndarray]
    """(H, W, 3) uint8 each."""
    corners: np.ndarray
    """(N, 2) row and column of a crop's upper left."""
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = PHOTO_NAMES

    @classmethod
    def load(cls, shape: tuple[int, int, int], train: bool) -> Photos:
        from sklearn.datasets import load_sample_images

        photos = load_sample_images().images
        border = round(photos[0].shape[1] * (1 - HELD_OUT_SHARE))
        photos = [photo[:, :border] if train else photo[:, border:] for photo in photos]
        count = round(NUM_PHOTO_CROPS * (1 - HELD_OUT_SHARE if train else HELD_OUT_SHARE))
        room = [whole - wanted for whole, wanted in zip(photos[0].shape, shape[1:])]
        if min(room) < 0:
            part, (height, width) = "training" if train else "held-out", photos[0].shape[:2]
            raise InputError(
                f"the {part} part of photos is {height}x{width}, got a model for {shape[1]}x{shape[2]} images"
            )
        corners = np.random.default_rng(HELD_OUT_SEED).integers(room, size=(count, 2), endpoint=True)
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
        except Exception as error:  # a broken archive raises anything
            raise InputError(f"cannot read images (arr_0) of {path}: {' '.join(str(error).split()):.100}") from None
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


@dataclass(frozen=True)
class HubData:
    """Images of a Hugging Face data set, decoded, cropped and converted as they are read."""

    rows: Any
    fingerprint: str
    """Tells the content of data sets apart."""
    shape: tuple[int, int, int]
    cut: bool
    """Whether images are cut to the shape; otherwise they must have it."""
    config: DataConfig
    image_column: str
    label_column: str | None
    caption_column: str | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        columns = self.rows[list(indices)]
        items: list[tuple[np.ndarray, int, Sequence[str]]] = []
        skipped: list[str] = []
        for number, index in enumerate(indices):
            try:
                items.append(self._item(index, {name: values[number] for name, values in columns.items()}, rng))
            except InputError as error:
                if self.config.on_error == "stop":
                    raise
                skipped.append(str(error))
        images = np.stack([item[0] for item in items]) if items else np.empty((0, *self.shape), np.uint8)
        labels = torch.tensor([item[1] for item in items], dtype=torch.int64)
        captions = [] if self.caption_column is None else [item[2] for item in items]
        return Batch(torch.from_numpy(images), labels, captions, skipped=skipped)

    def _item(
        self, index: int, row: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[np.ndarray, int, Sequence[str]]:
        """Pixels, label (0 where there are none) and captions of a row."""
        label = 0 if self.label_column is None else row[self.label_column]
        if label is None or label < 0:
            raise InputError(f"image {index} of the data must have a label of at least 0, got {label}")
        stored = [] if self.caption_column is None else row[self.caption_column]
        texts = [stored] if isinstance(stored, str) else stored
        if self.caption_column is not None and (not texts or None in texts):
            raise InputError(f"image {index} of the data must have a caption, got {stored!r}")
        channels, height, width = self.shape
        with _named(index, row[self.image_column]) as file:
            image = open_image(file, channels)
            if not self.cut and (image.height, image.width) != (height, width):
                found = f"it is {image.height}x{image.width}, the first image {height}x{width}"
                raise InputError(f"{found}: expected one size, or an image_size to which all are cut")
            return fit_image(image, height, width, rng if self.config.crop == "random" else None), label, texts


@contextlib.contextmanager
def _named(index: int, file: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yields a row's image file; whatever is wrong with it becomes an error that names it."""
    try:
        if file is None:
            raise InputError("there is none")
        yield file
    except Exception as error:  # broken files make a decoder raise anything
        name = f" ({file['path']})" if file and file["path"] else ""
        raise InputError(f"image {index} of the data{name} cannot be read: {error}") from None


def load_images(config: DataConfig, wanted: Wanted, train: bool = True) -> ImageData:
    """Loads images.

    Args:
        config: which data, and how images are cropped.
        wanted: what is read of them.
        train: the training part, or the held-out part.

    Raises:
        InputError: data that cannot be found or read, or that lacks what is wanted.
    """
    channels = {"digits": (1,), "photos": (3,)}.get(config.name, (1, 3))
    if wanted.shape is not None and wanted.shape[0] not in channels:
        grey_or_rgb = " or ".join({1: "1 (grey)", 3: "3 (RGB)"}[each] for each in channels)
        raise InputError(f"data {config.name!r} can have {grey_or_rgb} channels, got {wanted.shape[0]}")
    if config.name == "digits":
        if wanted.shape not in (None, Digits.shape):
            raise InputError(f"digits are 1x8x8 images, got a model for {'x'.join(map(str, wanted.shape or ()))}")
        return Digits.load(train)
    if config.name == "photos":
        return Photos.load(wanted.shape or PHOTO_SHAPE, train)
    if Path(config.name).suffix == ".npz":
        return Arrays.load(Path(config.name), wanted.shape)
    return _load_hub(config, wanted, config.train_split if train else config.test_split)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps `datasets` from drawing bars; a download may keep its own."""
    import datasets

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def _load_hub(config: DataConfig, wanted: Wanted, split: str) -> HubData:
    import datasets

    path = Path(config.name)
    is_folder = isdir(path)
    if is_folder and not any(file.is_file() for file in path.rglob("*")):
        raise InputError(
            f"data folder {config.name} is empty: expected images, in a folder a class or not, or a saved data set"
        )
    try:
        if isfile(path / "dataset_dict.json") or isfile(path / "state.json"):
            saved = datasets.load_from_disk(config.name)
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            with quiet_hub(), _without_bars() if is_folder else contextlib.nullcontext():
                rows = datasets.load_dataset(config.name, split=split)
    except Exception as error:  # the library raises a different kind for each way that data can be missing
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot load split {split!r} of data {config.name!r}: {reason:.200}") from None

    def column(
        what: str, fits: Callable[[Any], bool], needed: bool | None, name: str | None = None, usual: Sequence[str] = ()
    ) -> str | None:
        """The column of a kind: the one named, or the only one with a usual name, or the first."""
        found = [each for each, kind in rows.features.items() if fits(kind) and name in (None, each)]
        if needed and not found:
            named, columns = "" if name is None else f" {name!r}", ", ".join(rows.features)
            raise InputError(f"data {config.name!r} must have a column{named} of {what}, got columns {columns}")
        if needed is False or not found:
            return None
        likely = [each for each in found if each in usual] or found
        if usual and len(likely) > 1:
            columns = ", ".join(likely)
            raise InputError(
                f"data {config.name!r} has several columns of {what}, {columns}: name one by caption_column"
            )
        return likely[0]

    image_column = column("images", lambda kind: isinstance(kind, datasets.Image), True) or ""
    if len(rows) < MIN_IMAGES:
        raise InputError(
            f"split {split!r} of data {config.name!r} must have {MIN_IMAGES} images or more, got {len(rows)}"
        )
    label_column = column("labels", lambda kind: isinstance(kind, datasets.ClassLabel), wanted.labels)
    caption_column = column("captions", _is_text, wanted.captions, config.caption_column, CAPTION_COLUMNS)
    class_names = () if label_column is None else tuple(rows.features[label_column].names)
    fingerprint = rows._fingerprint  # before columns are chosen
    read = [name for name in (image_column, label_column, caption_column) if name is not None]
    rows = rows.select_columns(read).cast_column(image_column, datasets.Image(decode=False))  # decoded by open_image
    shape = wanted.shape
    if shape is None:
        with _named(0, rows[0][image_column]) as file:
            first = open_image(file, 3)
        shape = (3, first.height, first.width)
    return HubData(
        rows,
        fingerprint,
        shape,
        wanted.shape is not None,
        config,
        image_column,
        label_column,
        caption_column,
        class_names,
    )


def _is_text(kind: Any) -> bool:
    """Tells whether a column of `datasets` holds a string, or a list of strings, for each row."""
    return getattr(getattr(kind, "feature", kind), "dtype", None) in ("string", "large_string")
