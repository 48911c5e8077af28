"""Evaluates images, drawn from a run or given: figures, and the protocol of how they were measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import exists, isdir
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from uvit.common.errors import InputError
from uvit.common.messages import warn
from uvit.config import EVALUATION_FILE, INCEPTION, MAX_IMAGES, MAX_WORKERS
from uvit.data.batch import ImageData
from uvit.evaluation.features import PIXELS, Features, build_features
from uvit.evaluation.judge import (
    MAX_SMALL,
    Classifier,
    ImageStatistics,
    build_classifier,
    draw_with_progress,
    read_with_progress,
)
from uvit.evaluation.metrics import (
    KID_SAMPLES,
    KID_SUBSETS,
    MIN_KERNEL_IMAGES,
    SCORE_SPLITS,
    Gaussian,
    describe_statistics,
    frechet_distance,
    kernel_distance,
)
from uvit.evaluation.protocol import describe_drawing, describe_features, versions
from uvit.evaluation.subject import (
    OWN_PARTS,
    DrawnImages,
    GivenImages,
    Subject,
    choose_conditions,
    find_images,
    find_other_part,
    find_own_part,
    find_reference,
)
from uvit.sampling.runs import DrawArguments

BATCH_SIZE = 64  # for images that are read, not drawn
DRAWING_OPTIONS = {field.name for field in dataclasses.fields(DrawArguments)} - {"checkpoint", "batch_size", "compile"}
DRAWING_OPTIONS |= {"num_images", "label_mode", "caption_column"}

Results = dict[str, Any]
"""Figures by name."""
Protocol = dict[str, str]
"""How they were measured."""


@dataclass(frozen=True, kw_only=True)
class MeasureArguments(DrawArguments):
    checkpoint: str = ""
    """Run folder to draw the images from, such as runs/digits; or give --images."""
    images: str | None = None
    """Folder of images, data set, or .npz as written by sample.py, instead of a checkpoint."""
    reference: str = "test"
    """`test` or `train` of the run's data; a data set or folder of images; or an .npz of statistics or images."""
    split: str = "train"
    """Split of data sets given by --images or --reference."""
    caption_column: str | None = None
    """Column of captions in a reference for text models; None is that of the run's data."""
    num_images: int = 2000
    """Number of images to draw."""
    label_mode: Literal["balanced", "random"] = "balanced"
    """Equally many images of each label, or random labels; for captions without labels, the reference's first ones, or
    random ones."""
    features: str = "auto"
    """Features to compare: `pixels`, `inception` (FID, KID, Inception score) or `timm:MODEL`; `auto` is pixels for
    small images and inception for others."""
    feature_weights: str | None = None
    """File of the feature network's weights, if they cannot be downloaded."""
    classifier: str = "auto"
    """Classifier to recognise labels with: `svm`, `timm:MODEL` or `none`; `auto` is the SVM for small images."""
    classifier_weights: str | None = None
    """File of the classifier's weights (safetensors), if they cannot be downloaded."""
    num_workers: int = 0
    """Loader processes for images on disk."""
    output: str | None = None
    """JSON file for the figures and their protocol; None is evaluation.json in the run's folder, IMAGES.evaluation.json
    for --images, or evaluation.json in the current folder for a run or data set of the hub."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_images", self.num_images >= 2, "at least 2")
        self._require("num_workers", self.num_workers >= 0, "at least 0")
        self._require_at_most(num_images=MAX_IMAGES, num_workers=MAX_WORKERS)
        if bool(self.checkpoint) == bool(self.images):
            raise InputError(f"give --checkpoint or --images, got {'both' if self.images else 'neither'}")
        if self.images and self.reference in OWN_PARTS:
            raise InputError(f"--reference {self.reference!r} needs --checkpoint: give a data set, a folder or an .npz")
        for each in dataclasses.fields(MeasureArguments) if self.images else ():
            value = getattr(self, each.name)
            if each.name in DRAWING_OPTIONS and value != each.default:
                raise InputError(f"--{each.name} is for images to draw from a --checkpoint, got {value} with --images")

    @property
    def output_file(self) -> Path:
        """Path of the JSON file for the figures."""
        source = self.images or self.checkpoint
        if self.output or not exists(source):
            return Path(self.output or EVALUATION_FILE)
        if isdir(source) and not self.images:
            return Path(source, EVALUATION_FILE)
        return Path(f"{Path(source)}.{EVALUATION_FILE}")


def measure(given: MeasureArguments, state: PartialState) -> tuple[Results, Protocol]:
    """Evaluates images.

    Args:
        given: which images, reference, features and classifier.
        state: which process this is; each takes its share of the images.

    Returns:
        The figures and their protocol, complete on the main process.

    Raises:
        InputError: images, references or networks that cannot be loaded, or that do not fit together.
    """
    # All that may fail comes before the long work.
    subject: Subject
    if given.images is not None:
        subject = find_images(given.images, given.split)
    else:
        subject = DrawnImages(given.checkpoint, *given.load(default_guidance=1.0))
    features, network = _build_features(given, subject)
    reference = find_reference(subject, given.reference, given.split, given.caption_column, features, network)
    real_images = None if isinstance(reference, Gaussian) else reference
    if isinstance(subject, DrawnImages):
        mode, seed = given.label_mode, given.seed
        conditions, labels = choose_conditions(subject, real_images, given.reference, given.num_images, mode, seed)
    classifier = _build_classifier(given, subject, real_images, state)
    other = find_other_part(subject, given.reference) if features == PIXELS else None
    network.to(state.device)

    def read_statistics(data: ImageData, classifier: Classifier | None = None) -> ImageStatistics:
        batches = read_with_progress(data, given.batch_size or BATCH_SIZE, given.num_workers, state)
        return ImageStatistics(network, len(data), state).update(batches, classifier)

    if isinstance(subject, GivenImages):
        seen = read_statistics(subject.data, classifier)
        protocol = {"images": f"{seen.moments.count} of {subject.name}"}
    else:
        run = subject.model, subject.config, subject.encoders
        batches = draw_with_progress(*run, conditions, labels, seed, given.batch_size, state)
        seen = ImageStatistics(network, len(conditions), state).update(batches, classifier)
        protocol = describe_drawing(subject.name, *run, conditions, mode, seed)
    protocol["images"] += f", hash {seen.hash}"
    if state.is_main_process and seen.moments.count <= network.num_features:
        few = f"{seen.moments.count} images for {network.num_features} features"
        warn(f"{few}: with so few, a Fréchet distance is not reliable")

    results: Results = {}
    if isinstance(reference, Gaussian):
        target = reference
        protocol["reference"] = f"{given.reference}: {describe_statistics(Path(given.reference))}, hash {target.hash}"
    else:
        real = read_statistics(reference, classifier)
        target = real.moments.gaussian
        protocol["reference"] = _describe_reference(given, subject, real)
        results["recognised_real"] = real.recognised
        if features == INCEPTION and min(seen.moments.count, real.moments.count) >= MIN_KERNEL_IMAGES:
            samples = (each.sample.gather(state.device) for each in (seen, real))
            results["kid"], results["kid_deviation"], subset = kernel_distance(*samples)
            protocol["kid"] = f"{KID_SUBSETS} subsets of {subset}, of {KID_SAMPLES} images or fewer of each"
    results["recognised"] = seen.recognised
    results["frechet"] = frechet_distance(seen.moments.gaussian, target)
    if other is not None:
        results["frechet_real"] = frechet_distance(read_statistics(other).moments.gaussian, target)
    if seen.score is not None:
        results["inception_score"], results["inception_score_deviation"] = seen.score.compute()
        protocol["inception_score"] = f"{SCORE_SPLITS} random splits"
    protocol |= {
        "features": describe_features(features, network),
        "classifier": "none" if classifier is None else classifier.description,
        "versions": versions(),
    }
    return {name: value for name, value in results.items() if value is not None}, protocol


def _is_small(subject: Subject) -> bool:
    return math.prod(subject.shape) <= MAX_SMALL


def _build_features(given: MeasureArguments, subject: Subject) -> tuple[str, Features]:
    """Returns the features' name, with `auto` resolved, and the features."""
    auto = PIXELS if _is_small(subject) else INCEPTION
    name = auto if given.features == "auto" else given.features
    return name, build_features(name, given.feature_weights, subject.shape)


def _build_classifier(
    given: MeasureArguments, subject: Subject, reference: ImageData | None, state: PartialState
) -> Classifier | None:
    """Returns the classifier, with `auto` resolved; None for `none`."""
    real = None
    if isinstance(subject, DrawnImages) and subject.config.data.autoencoder is None and _is_small(subject):
        real = find_own_part(subject, "train")
    auto = "svm" if real is not None and real.class_names else "none"
    name = auto if given.classifier == "auto" else given.classifier
    if name == "none":
        return None
    classifier = build_classifier(name, given.classifier_weights, real, state.device)
    labelled = {subject.name: subject.num_classes}
    if reference is not None:
        labelled[given.reference] = len(reference.class_names)
    check_classes(classifier, labelled)
    return classifier


def _describe_reference(given: MeasureArguments, subject: Subject, real: ImageStatistics) -> str:
    """Describes the reference."""
    named = f"{given.reference}, split {given.split}"
    if isinstance(subject, DrawnImages) and given.reference in OWN_PARTS:
        named = f"{given.reference} part of {subject.config.data.name}"
    size = "x".join(map(str, subject.shape[1:]))
    return f"{named}: {real.moments.count} images, centre crops of {size}, hash {real.hash}"


def check_classes(classifier: Classifier, labelled: Mapping[str, int]) -> None:
    """Checks that the labels of images are a classifier's classes.

    Args:
        classifier: what recognises the labels.
        labelled: number of classes of each set of images, by its name; 0 for no labels.

    Raises:
        InputError: another number of classes, or no labels at all.
    """
    for what, num_classes in labelled.items():
        # An .npz does not say how many classes there are, so its largest label may be a lower one.
        fewer = 0 < num_classes < classifier.num_classes and Path(what).suffix != ".npz"
        if fewer or num_classes > classifier.num_classes:
            found = f"{what} has labels of {num_classes} classes"
            raise InputError(f"the classifier knows {classifier.num_classes} classes, {found}: give --classifier none")
    if not any(labelled.values()):
        raise InputError(f"a classifier needs labels to recognise, got none of {' or '.join(labelled)}")
