"""Draws images from a trained run: `python sample.py --checkpoint runs/digits --classes 0 1 2 --output grid.png`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from uvit.cli import parse, run
from uvit.config import Backend, SolverName
from uvit.errors import InputError
from uvit.files import write_aside
from uvit.generate import (
    class_names,
    describe_guidance,
    find_classes,
    generate,
    load_run,
    override_sampling,
    set_threads,
)
from uvit.grid import image_grid
from uvit.samplers import num_evaluations

UNLABELLED_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Arguments:
    checkpoint: str
    """Run folder, such as runs/digits, or hub name of one; with --config also weights alone."""
    config: str | None = None
    """Config of weights that do not come with one, such as configs/imagenet256_uvit_huge.py for a published file."""
    classes: tuple[str, ...] = ()
    """Numbers or names of classes, a row of the grid for each; all of them where none is given."""
    num_per_class: int = 8
    """Images of each class; for a model without classes, images in all."""
    guidance: float | None = None
    """w in w * cond + (1 - w) * uncond, 1 is none; the run's own where not given."""
    paper_scale: float | None = None
    """The paper's s in cond + s * (cond - uncond), instead of --guidance: w = 1 + s."""
    guidance_interval: tuple[float, float] | None = None
    """Times in [0, 1] between which guidance acts."""
    steps: int | None = None
    """Steps of the sampler."""
    sampler: SolverName | None = None
    """Solver."""
    spacing: Literal["auto", "uniform", "log_snr"] | None = None
    """Grid of times."""
    seed: int = 0
    """The same seed draws the same images at any batch size."""
    batch_size: int = 64
    """Images at a time."""
    attention: Backend = "auto"
    """Attention backend."""
    output: str = "grid.png"
    """A picture (.png, .jpg), or the images and labels themselves (.npz)."""


def write_npz(path: Path, images: torch.Tensor, labels: Sequence[int] | None) -> None:
    """Writes arr_0, images (N, H, W, C) uint8, and arr_1, labels (N,), as ADM's evaluator reads them."""
    arrays = [images.permute(0, 2, 3, 1).numpy()] + ([] if labels is None else [np.asarray(labels)])
    np.savez(path, *arrays)


def main(arguments: Sequence[str]) -> None:
    """Draws the images and writes them."""
    given = parse(Arguments, arguments, "sample.py", __doc__ or "")
    for name in ("num_per_class", "batch_size"):
        if getattr(given, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(given, name)}")
    if given.seed < 0:
        raise InputError(f"seed must be at least 0, got {given.seed}")
    if given.guidance is not None and given.paper_scale is not None:
        raise InputError(f"give --guidance or --paper_scale, got both: {given.guidance:g} and {given.paper_scale:g}")
    output = Path(given.output)
    if output.suffix not in (*Image.registered_extensions(), ".npz"):
        raise InputError(f"output must end in .png, .jpg or .npz, got {given.output!r}")

    config, model = load_run(given.checkpoint, given.attention, PartialState().default_device, given.config)
    set_threads(config)
    config = override_sampling(
        config,
        guidance=given.guidance if given.paper_scale is None else 1 + given.paper_scale,
        guidance_interval=given.guidance_interval,
        num_steps=given.steps,
        sampler=given.sampler,
        spacing=given.spacing,
    )
    classes = find_classes(given.classes, config)
    labels = [label for label in classes or [0] for _ in range(given.num_per_class)]

    # The output is opened first: a path that cannot be written is found before the work, not after it.
    with (
        write_aside(output) as aside,
        tqdm(total=len(labels) * num_evaluations(config.process, config.sample), unit="eval") as progress,
    ):
        images = generate(model, config, labels, given.seed, given.batch_size, progress.update)
        if output.suffix == ".npz":
            write_npz(aside, images, labels if classes else None)
        else:
            columns = given.num_per_class if classes else UNLABELLED_COLUMNS
            image_grid(images, columns, [class_names(config)[label] for label in classes]).save(aside)
    sampling = config.sample
    print(
        f"{len(images)} images to {output}: EMA weights of {given.checkpoint}, {describe_guidance(sampling.guidance)}, "
        f"{sampling.sampler}, {sampling.num_steps} steps ({sampling.spacing}), seed {given.seed}"
    )


if __name__ == "__main__":
    run(main)
