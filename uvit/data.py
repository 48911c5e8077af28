"""Data sets to batches of uint8 images, labels and captions.

Which images form the batch of a step is a function of (seed, step) alone, so a resumed run sees the data that an
uninterrupted one would, whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from uvit.config import Config, DataConfig, TrainConfig, UViTConfig
from uvit.errors import InputError
from uvit.hub import quiet_hub

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_SHARE = 0.2
HELD_OUT_SEED = 0


class Batch(NamedTuple):
    """Items of a data set."""

    images: Tensor
    """(B, C, H, W) uint8."""
    labels: Tensor
    """(B,) int64; zeros where the data has none."""
    captions: list[str]
    """B texts; none where the data has none."""

    def to(self, device: torch.device) -> Batch:
        """Moves the tensors to a device, without waiting for them."""
        return self._replace(
            images=self.images.to(device, non_blocking=True), labels=self.labels.to(device, non_blocking=True)
        )


class ImageData(Protocol):
    """A data set that is read in batches."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        """Reads items; what is left to chance, such as which of an image's captions, is drawn from `rng`."""
        ...


def read_all(data: ImageData) -> Batch:
    """Reads a whole data set."""
    return data.read(range(len(data)), np.random.default_rng(0))


@dataclass(frozen=True)
class TensorData:
    """Images held in memory."""

    images: Tensor
    labels: Tensor
    captions: Sequence[str]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        chosen = list(indices)
        return Batch(self.images[chosen], self.labels[chosen], [self.captions[index] for index in chosen])


@dataclass(frozen=True)
class HubData:
    """Images of a Hugging Face data set, decoded, cropped to the model's shape and converted as they are read."""

    rows: Any
    image_column: str
    label_column: str | None
    caption_column: str | None
    class_names: tuple[str, ...]
    model: UViTConfig

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        rows = self.rows[list(indices)]
        images = np.stack([self._pixels(*pair) for pair in zip(indices, rows[self.image_column])])
        labels = [0] * len(indices) if self.label_column is None else rows[self.label_column]
        for index, label in zip(indices, labels):
            if label is None or label < 0:
                raise InputError(f"image {index} of the data must have a label of at least 0, got {label}")
        stored = [] if self.caption_column is None else rows[self.caption_column]
        captions = [self._caption(index, texts, rng) for index, texts in zip(indices, stored)]
        return Batch(torch.from_numpy(images), torch.tensor(labels), captions)

    def _caption(self, index: int, stored: str | Sequence[str] | None, rng: np.random.Generator) -> str:
        """The caption of an image, or any one of several."""
        texts = [stored] if isinstance(stored, str) else stored
        if not texts or None in texts:
            raise InputError(f"image {index} of the data must have a caption, got {stored!r}")
        return texts[int(rng.integers(len(texts)))]

    def _pixels(self, index: int, stored: Any) -> np.ndarray:
        """(C, H, W) uint8 of a stored image: upright, scaled to cover the model's shape, and centre-cropped."""
        height, width = self.model.image_shape
        try:
            file = Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))
            image = ImageOps.exif_transpose(file).convert("L" if self.model.in_chans == 1 else "RGB")
        except Exception as error:  # broken files make a decoder raise anything
            name = stored["path"] if stored else None
            raise InputError(f"image {index} of the data ({name}) cannot be read: {error}") from None
        pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
        return rearrange(pixels, "H W -> 1 H W" if pixels.ndim == 2 else "H W C -> C H W")


def load_data(config: DataConfig, model: UViTConfig, train: bool = True) -> ImageData:
    """Loads the training part of a data set, or the part held out.

    Args:
        config: which data.
        model: the shape that images get.
        train: the training part, or the held-out part.

    Raises:
        InputError: data that cannot be found or read, or that does not fit the model.
    """
    data = _load_digits(train) if config.name == "digits" else _load_hub(config, model, train)
    if config.name == "digits" and (model.in_chans, *model.image_shape) != (1, 8, 8):
        raise InputError(
            f"digits are 1x8x8 images, got a model for {model.in_chans}x{'x'.join(map(str, model.image_shape))}"
        )
    if config.autoencoder is not None:
        raise InputError(
            f"data {config.name!r} has images, got a model of latents (autoencoder {config.autoencoder!r})"
        )
    num_classes = len(data.class_names)
    if model.num_classes and model.num_classes != num_classes:
        raise InputError(f"model.num_classes must be {num_classes} for data {config.name!r}, got {model.num_classes}")
    return data


def _load_digits(train: bool) -> TensorData:
    """scikit-learn's 1,797 handwritten digits, 8x8, every fifth held out (stratified, fixed by a seed)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    kept, held_out = train_test_split(
        np.arange(len(digits.target)), test_size=HELD_OUT_SHARE, stratify=digits.target, random_state=HELD_OUT_SEED
    )
    chosen = np.sort(kept if train else held_out)
    images = np.rint(digits.images[chosen, None] * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 … 16
    labels = digits.target[chosen]
    captions = [f"a handwritten {DIGIT_NAMES[label]}" for label in labels]
    return TensorData(torch.from_numpy(images), torch.from_numpy(labels), captions, DIGIT_NAMES)


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


def _load_hub(config: DataConfig, model: UViTConfig, train: bool) -> HubData:
    import datasets

    split = config.train_split if train else config.test_split
    path = Path(config.name)
    if path.is_dir() and not any(file.is_file() for file in path.rglob("*")):
        raise InputError(
            f"data folder {config.name} is empty: expected images in a folder a class, or a saved data set"
        )
    if model.in_chans not in (1, 3):
        raise InputError(f"model.in_chans must be 1 (grey) or 3 (RGB) for images, got {model.in_chans}")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = datasets.load_from_disk(config.name)
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            with quiet_hub(), _without_bars() if path.is_dir() else contextlib.nullcontext():
                rows = datasets.load_dataset(config.name, split=split)
    except Exception as error:  # the library raises a different kind for each way that data can be missing
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot load split {split!r} of data {config.name!r}: {reason:.200}") from None

    image_column = _find_column(rows.features, config, "images", lambda kind: isinstance(kind, datasets.Image))
    label_column = caption_column = None
    if model.num_classes:
        label_column = _find_column(rows.features, config, "labels", lambda kind: isinstance(kind, datasets.ClassLabel))
    if model.context_dim:
        caption_column = _find_column(rows.features, config, "captions", _is_text, config.caption_column)
    class_names = tuple(rows.features[label_column].names) if label_column else ()
    if not len(rows):
        raise InputError(f"split {split!r} of data {config.name!r} must have images, got none")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))  # decoded by us, who can name a broken one
    return HubData(rows, image_column, label_column, caption_column, class_names, model)


def _find_column(
    features: Mapping[str, Any], config: DataConfig, what: str, fits: Callable[[Any], bool], name: str | None = None
) -> str:
    """Returns the column of a kind: the first, or the one named."""
    found = [column for column, kind in features.items() if fits(kind) and name in (None, column)]
    if not found:
        named = "" if name is None else f" {name!r}"
        columns = ", ".join(features)
        raise InputError(f"data {config.name!r} must have a column{named} of {what}, got columns {columns}")
    return found[0]


def _is_text(kind: Any) -> bool:
    """Tells whether a column of `datasets` holds a string, or a list of strings, for each row."""
    return getattr(getattr(kind, "feature", kind), "dtype", None) == "string"


class Draw(NamedTuple):
    """What a process reads for a batch."""

    indices: list[int]
    key: tuple[int, ...]
    """Seeds what is left to chance."""


class StepSampler:
    """Endless draws: epoch after epoch of a shuffled data set, each process its own slice of a batch.

    Args:
        num_items: length of the data set.
        batch_size: items of a batch over all processes.
        seed: seed of the order.
        start: first batch.
        rank, world_size: which of how many processes this is.
    """

    def __init__(
        self, num_items: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.start, self.rank, self.world_size = start, rank, world_size

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_items)

    def __iter__(self) -> Iterator[Draw]:
        epoch, position = divmod(self.start * self.batch_size, self.num_items)
        order = self._order(epoch)
        for number in itertools.count(self.start):
            batch: list[int] = []
            while len(batch) < self.batch_size:  # the end of one epoch and the start of the next share a batch
                part = order[position : position + self.batch_size - len(batch)]
                batch += part.tolist()
                position += len(part)
                if position == self.num_items:
                    epoch, position = epoch + 1, 0
                    order = self._order(epoch)
            yield Draw(batch[self.rank :: self.world_size], (self.seed, number, self.rank))


class _Batches(Dataset[Batch]):
    """Whole batches as the items of a DataLoader."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitem__(self, draw: Draw) -> Batch:
        return self.data.read(draw.indices, np.random.default_rng(draw.key))


def check_batch(config: TrainConfig, world_size: int) -> int:
    """Returns the images of one part of a batch over all processes.

    Raises:
        InputError: a part that the processes do not divide.
    """
    part_size = config.batch_size // config.accumulation_steps
    if part_size % world_size:
        raise InputError(
            f"train.batch_size / train.accumulation_steps must be divisible by {world_size} processes, got {part_size}"
        )
    return part_size


def build_loader(
    data: ImageData, config: Config, start_step: int, rank: int, world_size: int, pin_memory: bool
) -> DataLoader[Batch]:
    """Builds the endless loader of one process, from the first part of optimizer step `start_step` on.

    Raises:
        InputError: a batch that the processes do not divide.
    """
    accumulation = config.train.accumulation_steps
    part_size = check_batch(config.train, world_size)
    sampler = StepSampler(len(data), part_size, config.train.seed, start_step * accumulation, rank, world_size)
    workers = config.data.num_workers
    return DataLoader(
        _Batches(data),
        sampler=sampler,
        batch_size=None,  # the sampler yields whole batches
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )


def to_unit_range(images: Tensor) -> Tensor:
    """Maps uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Maps float images in [-1, 1] to uint8, clipped and rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each of (B, C, H, W) images with probability 1/2, on their device."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(-1), images)
