"""Images to figures and their protocol: those that a run draws, or those that are given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import exists, isdir
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from uvit.common.errors import InputError
from uvit.common.messages import warn
from uvit.config import EVALUATION_FILE, INCEPTION, MAX_IMAGES, MAX_WORKERS, Config, DataConfig
from uvit.data.batch import ImageData, ImageSpec
from uvit.data.datasets import load_images
from uvit.diffusion.samplers import num_evaluations
from uvit.evaluation.features import PIXELS, Features, build_features
from uvit.evaluation.judge import (
    MAX_SMALL,
    Classifier,
    ImageStatistics,
    build_classifier,
    choose_captions,
    choose_labels,
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
    is_statistics,
    kernel_distance,
    load_statistics,
)
from uvit.evaluation.protocol import describe_drawing, describe_features, versions
from uvit.networks.encoders import Encoders
from uvit.sampling.conditions import Condition
from uvit.sampling.runs import DrawArguments

OWN_PARTS = ("train", "test")
"""The parts of a run's own data that are references by name."""
BATCH_SIZE = 64  # of images that are read
DRAWING_OPTIONS = {field.name for field in dataclasses.fields(DrawArguments)} - {"checkpoint", "batch_size", "compile"}
DRAWING_OPTIONS |= {"num_images", "label_mode", "caption_column"}


@dataclass(frozen=True, kw_only=True)
class MeasureArguments(DrawArguments):
    checkpoint: str = ""
    """Run folder whose images are measured, such as runs/digits; or give --images."""
    images: str | None = None
    """Folder of images, data set, or .npz as sample.py writes it, instead of a checkpoint."""
    reference: str = "test"
    """`test` or `train` of the run's own data; a data set or folder of images; or an .npz of statistics or images."""
    split: str = "train"
    """Split of data sets that are named."""
    caption_column: str | None = None
    """Column of captions of a reference for text models; None is as for the run's own data."""
    num_images: int = 2000
    """Images to draw."""
    label_mode: Literal["balanced", "random"] = "balanced"
    """As many images of each label, or labels drawn at random; of captions without labels, the reference's first, or
    any."""
    features: str = "auto"
    """What is compared: `pixels`, `inception` (FID, KID, Inception score) or `timm:MODEL`; `auto` is pixels of small
    images and inception of others."""
    feature_weights: str | None = None
    """File of the features' weights, where they cannot be downloaded."""
    classifier: str = "auto"
    """What recognises labels: `svm`, `timm:MODEL` or `none`; `auto` is the SVM on small images."""
    classifier_weights: str | None = None
    """File of the classifier's weights (safetensors), where they cannot be downloaded."""
    num_workers: int = 0
    """Loader processes for images on disk."""
    output: str | None = None
    """JSON file for the figures and their protocol; None is evaluation.json in the run's folder, a name ending so
    beside --images, or evaluation.json here for what is on the hub."""

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
        """Where the figures go."""
        source = self.images or self.checkpoint
        if self.output or not exists(source):
            return Path(self.output or EVALUATION_FILE)
        return (
            Path(source, EVALUATION_FILE)
            if isdir(source) and not self.images
            else Path(f"{Path(source)}.{EVALUATION_FILE}")
        )


def image_shape(config: Config, encoders: Encoders) -> tuple[int, int, int]:
    """Returns (C, H, W) of the images that a run draws."""
    if encoders.image is None:
        return (config.model.in_chans, *config.model.image_shape)
    height, width = (side * encoders.image.factor for side in config.model.image_shape)
    return 3, height, width


def own_part(config: Config, shape: tuple[int, int, int], part: str) -> ImageData:
    """Returns the images of the training or held-out part of a run's own data."""
    if config.data.autoencoder is not None:
        raise InputError(f"--reference {part!r} of {config.data.name!r} is latents: give a data set or an .npz")
    captions = True if config.model.context_dim else None
    # What is left to chance in training would leave the reference to chance as well.
    data = dataclasses.replace(config.data, crop="center")
    try:
        return load_images(data, ImageSpec(shape, labels=None, captions=captions), train=part == "train")
    except InputError as error:
        raise InputError(f"{error}; --reference can be the data's other part, a data set or an .npz") from None


def find_reference(
    given: MeasureArguments, config: Config | None, shape: tuple[int, int, int], features: str, network: Features
) -> Gaussian | ImageData:
    """Returns what --reference names: images, or the statistics of images."""
    if config is not None and given.reference in OWN_PARTS:
        return own_part(config, shape, given.reference)
    if is_statistics(Path(given.reference)):
        return load_statistics(Path(given.reference), features, network.num_features, shape[1:], network.weights_hash)
    captions = True if config is not None and config.model.context_dim else None
    column = given.caption_column or (config.data.caption_column if config else None)
    data = DataConfig(name=given.reference, train_split=given.split, caption_column=column)
    return load_images(data, ImageSpec(shape, labels=None, captions=captions))


def choose_conditions(
    given: MeasureArguments, config: Config, reference: Gaussian | ImageData
) -> tuple[Sequence[Condition], Sequence[int] | None]:
    """Returns what to draw, and the labels that the images should have."""
    if config.model.num_classes:
        labels = choose_labels(given.num_images, config.model.num_classes, given.label_mode, given.seed)
        return labels, labels
    if not config.model.context_dim:
        return [None] * given.num_images, None
    if isinstance(reference, Gaussian):
        raise InputError(f"a text model draws the captions of a reference data set, got statistics {given.reference!r}")
    return choose_captions(reference, given.num_images, given.label_mode, given.seed)


def check_classes(classifier: Classifier, labelled: Mapping[str, int]) -> None:
    """Stops where labels that a classifier is to recognise are not its classes."""
    for what, num_classes in labelled.items():
        fewer = 0 < num_classes < classifier.num_classes and Path(what).suffix != ".npz"  # which tells no number
        if fewer or num_classes > classifier.num_classes:
            found = f"{what} has labels of {num_classes} classes"
            raise InputError(f"the classifier knows {classifier.num_classes} classes, {found}: give --classifier none")
    if not any(labelled.values()):
        raise InputError(f"a classifier needs labels to recognise, got none of {' or '.join(labelled)}")


def measure(given: MeasureArguments, state: PartialState) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the figures and their protocol, complete on the main process."""
    # What is measured, with what, and against what: all is found before the long work.
    config: Config | None = None
    if given.images is not None:
        source = DataConfig(name=given.images, train_split=given.split)
        shown = load_images(source, ImageSpec(None, labels=None, captions=False))
        shape, labelled = shown.shape, {given.images: len(shown.class_names)}
    else:
        config, model, encoders = given.load(default_guidance=1.0)
        shape, labelled = image_shape(config, encoders), {given.checkpoint: config.model.num_classes}
    small = math.prod(shape) <= MAX_SMALL
    features = {"auto": PIXELS if small else INCEPTION}.get(given.features, given.features)
    network = build_features(features, given.feature_weights, shape)
    reference = find_reference(given, config, shape, features, network)
    if config is not None:
        conditions, labels = choose_conditions(given, config, reference)
    if not isinstance(reference, Gaussian):
        labelled[given.reference] = len(reference.class_names)
    own = config if config is not None and config.data.autoencoder is None else None
    real = own_part(own, shape, "train") if own is not None and small else None
    other = None  # the data's other part, whose distance to the reference is what real images reach
    if own is not None and features == PIXELS and given.reference in OWN_PARTS:
        with suppress(InputError):  # not every data set has two parts
            other = own_part(own, shape, OWN_PARTS[1 - OWN_PARTS.index(given.reference)])
    name = {"auto": "svm" if real is not None and real.class_names else "none"}.get(given.classifier, given.classifier)
    classifier = None if name == "none" else build_classifier(name, given.classifier_weights, real, state.device)
    if classifier is not None:
        check_classes(classifier, labelled)
    network.to(state.device)

    def read(data: ImageData, classifier: Classifier | None = None) -> ImageStatistics:
        batches = read_with_progress(data, given.batch_size or BATCH_SIZE, given.num_workers, state)
        return ImageStatistics(network, len(data), state).update(batches, classifier)

    if config is None:
        judged = read(shown, classifier)
        protocol = {"images": f"{judged.moments.count} of {given.images}"}
    else:
        batches = draw_with_progress(
            num_evaluations(config.process, config.sample),
            state,
            conditions,
            labels,
            model=model,
            config=config,
            seed=given.seed,
            batch_size=given.batch_size,
            encoders=encoders,
        )
        judged = ImageStatistics(network, given.num_images, state).update(batches, classifier)
        protocol = describe_drawing(given.checkpoint, config, model, encoders, conditions, given.label_mode, given.seed)
    protocol["images"] += f", hash {judged.hash}"
    if state.is_main_process and judged.moments.count <= network.num_features:
        few = f"{judged.moments.count} images for {network.num_features} features"
        warn(f"{few}: with so few, a Fréchet distance says little")

    results: dict[str, Any] = {}
    if isinstance(reference, Gaussian):
        target = reference
        protocol["reference"] = f"{given.reference}: {describe_statistics(Path(given.reference))}, hash {target.hash}"
    else:
        seen = read(reference, classifier)
        target, count = seen.moments.gaussian, f"{seen.moments.count} images"
        own_name = f"{given.reference} part of {config.data.name}" if config and given.reference in OWN_PARTS else None
        size = "x".join(map(str, shape[1:]))
        named = own_name or f"{given.reference}, split {given.split}"
        protocol["reference"] = f"{named}: {count}, centre crops of {size}, hash {seen.hash}"
        results["recognised_real"] = seen.recognised
        if features == INCEPTION and min(judged.moments.count, seen.moments.count) >= MIN_KERNEL_IMAGES:
            of_both = (each.sample.gather(state.device) for each in (judged, seen))
            results["kid"], results["kid_deviation"], subset = kernel_distance(*of_both)
            protocol["kid"] = f"{KID_SUBSETS} subsets of {subset}, of {KID_SAMPLES} images or fewer of each"
    results["recognised"] = judged.recognised
    results["frechet"] = frechet_distance(judged.moments.gaussian, target)
    if other is not None:
        results["frechet_real"] = frechet_distance(read(other).moments.gaussian, target)
    if judged.score is not None:
        results["inception_score"], results["inception_score_deviation"] = judged.score.compute()
        protocol["inception_score"] = f"{SCORE_SPLITS} random splits"
    protocol |= {
        "features": describe_features(features, network),
        "classifier": "none" if classifier is None else classifier.description,
        "versions": versions(),
    }
    return {name: value for name, value in results.items() if value is not None}, protocol
