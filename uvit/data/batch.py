"""The interface of data sets: what is read of them, their methods, and the batches that they return."""

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
    """(B, C, H, W) uint8; for a data set of latents, their moments (B, 2C, h, w)."""
    labels: Tensor
    """(B,) int64; zeros where the data has none."""
    captions: Sequence[Sequence[str]]
    """The captions of each item, of which training picks one at random; an empty list where the data has none."""
    context: Tensor | None = None
    """(B, num_context_tokens, context_dim) features of the captions, where the data holds them."""
    empty_context: Tensor | None = None
    """(1, num_context_tokens, context_dim) features of the empty caption, where the data holds them."""
    skipped: Sequence[str] = ()
    """What was wrong with items that were skipped, a line for each."""

    def to(self, device: torch.device) -> Batch:
        """Moves the tensors to a device, asynchronously where possible."""

        def move(part: Any) -> Any:
            return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part

        return Batch(*map(move, self))

    def __add__(self, other: Any) -> Batch:
        """Concatenates two batches of the same data set."""

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
        """Reads items; random choices, such as the position of a crop, are drawn from `rng`.

        Broken items are skipped and listed in the batch if the data's config says so.

        Raises:
            InputError: a broken item, if they are not to be skipped.
        """
        ...


def read_all(data: ImageData) -> Batch:
    """Reads a whole data set."""
    return data.read(range(len(data)), np.random.default_rng(0))


@dataclass(frozen=True)
class ImageSpec:
    """What to read of a data set."""

    shape: tuple[int, int, int] | None
    """(C, H, W) to convert images to; C is 1 for grey, 3 for RGB. None requires all to have the shape of the first."""
    labels: bool | None
    """Whether to read labels; None reads them if the data has them."""
    captions: bool | None
    """Whether to read captions; None reads them if the data has them."""
