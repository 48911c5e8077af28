"""Measures images: those that a run draws, or those of a folder or an .npz.

`python evaluate.py --checkpoint runs/digits`, or `python evaluate.py --images FOLDER --reference DATA`; and
`python evaluate.py stats DATA --output ref.npz` makes statistics to compare with.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from os.path import isdir
from pathlib import Path
from typing import Any, Literal

import tyro
from accelerate import PartialState

from uvit import __version__
from uvit.checkpoint import checkpoint_dirs
from uvit.cli import parse, process_state, run, warn_of_missing_processes
from uvit.config import MAX_BATCH, MAX_IMAGES, MAX_SIDE, MAX_WORKERS, Config, DataConfig, Section
from uvit.data import ImageData, Wanted, load_images
from uvit.errors import InputError
from uvit.evaluation import (
    MAX_PIXELS,
    Judged,
    build_classifier,
    choose_captions,
    choose_labels,
    draw_shown,
    read_shown,
)
from uvit.features import INCEPTION, PIXELS, build_features
from uvit.files import write_aside
from uvit.generate import Condition, DrawArguments, describe_guidance
from uvit.latents import Encoders
from uvit.metrics import Gaussian, frechet_distance, is_statistics, kernel_distance, load_statistics, save_statistics
from uvit.samplers import num_evaluations

PARTS = ("train", "test")
PACKAGES = ("torch", "timm")


@dataclass(frozen=True, kw_only=True)
class Arguments(DrawArguments):
    checkpoint: str = ""
    """Run folder whose images are measured, such as runs/digits; or give --images."""
    images: str | None = None
    """Folder of images, data set, or .npz as sample.py writes it, instead of a checkpoint."""
    reference: str = "test"
    """`test` or `train` of the run's own data; a data set or folder of images; or an .npz of statistics or images."""
    num_images: int = 2000
    """Images to draw."""
    label_mode: Literal["balanced", "random"] = "balanced"
    """As many images of each label, or labels drawn at random."""
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
    """JSON file for the figures and their protocol; None is evaluation.json in the run's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_images", self.num_images >= 2, "at least 2")
        self._require("num_workers", self.num_workers >= 0, "at least 0")
        self._require_at_most(num_images=MAX_IMAGES, num_workers=MAX_WORKERS)
        if bool(self.checkpoint) == bool(self.images):
            raise InputError(f"give --checkpoint or --images, got {'both' if self.images else 'neither'}")
        if self.images and self.reference in PARTS:
            raise InputError(f"--reference {self.reference!r} needs --checkpoint: give a data set, a folder or an .npz")


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
    batch_size: int = 64
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
    return load_images(config.data, Wanted(shape, labels=None, captions=captions), train=part == "train")


def find_reference(
    given: Arguments, config: Config | None, shape: tuple[int, int, int], features: str, num_features: int
) -> Gaussian | ImageData:
    """Returns what --reference names: images, or the statistics of images."""
    if config is not None and given.reference in PARTS:
        return own_part(config, shape, given.reference)
    if is_statistics(Path(given.reference)):
        return load_statistics(Path(given.reference), features, num_features, shape[1:])
    captions = True if config is not None and config.model.context_dim else None
    return load_images(DataConfig(name=given.reference), Wanted(shape, labels=None, captions=captions))


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


def describe_drawing(given: Arguments, config: Config) -> dict[str, str]:
    """Says how images were drawn."""
    sampling, count = config.sample, f"{given.num_images} drawn"
    if config.model.num_classes:
        each = f", {given.num_images // config.model.num_classes} a class"
        count += each if given.label_mode == "balanced" else ", labels at random"
    elif config.model.context_dim:
        count += ", captions of the reference"
    steps = checkpoint_dirs(Path(given.checkpoint))
    return {
        "images": count,
        "weights": f"EMA of {given.checkpoint}" + (f", {steps[-1].name}" if steps else ""),
        "guidance": describe_guidance(sampling.guidance).removeprefix("guidance "),
        "guidance_interval": "{:g} to {:g}".format(*sampling.guidance_interval),
        "sampler": f"{sampling.sampler}, {sampling.num_steps} steps ({sampling.spacing})",
        "seed": str(given.seed),
        "decoder": config.data.autoencoder or "none",
        "rounding": "uint8",
    }


def make_statistics(arguments: Sequence[str]) -> None:
    """Writes the statistics of a data set: `python evaluate.py stats DATA --output ref.npz`."""
    given = parse(StatisticsArguments, arguments, "evaluate.py stats", make_statistics.__doc__ or "")
    shape = None if given.image_size is None else (3, given.image_size, given.image_size)
    data = load_images(
        DataConfig(name=given.data, train_split=given.split), Wanted(shape, labels=False, captions=False)
    )
    network = build_features(given.features, given.feature_weights, data.shape)
    state, output = process_state(), Path(given.output)
    network.to(state.device)
    # The output is opened first: a path that cannot be written is found before the work, not after it.
    with write_aside(output) if state.is_main_process else nullcontext(output) as aside:
        moments = (
            Judged(network, state).look(read_shown(data, given.batch_size, given.num_workers, state), None).moments
        )
        if state.is_main_process:
            facts = {"features": given.features, "image_size": data.shape[1:], "num_images": moments.count}
            save_statistics(aside, moments.gaussian, **facts)
    if state.is_main_process:
        print(
            f"{moments.count} images of {given.data} to {given.output}: {given.features}, hash {moments.gaussian.hash}"
        )


def measure(given: Arguments, state: PartialState) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the figures and their protocol, complete on the main process."""
    # What is measured, with what, and against what: all is found before the long work.
    config: Config | None = None
    if given.images is not None:
        shown = load_images(DataConfig(name=given.images), Wanted(None, labels=None, captions=False))
        shape = shown.shape
    else:
        config, model, encoders = given.load(default_guidance=1.0)
        shape = image_shape(config, encoders)
    small = math.prod(shape) <= MAX_PIXELS
    features = {"auto": PIXELS if small else INCEPTION}.get(given.features, given.features)
    network = build_features(features, given.feature_weights, shape)
    reference = find_reference(given, config, shape, features, network.num_features)
    own = config if config is not None and config.data.autoencoder is None else None
    real = own_part(own, shape, "train") if own is not None and small else None
    other = None  # the data's other part, whose distance to the reference is what real images reach
    if own is not None and features == PIXELS and given.reference in PARTS:
        with suppress(InputError):  # not every data set has two parts
            other = own_part(own, shape, PARTS[1 - PARTS.index(given.reference)])
    classifier = {"auto": "svm" if real is not None and real.class_names else "none"}.get(
        given.classifier, given.classifier
    )
    network.to(state.device)
    classify = None
    if classifier != "none":
        classify = build_classifier(classifier, given.classifier_weights, real, state.device)

    if config is None:
        batches = read_shown(shown, given.batch_size, given.num_workers, state)
        protocol = {"images": f"{len(shown)} of {given.images}"}
    else:
        conditions, labels = find_conditions(given, config, reference)
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
        protocol = describe_drawing(given, config)
    judged = Judged(network, state).look(batches, classify)

    results: dict[str, Any] = {}
    if isinstance(reference, Gaussian):
        target, counted = reference, "statistics"
    else:
        seen = Judged(network, state).look(read_shown(reference, given.batch_size, given.num_workers, state), classify)
        target, counted = seen.moments.gaussian, f"{seen.moments.count} images"
        results["recognised_real"] = seen.recognised
        if features == INCEPTION:
            of_both = (each.sample.gather(state.device) for each in (judged, seen))
            results["kid"], results["kid_deviation"] = kernel_distance(*of_both)
    results["recognised"] = judged.recognised
    results["frechet"] = frechet_distance(judged.moments.gaussian, target)
    if other is not None:
        batches = read_shown(other, given.batch_size, given.num_workers, state)
        results["frechet_real"] = frechet_distance(Judged(network, state).look(batches, None).moments.gaussian, target)
    if judged.score is not None:
        results["inception_score"], results["inception_score_deviation"] = judged.score.compute()
    name = f"{given.reference} part of {config.data.name}" if config and given.reference in PARTS else given.reference
    protocol |= {
        "reference": f"{name}: {counted}, hash {target.hash}",
        "features": features,
        "classifier": classifier,
        "versions": ", ".join(
            [f"uvit {__version__}", *(f"{each} {importlib.metadata.version(each)}" for each in PACKAGES)]
        ),
    }
    return {name: value for name, value in results.items() if value is not None}, protocol


def main(arguments: Sequence[str]) -> None:
    """Measures images, prints the figures with their protocol and saves both."""
    if list(arguments[:1]) == ["stats"]:
        make_statistics(arguments[1:])
        return
    given = parse(Arguments, arguments, "evaluate.py", __doc__ or "")
    in_run = isdir(given.checkpoint)
    output = Path(given.output) if given.output else Path(given.checkpoint, "evaluation.json") if in_run else None
    state = process_state()
    warn_of_missing_processes(state.num_processes)
    with nullcontext() if output is None or not state.is_main_process else write_aside(output) as aside:
        results, protocol = measure(given, state)
        if aside is not None:
            aside.write_text(json.dumps({**results, "protocol": protocol}, indent=2) + "\n")
    if state.is_main_process:
        show(results, protocol)


def show(results: dict[str, Any], protocol: dict[str, str]) -> None:
    """Prints the figures and the protocol."""
    if "recognised" in results:
        real = results.get("recognised_real")
        print(f"recognised {results['recognised']:.1%}" + ("" if real is None else f" (real images: {real:.1%})"))
    name = "FID" if protocol["features"] == INCEPTION else "Fréchet distance"
    if "frechet_real" in results:
        times = results["frechet"] / results["frechet_real"]
        print(f"{name} {times:.2f} x real ({results['frechet']:.3f} against {results['frechet_real']:.3f})")
    else:
        print(f"{name} {results['frechet']:.3f}")
    for key, name in (("kid", "KID"), ("inception_score", "Inception score")):
        if key in results:
            print(f"{name} {results[key]:.4g} ± {results[key + '_deviation']:.2g}")
    print("protocol: " + "; ".join(f"{name} {text}" for name, text in protocol.items()))


if __name__ == "__main__":
    run(main)
