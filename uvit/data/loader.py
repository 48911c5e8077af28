"""A run's data as an endless stream of batches.

The images in the batch of a step, and the random choices in reading them, depend only on (seed, step), so a resumed run
sees the same data as an uninterrupted one, whatever the number of workers.
"""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from uvit.common.errors import InputError
from uvit.common.signals import ignore_stop_signals, kill_workers
from uvit.config import Config, DataConfig, NetworkConfig, TrainConfig
from uvit.data.batch import Batch, ImageData, ImageSpec
from uvit.data.datasets import load_images
from uvit.data.latents import load_latents
from uvit.data.manifest import is_latent_data

MAX_REPLACEMENTS = 20


def load_data(config: DataConfig, model: NetworkConfig, train: bool = True) -> ImageData:
    """Loads the training part of a data set, or the held-out part, in the form that a model needs.

    Args:
        config: which data.
        model: the shape to convert images to, and whether labels or captions are needed.
        train: whether to load the training part, rather than the held-out part.

    Raises:
        InputError: data that cannot be found or read, or that does not fit the model.
    """
    if is_latent_data(config.name):
        data: ImageData = load_latents(config, model)
    elif config.autoencoder is not None:
        name = f"data {config.name!r}"
        raise InputError(
            f"{name} is not a folder of latents, got data.autoencoder {config.autoencoder!r}: make it with encode.py"
        )
    else:
        spec = ImageSpec((model.in_chans, *model.image_shape), model.num_classes > 0, model.context_dim > 0)
        data = load_images(config, spec, train)
    num_classes = len(data.class_names)
    if model.num_classes and model.num_classes != num_classes:
        raise InputError(f"model.num_classes must be {num_classes} for data {config.name!r}, got {model.num_classes}")
    return data


class Draw(NamedTuple):
    """What a process reads for a batch."""

    indices: list[int]
    key: tuple[int, ...]
    """Seed of the random choices in reading."""


class StepSampler:
    """Yields Draws endlessly: epoch after epoch of a shuffled data set, each process with its own slice of a batch.

    Args:
        num_items: length of the data set.
        batch_size: items of a batch over all processes.
        seed: seed of the order.
        start: number of the first batch.
        rank: of this process.
        world_size: number of processes.
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
    """The batches of a process, one for each Draw."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitem__(self, draw: Draw) -> Batch:
        rng = np.random.default_rng(draw.key)
        batch = self.data.read(draw.indices, rng)
        for _ in range(MAX_REPLACEMENTS):  # replaces skipped items by others
            missing = len(draw.indices) - len(batch.labels)
            if not missing:
                captions = [[texts[int(rng.integers(len(texts)))]] for texts in batch.captions]
                return batch._replace(captions=captions)
            batch = batch + self.data.read(rng.integers(len(self.data), size=missing).tolist(), rng)
        raise InputError(f"too many broken images, {len(batch.skipped)} for one batch, the last: {batch.skipped[-1]}")


class _Parts(Dataset[Batch]):
    """Parts of a data set, by the indices of their items."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitem__(self, part: Sequence[int]) -> Batch:
        return self.data.read(part, np.random.default_rng(0))


def read_in_parts(data: ImageData, parts: Sequence[Sequence[int]], num_workers: int) -> Iterator[Batch]:
    """Reads parts of a data set once, in order; skipped items are not replaced."""
    return iter(DataLoader(_Parts(data), sampler=parts, batch_size=None, num_workers=num_workers))


def check_batch(config: TrainConfig, world_size: int) -> int:
    """Returns the number of images in one accumulated part of a batch, over all processes.

    Raises:
        InputError: a part that is not divisible by the number of processes.
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
    """Builds the endless loader of one process, starting at the first part of optimizer step `start_step`.

    Raises:
        InputError: as check_batch.
    """
    accumulation = config.train.accumulation_steps
    part_size = check_batch(config.train, world_size)
    sampler = StepSampler(len(data), part_size, config.train.seed, start_step * accumulation, rank, world_size)
    workers = config.data.num_workers
    if workers:
        atexit.register(kill_workers)
    return DataLoader(
        _Batches(data),
        sampler=sampler,
        batch_size=None,  # the sampler yields whole batches
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
    )
