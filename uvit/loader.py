"""Data sets to an endless stream of batches.

Which images form the batch of a step, and what is left to chance in reading them, is a function of (seed, step) alone,
so a resumed run sees the data that an uninterrupted one would, whatever the number of workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from uvit.config import Config, TrainConfig
from uvit.data import Batch, ImageData
from uvit.errors import InputError


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
