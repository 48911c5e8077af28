"""Measures a trained run against held-out images: `python evaluate.py --checkpoint runs/digits`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from uvit.cli import parse, run
from uvit.config import DataConfig, UViTConfig
from uvit.data import Batch, read_all
from uvit.errors import InputError
from uvit.files import write_text
from uvit.generate import Condition, DrawArguments, describe_guidance, generate
from uvit.images import to_unit_range
from uvit.loader import load_data
from uvit.metrics import Moments, frechet_distance
from uvit.samplers import num_evaluations

# An SVM and a covariance of raw pixels are meant for small images; beyond this they are neither quick nor telling.
MAX_PIXELS = 1024
SVM_C = 10.0


@dataclass(frozen=True, kw_only=True)
class Arguments(DrawArguments):
    num_images: int = 2000
    """Images to draw, the same number of each class."""
    guidance: float = 1.0
    """w in w * cond + (1 - w) * uncond; 1 is none."""


def pixels(images: Tensor) -> Tensor:
    """Flattens (N, C, H, W) uint8 images to (N, C·H·W) features in [-1, 1]."""
    return to_unit_range(images).flatten(1)


def real_images(data: DataConfig, model: UViTConfig) -> tuple[Batch, Batch, int]:
    """Returns the real training part, the held-out part, and the number of classes."""
    shape = (model.in_chans, *model.image_shape)
    if math.prod(shape) > MAX_PIXELS:
        raise InputError(f"evaluate.py measures images of at most {MAX_PIXELS} values, got {'x'.join(map(str, shape))}")
    train_part, held_out = (load_data(data, model, train=part) for part in (True, False))
    num_classes = len(train_part.class_names)
    if not (model.num_classes or model.context_dim) or not num_classes:
        raise InputError(
            "evaluate.py measures a model with labels or captions by the classes of its data, got num_classes "
            f"{model.num_classes}, context_dim {model.context_dim} and {num_classes} classes in data {data.name!r}"
        )
    return read_all(train_part), read_all(held_out), num_classes


def choose_conditions(part: Batch, labels: list[int], by_caption: bool) -> Sequence[Condition]:
    """Returns what to draw to get images of the given labels: the labels, or captions of images that have them."""
    if not by_caption:
        return labels
    having = list(zip(part.captions, part.labels.tolist()))
    captions = {each: itertools.cycle([texts[0] for texts, label in having if label == each]) for each in set(labels)}
    return [next(captions[label]) for label in labels]


def main(arguments: Sequence[str]) -> None:
    """Draws images, measures them and prints the figures with their protocol."""
    given = parse(Arguments, arguments, "evaluate.py", __doc__ or "")
    config, model, encoders = given.load(given.guidance)
    train_part, held_out_part, num_classes = real_images(config.data, config.model)
    if given.num_images < num_classes or given.num_images % num_classes:
        raise InputError(f"num_images must be a multiple of {num_classes} classes, got {given.num_images}")
    labels = torch.arange(num_classes).repeat_interleave(given.num_images // num_classes)
    conditions = choose_conditions(train_part, labels.tolist(), by_caption=config.model.context_dim > 0)
    with tqdm(total=len(labels) * num_evaluations(config.process, config.sample), unit="eval") as progress:
        images = generate(model, config, conditions, given.seed, given.batch_size, encoders, progress.update)

    sampling = config.sample
    classifier = SVC(C=SVM_C).fit(pixels(train_part.images), train_part.labels)
    recognised = classifier.score(pixels(images), labels)
    recognised_real = classifier.score(pixels(held_out_part.images), held_out_part.labels)
    real, held_out, drawn = (
        Moments(pixels(part).shape[1]).update(pixels(part))
        for part in (train_part.images, held_out_part.images, images)
    )
    distance, distance_real = frechet_distance(drawn, held_out), frechet_distance(real, held_out)

    print(f"recognised {recognised:.1%} (real held-out images: {recognised_real:.1%})")
    print(f"Fréchet distance {distance / distance_real:.2f} x real ({distance:.3f} against {distance_real:.3f})")
    protocol = (
        f"{len(images)} images, {len(images) // num_classes} a class, EMA weights, "
        f"{describe_guidance(sampling.guidance)}, {sampling.sampler} {sampling.num_steps} steps ({sampling.spacing}), "
        f"seed {given.seed}, rounded to uint8; pixels against the {held_out.count} held-out images of "
        f"{config.data.name}, SVM (rbf, C = {SVM_C:g}) fitted to the {real.count} training images"
    )
    print(f"protocol: {protocol}")
    if Path(given.checkpoint).is_dir():
        result = {
            "recognised": recognised,
            "recognised_real": recognised_real,
            "frechet": distance,
            "frechet_real": distance_real,
            "protocol": protocol,
            "sampling": asdict(sampling),
        }
        write_text(Path(given.checkpoint) / "evaluation.json", json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
