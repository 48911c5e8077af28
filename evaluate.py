"""Measures images: those that a run draws, or those of a folder or an .npz.

`python evaluate.py --checkpoint runs/digits`, or `python evaluate.py --images FOLDER --reference DATA`; and
`python evaluate.py stats DATA --output ref.npz` makes statistics to compare with.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from os.path import exists, isdir
from pathlib import Path
from typing import Any, Literal

import tyro
from accelerate import PartialState

from uvit import UViT, __version__
from uvit.card import describe_figures
from uvit.checkpoint import checkpoint_dirs
from uvit.cli import parse, process_state, run, warn_of_missing_processes
from uvit.config import MAX_BATCH, MAX_IMAGES, MAX_SIDE, MAX_WORKERS, Config, DataConfig, Section
from uvit.data import ImageData, Wanted, load_images
from uvit.errors import InputError
from uvit.evaluation import (
    MAX_SMALL,
    Classifier,
    Judged,
    build_classifier,
    choose_captions,
    choose_labels,
    draw_shown,
    read_shown,
)
from uvit.features import INCEPTION, PIXELS, Features, build_features
from uvit.files import RESULT_FILE, write_aside
from uvit.generate import Condition, DrawArguments, describe_guidance
from uvit.latents import Encoders
from uvit.metrics import (
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
    save_statistics,
)
from uvit.samplers import num_evaluations, resolve_spacing, sampling_times
from uvit.weights import hash_weights

PARTS = ("train", "test")
PACKAGES = ("torch", "timm", "torch-fidelity", "diffusers", "transformers")
BATCH_SIZE = 64  # of images that are read
DRAWING = {field.name for field in dataclasses.fields(DrawArguments)} - {"checkpoint", "batch_size", "compile"}
DRAWING |= {"num_images", "label_mode", "caption_column"}


@dataclass(frozen=True, kw_only=True)
class Arguments(DrawArguments):
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
        if self.images and self.reference in PARTS:
            raise InputError(f"--reference {self.reference!r} needs --checkpoint: give a data set, a folder or an .npz")
        for each in dataclasses.fields(Arguments) if self.images else ():
            value = getattr(self, each.name)
            if each.name in DRAWING and value != each.default:
                raise InputError(f"--{each.name} is for images to draw from a --checkpoint, got {value} with --images")

    @property
    def output_file(self) -> Path:
        """Where the figures go."""
        source = self.images or self.checkpoint
        if self.output or not exists(source):
            return Path(self.output or RESULT_FILE)
        return Path(source, RESULT_FILE) if isdir(source) and not self.images else Path(f"{Path(source)}.{RESULT_FILE}")


@dataclass(frozen=True, kw_only=True)
class StatisticsArguments(Section):
    data: tyro.conf.Positional[str]
    """Data set, folder of images, or .npz of images."""
    output: str
    """An .npz for mu and sigma."""
    split: str = "train"
    """Split of the data set."""
    image_size: int | None = None
    """Side in pixels to which images are cut; None is that of the first image."""
    features: str = INCEPTION
    """`inception`, `timm:MODEL` or `pixels`."""
    feature_weights: str | None = None
    """File of the features' weights, where they cannot be downloaded."""
    batch_size: int = BATCH_SIZE
    """Images at a time."""
    num_workers: int = 0
    """Loader processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("output", Path(self.output).suffix == ".npz", "a path ending in .npz")
        self._require("batch_size", self.batch_size >= 1, "at least 1")
        self._require("num_workers", self.num_workers >= 0, "at least 0")
        self._require("image_size", self.image_size is None or self.image_size >= 1, "at least 1")
        self._require("image_size", (self.image_size or 1) <= MAX_SIDE, f"at most {MAX_SIDE:,}")
        self._require_at_most(batch_size=MAX_BATCH, num_workers=MAX_WORKERS)


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
        return load_images(data, Wanted(shape, labels=None, captions=captions), train=part == "train")
    except InputError as error:
        raise InputError(f"{error}; --reference can be the data's other part, a data set or an .npz") from None


def find_reference(
    given: Arguments, config: Config | None, shape: tuple[int, int, int], features: str, network: Features
) -> Gaussian | ImageData:
    """Returns what --reference names: images, or the statistics of images."""
    if config is not None and given.reference in PARTS:
        return own_part(config, shape, given.reference)
    if is_statistics(Path(given.reference)):
        return load_statistics(Path(given.reference), features, network.num_features, shape[1:], network.weights_hash)
    captions = True if config is not None and config.model.context_dim else None
    column = given.caption_column or (config.data.caption_column if config else None)
    data = DataConfig(name=given.reference, train_split=given.split, caption_column=column)
    return load_images(data, Wanted(shape, labels=None, captions=captions))


def find_conditions(
    given: Arguments, config: Config, reference: Gaussian | ImageData
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


def describe_drawing(
    given: Arguments, config: Config, model: UViT, encoders: Encoders, conditions: Sequence[Condition]
) -> dict[str, str]:
    """Says how images were drawn."""
    sampling, count = config.sample, f"{given.num_images} drawn"
    if config.model.num_classes:
        each = f", {given.num_images // config.model.num_classes} a class"
        count += each if given.label_mode == "balanced" else ", labels at random"
    elif config.model.context_dim:
        count += f", {len(set(conditions))} different captions of the reference, {given.label_mode}"
    steps, times = checkpoint_dirs(Path(given.checkpoint)), sampling_times(config.process, sampling)
    spacing = f"{resolve_spacing(config.process, sampling)} from t = {times[0]:g} to {times[-1]:g}"
    return {
        "images": count,
        "weights": f"EMA of {given.checkpoint}"
        + (f", {steps[-1].name}" if steps else "")
        + f", hash {hash_weights(model.state_dict())}",
        "guidance": describe_guidance(sampling.guidance).removeprefix("guidance "),
        "guidance_interval": "{:g} to {:g}".format(*sampling.guidance_interval),
        "sampler": f"{sampling.sampler}, {sampling.num_steps} steps ({spacing})",
        "precision": sampling.mixed_precision,
        "reuse": sampling.reuse,
        "seed": str(given.seed),
        "text_encoder": f"{config.data.text_encoder}, hash {encoders.text.weights_hash}" if encoders.text else "none",
        "decoder": f"{config.data.autoencoder}, hash {encoders.image.weights_hash}" if encoders.image else "none",
        "rounding": "uint8",
    }


def describe_features(name: str, network: Features) -> str:
    """Says what is compared."""
    return name if network.weights_hash is None else f"{name}, hash {network.weights_hash}"


def versions() -> str:
    """Names the packages that figures depend on, those that are installed."""
    found = [f"uvit {__version__}"]
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def make_statistics(arguments: Sequence[str]) -> None:
    """Writes the statistics of a data set: `python evaluate.py stats DATA --output ref.npz`."""
    given = parse(StatisticsArguments, arguments, "evaluate.py stats", make_statistics.__doc__ or "")
    shape = None if given.image_size is None else (3, given.image_size, given.image_size)
    source = DataConfig(name=given.data, train_split=given.split)
    data = load_images(source, Wanted(shape, labels=False, captions=False))
    network = build_features(given.features, given.feature_weights, data.shape)
    state, output = process_state(), Path(given.output)
    warn_of_missing_processes(state.num_processes)
    network.to(state.device)
    # The output is opened first: a path that cannot be written is found before the work, not after it.
    with write_aside(output) if state.is_main_process else nullcontext(output) as aside:
        batches = read_shown(data, given.batch_size, given.num_workers, state)
        moments = Judged(network, len(data), state).look(batches).moments
        if state.is_main_process:
            facts = {"features": given.features, "image_size": data.shape[1:], "num_images": moments.count}
            save_statistics(aside, moments.gaussian, **facts, weights_hash=str(network.weights_hash))
    if state.is_main_process:
        described = f"{describe_features(given.features, network)}; statistics' hash {moments.gaussian.hash}"
        print(f"{moments.count} images of {given.data} to {given.output}: {described}")


def check_classes(classifier: Classifier, labelled: Mapping[str, int]) -> None:
    """Stops where labels that a classifier is to recognise are not its classes."""
    for what, num_classes in labelled.items():
        fewer = 0 < num_classes < classifier.num_classes and Path(what).suffix != ".npz"  # which tells no number
        if fewer or num_classes > classifier.num_classes:
            found = f"{what} has labels of {num_classes} classes"
            raise InputError(f"the classifier knows {classifier.num_classes} classes, {found}: give --classifier none")
    if not any(labelled.values()):
        raise InputError(f"a classifier needs labels to recognise, got none of {' or '.join(labelled)}")


def measure(given: Arguments, state: PartialState) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the figures and their protocol, complete on the main process."""
    # What is measured, with what, and against what: all is found before the long work.
    config: Config | None = None
    if given.images is not None:
        source = DataConfig(name=given.images, train_split=given.split)
        shown = load_images(source, Wanted(None, labels=None, captions=False))
        shape, labelled = shown.shape, {given.images: len(shown.class_names)}
    else:
        config, model, encoders = given.load(default_guidance=1.0)
        shape, labelled = image_shape(config, encoders), {given.checkpoint: config.model.num_classes}
    small = math.prod(shape) <= MAX_SMALL
    features = {"auto": PIXELS if small else INCEPTION}.get(given.features, given.features)
    network = build_features(features, given.feature_weights, shape)
    reference = find_reference(given, config, shape, features, network)
    if config is not None:
        conditions, labels = find_conditions(given, config, reference)
    if not isinstance(reference, Gaussian):
        labelled[given.reference] = len(reference.class_names)
    own = config if config is not None and config.data.autoencoder is None else None
    real = own_part(own, shape, "train") if own is not None and small else None
    other = None  # the data's other part, whose distance to the reference is what real images reach
    if own is not None and features == PIXELS and given.reference in PARTS:
        with suppress(InputError):  # not every data set has two parts
            other = own_part(own, shape, PARTS[1 - PARTS.index(given.reference)])
    name = {"auto": "svm" if real is not None and real.class_names else "none"}.get(given.classifier, given.classifier)
    classifier = None if name == "none" else build_classifier(name, given.classifier_weights, real, state.device)
    if classifier is not None:
        check_classes(classifier, labelled)
    network.to(state.device)

    def read(data: ImageData, classifier: Classifier | None = None) -> Judged:
        batches = read_shown(data, given.batch_size or BATCH_SIZE, given.num_workers, state)
        return Judged(network, len(data), state).look(batches, classifier)

    if config is None:
        judged = read(shown, classifier)
        protocol = {"images": f"{judged.moments.count} of {given.images}"}
    else:
        batches = draw_shown(
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
        judged = Judged(network, given.num_images, state).look(batches, classifier)
        protocol = describe_drawing(given, config, model, encoders, conditions)
    protocol["images"] += f", hash {judged.hash}"
    if state.is_main_process and judged.moments.count <= network.num_features:
        few = f"{judged.moments.count} images for {network.num_features} features"
        print(f"warning: {few}: with so few, a Fréchet distance says little", file=sys.stderr)

    results: dict[str, Any] = {}
    if isinstance(reference, Gaussian):
        target = reference
        protocol["reference"] = f"{given.reference}: {describe_statistics(Path(given.reference))}, hash {target.hash}"
    else:
        seen = read(reference, classifier)
        target, count = seen.moments.gaussian, f"{seen.moments.count} images"
        own_name = f"{given.reference} part of {config.data.name}" if config and given.reference in PARTS else None
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


def main(arguments: Sequence[str]) -> None:
    """Measures images, prints the figures with their protocol and saves both."""
    if list(arguments[:1]) == ["stats"]:
        make_statistics(arguments[1:])
        return
    given = parse(Arguments, arguments, "evaluate.py", __doc__ or "")
    state = process_state()
    warn_of_missing_processes(state.num_processes)
    # As for statistics, the output is opened first.
    with write_aside(given.output_file) if state.is_main_process else nullcontext() as aside:
        results, protocol = measure(given, state)
        if aside is not None:
            aside.write_text(json.dumps({**results, "protocol": protocol}, indent=2) + "\n")
    if state.is_main_process:
        show(results, protocol)


def show(results: dict[str, Any], protocol: dict[str, str]) -> None:
    """Prints the figures and the protocol."""
    for line in describe_figures(results, protocol):
        print(line)
    print("protocol: " + "; ".join(f"{name} {text}" for name, text in protocol.items()))


if __name__ == "__main__":
    run(main)
