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
from uvit.config import EVALUATION_FILE, INCEPTION, MAX_IMAGES, MAX_WORKERS, WIDTHS, are_widths
from uvit.data.batch import ImageData
from uvit.evaluation.features import JUDGE, PIXELS, build_features
from uvit.evaluation.judge import (
    SVM,
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

WIDTHS_FILE = "widths.json"
"""Figures of each width, beside the EVALUATION_FILE of the run's own weights."""
BATCH_SIZE = 64  # for images that are read, not drawn
MAX_SVM = 256
"""Largest number of values in an image for which an SVM on its pixels is fast and good."""
MAX_SMALL = 1024
"""Largest number for which `auto` does without Inception, which is made for photographs."""
DRAWING_OPTIONS = {field.name for field in dataclasses.fields(DrawArguments)} - {"checkpoint", "batch_size", "compile"}
DRAWING_OPTIONS |= {"widths", "num_images", "label_mode", "caption_column"}

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
    widths: tuple[float, ...] = ()
    """Relative widths of averages, rebuilt as by `python -m uvit average`, to measure instead of the run's weights."""
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
    """Features to compare: `pixels`, `judge` (of a small network that learns the labels of the run's training part),
    `inception` (FID, KID, Inception score) or `timm:MODEL`. `auto` is pixels for images of up to 256 values, or up to
    1024 without labels; the judge for other images of up to 1024; inception for larger ones."""
    feature_weights: str | None = None
    """File of the feature network's weights, if they cannot be downloaded."""
    classifier: str = "auto"
    """Classifier to recognise labels with: `svm`, `judge`, `timm:MODEL` or `none`. `auto` is the SVM for images of up
    to 256 values, the judge up to 1024, none for larger ones."""
    classifier_weights: str | None = None
    """File of the classifier's weights (safetensors), if they cannot be downloaded."""
    num_workers: int = 0
    """Loader processes for images on disk."""
    output: str | None = None
    """JSON file for the figures and their protocol; None is evaluation.json in the run's folder (for --widths,
    widths.json), IMAGES.evaluation.json for --images, or evaluation.json in the current folder for a run or data set of
    the hub."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_images", self.num_images >= 2, "at least 2")
        self._require("num_workers", self.num_workers >= 0, "at least 0")
        self._require("widths", are_widths(self.widths), WIDTHS)
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
            return Path(source, WIDTHS_FILE if self.widths else EVALUATION_FILE)
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
        config, model, encoders = given.load(default_guidance=1.0)
        subject = DrawnImages(given.checkpoint, config, model, encoders, given.load_guide(config), given.guide)
    train_part = _find_training_part(given, subject)
    features, classifier_name = _resolve_auto(given, subject, train_part)
    network = build_features(features, given.feature_weights, subject.shape, train_part)
    reference = find_reference(subject, given.reference, given.split, given.caption_column, features, network)
    real_images = None if isinstance(reference, Gaussian) else reference
    if isinstance(subject, DrawnImages):
        mode, seed = given.label_mode, given.seed
        conditions, labels = choose_conditions(subject, real_images, given.reference, given.num_images, mode, seed)
    classifier = _build_classifier(classifier_name, given, subject, train_part, real_images, state)
    other = find_other_part(subject, given.reference) if features in (PIXELS, JUDGE) else None
    network.to(state.device)

    def read_statistics(
        data: ImageData, classifier: Classifier | None = None, num_images: int | None = None
    ) -> ImageStatistics:
        count = min(len(data), num_images or len(data))
        batches = read_with_progress(data, given.batch_size or BATCH_SIZE, given.num_workers, state, count)
        return ImageStatistics(network, count, state).update(batches, classifier)

    if isinstance(subject, GivenImages):
        seen = read_statistics(subject.data, classifier)
        protocol = {"images": f"{seen.moments.count} of {subject.name}"}
    else:
        run = subject.model, subject.config, subject.encoders
        # First, so that what cannot be described fails before the work.
        protocol = describe_drawing(subject.name, *run, conditions, mode, seed, subject.weak, subject.weak_name)
        batches = draw_with_progress(*run, conditions, labels, seed, given.batch_size, state, subject.weak)
        seen = ImageStatistics(network, len(conditions), state).update(batches, classifier)
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
        # Fewer images have a larger distance, so as many real ones are compared as were drawn.
        same_number = read_statistics(other, num_images=seen.moments.count)
        results["frechet_real"] = frechet_distance(same_number.moments.gaussian, target)
        protocol["frechet_real"] = f"{same_number.moments.count} images of the other part"
    if seen.score is not None and features == INCEPTION:
        results["inception_score"], results["inception_score_deviation"] = seen.score.compute()
        protocol["inception_score"] = f"{SCORE_SPLITS} random splits"
    protocol |= {
        "features": describe_features(features, network),
        "classifier": "none" if classifier is None else classifier.description,
        "versions": versions(),
    }
    return {name: value for name, value in results.items() if value is not None}, protocol


def _find_training_part(given: MeasureArguments, subject: Subject) -> ImageData | None:
    """Returns the images that an SVM or a judge learns from; None where there are none, or they are not needed."""
    needed = math.prod(subject.shape) <= MAX_SMALL or JUDGE in (given.features, given.classifier)
    if isinstance(subject, GivenImages) or subject.config.data.autoencoder is not None or not needed:
        return None
    return find_own_part(subject, "train")


def _resolve_auto(given: MeasureArguments, subject: Subject, train_part: ImageData | None) -> tuple[str, str]:
    """Returns the names of the features and of the classifier, with `auto` resolved."""
    num_values = math.prod(subject.shape)
    if num_values > MAX_SMALL:
        features, classifier = INCEPTION, "none"
    elif train_part is None or not train_part.class_names:
        features, classifier = PIXELS, "none"
    else:
        features, classifier = (PIXELS, SVM) if num_values <= MAX_SVM else (JUDGE, JUDGE)
    return (
        features if given.features == "auto" else given.features,
        classifier if given.classifier == "auto" else given.classifier,
    )


def _build_classifier(
    name: str,
    given: MeasureArguments,
    subject: Subject,
    train_part: ImageData | None,
    reference: ImageData | None,
    state: PartialState,
) -> Classifier | None:
    """Returns the classifier of a name, which is checked to know the labels; None for `none`."""
    if name == "none":
        return None
    classifier = build_classifier(name, given.classifier_weights, train_part, state.device)
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
