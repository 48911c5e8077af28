"""Draws images from a trained run: `python sample.py --checkpoint runs/digits --classes 0 1 2 --output grid.png`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from uvit.common.cli import parse
from uvit.common.files import atomic_write
from uvit.config import MAX_IMAGES
from uvit.diffusion.samplers import num_evaluations
from uvit.sampling.conditions import Condition, resolve_conditions
from uvit.sampling.generate import describe_guidance, generate, sample_grid
from uvit.sampling.runs import DrawArguments

SUFFIXES = (".png", ".jpg", ".jpeg", ".npz")


@dataclass(frozen=True, kw_only=True)
class Arguments(DrawArguments):
    classes: tuple[str, ...] = ()
    """Numbers or names of classes, one row of the grid for each; by default all."""
    prompt: tuple[str, ...] = ()
    """Prompts for a text model, one row of the grid for each; by default those of its training grids."""
    num_per_class: int = 8
    """Images per class or prompt; for a model without either, the total number."""
    output: str = "grid.png"
    """A picture (.png, .jpg), or the images and labels as arrays (.npz)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_per_class", self.num_per_class >= 1, "at least 1")
        self._require_at_most(num_per_class=MAX_IMAGES)
        self._require("output", Path(self.output).suffix.lower() in SUFFIXES, "a path ending in .png, .jpg or .npz")


def write_npz(path: Path, images: torch.Tensor, conditions: Sequence[Condition] | None) -> None:
    """Writes arr_0, images (N, H, W, C) uint8, and arr_1, labels or prompts (N,), in the format of ADM's evaluator."""
    arrays = [images.permute(0, 2, 3, 1).numpy()] + ([] if conditions is None else [np.asarray(conditions)])
    np.savez(path, *arrays)


def main(arguments: Sequence[str]) -> None:
    """Draws the images and writes them."""
    given = parse(Arguments, arguments, __doc__)
    output = Path(given.output)
    config, model, encoders = given.load()
    weak = given.load_guide(config)
    rows = resolve_conditions(config, given.classes, given.prompt)
    conditions = [row for row in rows for _ in range(given.num_per_class)]

    evaluations = len(conditions) * num_evaluations(config.process, config.sample)

    # The output is opened first, so that a path that cannot be written fails before the work, not after it.
    with (
        atomic_write(output) as temporary,
        tqdm(total=evaluations, unit="eval") as progress,
    ):
        drawing = model, config, conditions, given.seed, given.batch_size, encoders
        images = generate(*drawing, lambda x: progress.update(len(x)), weak)
        if output.suffix.lower() == ".npz":
            write_npz(temporary, images, None if rows == [None] else conditions)
        else:
            sample_grid(images, rows, given.num_per_class, config).save(temporary)
    sampling = config.sample
    print(
        f"{len(images)} images to {output}: EMA weights of {given.checkpoint}, "
        f"{describe_guidance(sampling.guidance, config, given.guide)}, "
        f"{sampling.sampler}, {sampling.num_steps} steps ({sampling.spacing}), reuse {sampling.reuse}, "
        f"precision {sampling.mixed_precision}, seed {given.seed}"
    )
