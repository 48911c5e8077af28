"""Collects the statistics of a set of images, drawn or read, and classifies them; each process takes its share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from uvit.common.errors import InputError
from uvit.config import TIMM, Config
from uvit.data.batch import ImageData, read_all
from uvit.data.images import to_unit_range
from uvit.data.loader import read_in_parts
from uvit.diffusion.samplers import num_evaluations
from uvit.evaluation.features import JUDGE, Features, JudgeFeatures, TimmFeatures, require_labels
from uvit.evaluation.metrics import FeatureSample, ImageHash, InceptionScore, Moments, shuffled_places
from uvit.networks.contract import Network
from uvit.networks.encoders import Encoders
from uvit.sampling.conditions import Condition
from uvit.sampling.generate import generate_batches

SVM, SVM_C = "svm", 10.0

Labelled = tuple[Tensor, Tensor | None]
"""(B, C, H, W) uint8 images, and their (B,) labels if they have any."""


class Classifier(NamedTuple):
    """A classifier of images."""

    classify: Callable[[Tensor], Tensor]
    """(B, C, H, W) uint8 images to (B,) labels."""
    num_classes: int
    description: str


class ImageStatistics:
    """Statistics of a set of images: moments and a sample of their features, scores, and how many are recognised.

    Args:
        network: from `build_features`.
        num_images: images of all processes.
        state: which process this is; of N processes, it gets every N-th image.
    """

    def __init__(self, network: Features, num_images: int, state: PartialState) -> None:
        exact = state.device if state.device.type == "cuda" else torch.device("cpu")  # a device with float64
        self.network, self.state = network, state
        self.places = shuffled_places(num_images)[state.process_index :: state.num_processes]
        self.moments = Moments(network.num_features, exact)
        self.sample = FeatureSample(network.num_features)
        self.score = InceptionScore(network.num_classes, num_images, exact) if network.num_classes else None
        self.hits = torch.zeros(2, dtype=torch.float64, device=exact)  # classified correctly, and in total
        self.hash = ""

    @torch.no_grad()
    def update(self, batches: Iterator[Labelled], classifier: Classifier | None = None) -> ImageStatistics:
        """Adds the images of this process, then sums over all processes; returns itself."""
        image_hash, seen = ImageHash(), 0
        for images, labels in batches:
            places = self.places[seen : seen + len(images)]
            seen += len(images)
            image_hash.update(images)
            features, logits = self.network(images.to(self.state.device))
            self.moments.update(features)
            self.sample.update(features, places)
            if self.score is not None:
                self.score.update(logits, places)
            if classifier is not None and labels is not None:
                right = (classifier.classify(images).cpu() == labels.cpu()).sum()
                self.hits += torch.tensor([right, len(labels)]).to(self.hits)
        self.moments.reduce()
        self.hits = reduce(self.hits, "sum")
        self.hash = image_hash.compute(self.state.device)
        return self

    @property
    def recognised(self) -> float | None:
        """Fraction of images that are classified as their label; None where none were classified."""
        return (self.hits[0] / self.hits[1]).item() if self.hits[1] else None


def build_classifier(name: str, weights: str | None, train_part: ImageData | None, device: torch.device) -> Classifier:
    """Builds a classifier by name.

    Args:
        name: `svm`, fitted to the pixels of real images; `judge`, trained on them; or `timm:MODEL`, whose classes are
            the labels.
        weights: file of the network's weights; None trains a judge and downloads others, once.
        train_part: the images to fit the SVM to, or to train the judge on.
        device: where the network goes.

    Raises:
        InputError: an unknown name, no labelled images to learn from, or as TimmFeatures.
    """
    if name == JUDGE:
        judge = JudgeFeatures(train_part, weights).to(device)
        description = f"{name}, weights {judge.weights_hash}"
        return Classifier(lambda images: judge(images.to(device))[1].argmax(dim=1), judge.num_classes, description)
    if name.startswith(TIMM):
        network = TimmFeatures(name.removeprefix(TIMM), weights, classify=True).to(device)
        description = f"{name}, weights {network.weights_hash}"
        return Classifier(lambda images: network(images.to(device))[0].argmax(dim=1), network.num_features, description)
    if name != SVM:
        raise InputError(f"classifier must be {SVM!r}, {JUDGE!r}, '{TIMM}MODEL' or 'none', got {name!r}")
    train_part = require_labels(SVM, train_part)
    real = read_all(train_part)
    svm = SVC(C=SVM_C).fit(_pixels(real.images), real.labels)
    description = f"svm on the pixels of {len(real.labels)} training images"
    return Classifier(
        lambda images: torch.from_numpy(svm.predict(_pixels(images))), len(train_part.class_names), description
    )


def _pixels(images: Tensor) -> np.ndarray:
    return to_unit_range(images.cpu()).flatten(1).numpy()


def choose_labels(num_images: int, num_classes: int, mode: Literal["balanced", "random"], seed: int) -> list[int]:
    """Returns the label of each image to draw.

    Raises:
        InputError: a number of images that is not divisible by the number of classes, for `balanced`.
    """
    if mode == "random":
        return np.random.default_rng(seed).integers(num_classes, size=num_images).tolist()
    if num_images % num_classes:
        raise InputError(f"num_images must be a multiple of {num_classes} classes, got {num_images}")
    return [label for label in range(num_classes) for _ in range(num_images // num_classes)]


def choose_captions(
    data: ImageData, num_images: int, mode: Literal["balanced", "random"], seed: int
) -> tuple[list[str], list[int] | None]:
    """Returns a caption for each image to draw, the first of some image in the data, and the labels of these images.

    If the data has labels, `mode` chooses them as in choose_labels; otherwise, the labels are None, `balanced` takes
    the captions in the order of the data, and `random` shuffles them.

    Raises:
        InputError: no captions, or a label without images.
    """
    items: Sequence[int] = range(len(data))
    if not data.class_names:
        if mode == "random":
            items = np.random.default_rng(seed).permutation(len(data)).tolist()
        items = items[:num_images]
    parts = [items[n : n + 256] for n in range(0, len(items), 256)]
    captioned = [
        (texts[0], int(label))
        for part in read_in_parts(data, parts, 0)
        for texts, label in zip(part.captions, part.labels)
    ]
    if not captioned:
        raise InputError("a text model is measured on the captions of a reference data set, got one without captions")
    if not data.class_names:
        return [text for text, _ in itertools.islice(itertools.cycle(captioned), num_images)], None
    labels = choose_labels(num_images, len(data.class_names), mode, seed)
    by_label = {each: [text for text, label in captioned if label == each] for each in set(labels)}
    for label, texts in by_label.items():
        if not texts:
            raise InputError(f"the reference must have a caption of every label, got none of {data.class_names[label]}")
    captions = {label: itertools.cycle(texts) for label, texts in by_label.items()}
    return [next(captions[label]) for label in labels], labels


def read_with_progress(
    data: ImageData, batch_size: int, num_workers: int, state: PartialState, num_images: int | None = None
) -> Iterator[Labelled]:
    """Reads this process's share of a data set, with a progress bar.

    Args:
        data: the images.
        batch_size: images at a time.
        num_workers: loader processes.
        state: which process this is.
        num_images: how many to read if there are more, chosen at random with a fixed seed; None reads all, in order.
    """
    items = [*range(len(data))]
    if num_images is not None and num_images < len(items):
        items = np.random.default_rng(0).permutation(len(items))[:num_images].tolist()
    own_items = items[state.process_index :: state.num_processes]
    parts = [own_items[n : n + batch_size] for n in range(0, len(own_items), batch_size)]
    hidden = not state.is_main_process
    with tqdm(total=len(own_items), unit="image", desc="reading", disable=hidden, dynamic_ncols=True) as progress:
        for part, batch in zip(parts, read_in_parts(data, parts, num_workers)):
            yield batch.images, batch.labels if data.class_names else None
            progress.update(len(part))


def draw_with_progress(
    model: Network,
    config: Config,
    encoders: Encoders,
    conditions: Sequence[Condition],
    labels: Sequence[int] | None,
    seed: int,
    batch_size: int | None,
    state: PartialState,
    weak: Network | None = None,
) -> Iterator[Labelled]:
    """Draws this process's share of images, with a progress bar.

    Args:
        model: the run's network.
        config: the run.
        encoders: the run's encoders.
        conditions: of the images of all processes.
        labels: the expected labels of these images, for a classifier.
        seed: of the set of images.
        batch_size: images at a time; None is the default.
        state: which process this is.
        weak: the network that guidance leads away from; None for the empty condition.
    """
    share = (state.process_index, state.num_processes)
    own_labels = None if labels is None else torch.tensor(labels[share[0] :: share[1]])
    total = len(conditions[share[0] :: share[1]]) * num_evaluations(config.process, config.sample)
    hidden, done = not state.is_main_process, 0
    with tqdm(total=total, unit="eval", desc="drawing", disable=hidden, dynamic_ncols=True) as progress:
        for images in generate_batches(
            model, config, conditions, seed, batch_size, encoders, lambda x: progress.update(len(x)), share, weak
        ):
            yield images, None if own_labels is None else own_labels[done : done + len(images)]
            done += len(images)
