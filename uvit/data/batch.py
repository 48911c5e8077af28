"""What a data set gives, what is asked of it, and what every data set can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

MIN_IMAGES = 2


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
class ImageSpec:
    """What is read of a data set."""

    shape: tuple[int, int, int] | None
    """(C, H, W) that images get; C is 1 for grey, 3 for RGB. None is that of the first image, which all must have."""
    labels: bool | None
    """Whether labels are read; None is where the data has them."""
    captions: bool | None
    """Whether captions are read; None is where the data has them."""
