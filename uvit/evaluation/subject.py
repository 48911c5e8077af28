"""Finds the images to evaluate and the reference to compare them with, before the long work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uvit.common.errors import InputError
from uvit.config import Config, DataConfig
from uvit.data.batch import ImageData, ImageSpec
from uvit.data.datasets import HubData, load_images
from uvit.evaluation.features import Features
from uvit.evaluation.judge import choose_captions, choose_labels
from uvit.evaluation.metrics import Gaussian, is_statistics, load_statistics
from uvit.networks.contract import Network
from uvit.networks.encoders import Encoders
from uvit.sampling.conditions import Condition

OWN_PARTS = ("train", "test")
"""The parts of a run's data, which can be named as references."""


@dataclass(frozen=True)
class GivenImages:
    """Existing images."""

    name: str
    """Folder, data set or .npz."""
    data: ImageData

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.data.shape

    @property
    def num_classes(self) -> int:
        """Number of classes of the images; 0 for none."""
        return len(self.data.class_names)


@dataclass(frozen=True)
class DrawnImages:
    """Images that a run draws."""

    name: str
    """Its checkpoint."""
    config: Config
    model: Network
    encoders: Encoders
    weak: Network | None = None
    """The network that guidance leads away from; None for the empty condition."""
    weak_name: str | None = None
    """Its run or checkpoint."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        if self.encoders.image is None:
            return (self.config.model.in_chans, *self.config.model.image_shape)
        height, width = (side * self.encoders.image.factor for side in self.config.model.image_shape)
        return 3, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes that the run draws; 0 for none."""
        return self.config.model.num_classes


Subject = GivenImages | DrawnImages


def find_images(name: str, split: str) -> GivenImages:
    """Finds the images of a folder, a data set or an .npz, which must all have the shape of the first.

    Raises:
        InputError: as load_images.
    """
    source = DataConfig(name=name, train_split=split)
    return GivenImages(name, load_images(source, ImageSpec(None, labels=None, captions=False)))


def find_own_part(run: DrawnImages, part: str) -> ImageData:
    """Finds the training or held-out part of a run's data.

    Raises:
        InputError: a folder of latents, or data without such a part.
    """
    data = run.config.data
    if data.autoencoder is not None:
        raise InputError(f"--reference {part!r} of {data.name!r} is latents: give a data set or an .npz")
    captions = True if run.config.model.context_dim else None
    # Random crops would make the reference random.
    data = dataclasses.replace(data, crop="center")
    try:
        return load_images(data, ImageSpec(run.shape, labels=None, captions=captions), train=part == "train")
    except InputError as error:
        raise InputError(f"{error}; --reference can be the data's other part, a data set or an .npz") from None


def find_other_part(subject: Subject, reference: str) -> ImageData | None:
    """Finds the part of a run's data that is not the reference: its distance is the one that real images reach.

    Returns:
        The part, or None if the reference is not a part of the run's data, or there is no other part.
    """
    if isinstance(subject, GivenImages) or subject.config.data.autoencoder or reference not in OWN_PARTS:
        return None
    with suppress(InputError):
        return find_own_part(subject, OWN_PARTS[1 - OWN_PARTS.index(reference)])
    return None


def find_reference(
    subject: Subject, name: str, split: str, caption_column: str | None, features: str, network: Features
) -> Gaussian | ImageData:
    """Finds the reference that images are compared with.

    Args:
        subject: the images to evaluate.
        name: `train` or `test` of a run's data; a data set or folder of images; or an .npz of statistics or images.
        split: of a data set.
        caption_column: of a data set, for a text model; None is that of the run's data.
        features: name of the features.
        network: computes the features.

    Raises:
        InputError: nothing there, or statistics of other features.
    """
    run = subject if isinstance(subject, DrawnImages) else None
    if run is not None and name in OWN_PARTS:
        return find_own_part(run, name)
    if is_statistics(Path(name)):
        return load_statistics(Path(name), features, network.num_features, subject.shape[1:], network.weights_hash)
    captions = True if run is not None and run.config.model.context_dim else None
    column = caption_column or (run.config.data.caption_column if run is not None else None)
    source = DataConfig(name=name, train_split=split, caption_column=column)
    data = load_images(source, ImageSpec(subject.shape, labels=None, captions=captions))
    if run is None and subject.shape[0] == 1 and isinstance(data, HubData) and not data.is_grey:
        raise InputError(f"the images of {subject.name} are grey, expected colours as in the reference {name!r}")
    return data


def choose_conditions(
    run: DrawnImages,
    reference: ImageData | None,
    name: str,
    num_images: int,
    mode: Literal["balanced", "random"],
    seed: int,
) -> tuple[Sequence[Condition], Sequence[int] | None]:
    """Chooses the conditions of the images to draw, and returns them with the labels that the images should have.

    Args:
        run: the run that draws.
        reference: images with captions, for a text model; None if the reference is only statistics.
        name: of the reference.
        num_images: images to draw.
        mode: as for `choose_labels` and `choose_captions`.
        seed: of the random choice.

    Raises:
        InputError: as choose_labels and choose_captions, or a text model without captions to draw.
    """
    model = run.config.model
    if model.num_classes:
        labels = choose_labels(num_images, model.num_classes, mode, seed)
        return labels, labels
    if not model.context_dim:
        return [None] * num_images, None
    if reference is None:
        raise InputError(f"a text model draws the captions of a reference data set, got statistics {name!r}")
    return choose_captions(reference, num_images, mode, seed)
