"""Measures a trained run against held-out images: `python evaluate.py --checkpoint runs/digits`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from uvit.cli import parse, run
from uvit.config import DataConfig, UViTConfig
from uvit.data import ImageData, load_data, to_unit_range
from uvit.errors import InputError
from uvit.files import write_text
from uvit.generate import DrawArguments, describe_guidance, generate
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


def read_all(data: ImageData) -> tuple[Tensor, Tensor]:
    """Reads a whole data set."""
    return data.__getitems__(list(range(len(data))))


def real_images(data: DataConfig, model: UViTConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns the real training part and the held-out part, images and labels each."""
    if model.in_chans * model.image_shape[0] * model.image_shape[1] > MAX_PIXELS or not model.num_classes:
        raise InputError(
            f"evaluate.py measures class-conditional images of at most {MAX_PIXELS} values, got "
            f"{model.in_chans}x{model.image_shape[0]}x{model.image_shape[1]} with {model.num_classes} classes"
        )
    return read_all(load_data(data, model, train=True)), read_all(load_data(data, model, train=False))


def main(arguments: Sequence[str]) -> None:
    """Draws images, measures them and prints the figures with their protocol."""
    given = parse(Arguments, arguments, "evaluate.py", __doc__ or "")
    config, model = given.load(given.guidance)
    (train_images, train_labels), (held_out_images, held_out_labels) = real_images(config.data, config.model)
    num_classes = config.model.num_classes
    if given.num_images < num_classes or given.num_images % num_classes:
        raise InputError(f"num_images must be a multiple of {num_classes} classes, got {given.num_images}")
    labels = torch.arange(num_classes).repeat_interleave(given.num_images // num_classes)
    with tqdm(total=len(labels) * num_evaluations(config.process, config.sample), unit="eval") as progress:
        images = generate(model, config, labels.tolist(), given.seed, given.batch_size, progress.update)

    sampling = config.sample
    classifier = SVC(C=SVM_C).fit(pixels(train_images), train_labels)
    recognised = classifier.score(pixels(images), labels)
    recognised_real = classifier.score(pixels(held_out_images), held_out_labels)
    train_part, held_out, drawn = (
        Moments(pixels(part).shape[1]).update(pixels(part)) for part in (train_images, held_out_images, images)
    )
    distance, distance_real = frechet_distance(drawn, held_out), frechet_distance(train_part, held_out)

    print(f"recognised {recognised:.1%} (real held-out images: {recognised_real:.1%})")
    print(f"Fréchet distance {distance / distance_real:.2f} x real ({distance:.3f} against {distance_real:.3f})")
    protocol = (
        f"{len(images)} images, {len(images) // num_classes} a class, EMA weights, "
        f"{describe_guidance(sampling.guidance)}, {sampling.sampler} {sampling.num_steps} steps ({sampling.spacing}), "
        f"seed {given.seed}, rounded to uint8; pixels against the {held_out.count} held-out images of "
        f"{config.data.name}, SVM (rbf, C = {SVM_C:g}) fitted to the {train_part.count} training images"
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
