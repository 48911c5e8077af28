"""What the web page can be asked to draw, and drawing it; independent of gradio.

All that the browser sends is checked here, like a command line, since any program may send requests. A run must be one
that `list_runs` finds, so that no name leads out of the folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from os.path import getmtime, isfile
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from uvit.common.cli import command_line
from uvit.common.errors import UNPRINTABLE, InputError, did_you_mean, short_repr
from uvit.config import CONFIG_FILE, WEIGHTS_FILE, Config, Section, SolverName, config_kind, read_json
from uvit.diffusion.samplers import num_evaluations
from uvit.sampling.conditions import condition_names, resolve_conditions
from uvit.sampling.generate import decode_images, describe_guidance, generate, sample_grid
from uvit.sampling.grid import image_grid
from uvit.sampling.runs import DrawArguments

Denoising = Literal["none", "strip", "animation"]

# Limits of one request, since others wait for it.
MAX_PAGE_IMAGES = 100
MAX_STEPS = 250
MAX_GUIDANCE = 8.0

STRIP_COLUMNS = 10
MAX_FRAMES = 40
FRAME_MS, LAST_FRAME_MS = 120, 1500
MAX_WEBP_SIDE = 2**14 - 1
PATH_IN_MESSAGE = re.compile(r"(?<![\w:/.])/\S*/")
"""The folders of a path in a message, without the last part of the path."""


@dataclass(frozen=True, kw_only=True)
class Drawing(Section):
    """One request to draw.

    Raises:
        InputError: a value of the wrong type, or above the page's limits.
    """

    run: str
    """Name of a run in the page's folder."""
    classes: tuple[str, ...] = ()
    """Names or numbers of classes; by default all."""
    prompts: tuple[str, ...] = ()
    """Prompts for a text model; by default those of its training grids."""
    num_per_class: int = 4
    """Images per class or prompt; for a model without either, the total number."""
    guidance: float = 1.0
    """w in w * cond + (1 - w) * uncond, 1 is none."""
    steps: int = 20
    """Steps of the sampler."""
    sampler: SolverName = "dpmpp_2m"
    """Solver."""
    seed: int = 0
    """The same seed draws the same images."""
    denoising: Denoising = "none"
    """How to show the denoising: a `strip` for the first image of each row, an `animation` of all, or not at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_per_class", self.num_per_class >= 1, "at least 1")
        self._require("guidance", abs(self.guidance) <= MAX_GUIDANCE, f"at most {MAX_GUIDANCE:g} in size")
        self._require_at_most(num_per_class=MAX_PAGE_IMAGES, steps=MAX_STEPS)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The answer to a request."""

    grid: Image.Image
    """The images, one row for each class or prompt."""
    denoising: bytes | None
    """A WebP file of the denoising."""
    summary: str
    """What was drawn, in one line."""
    command: str
    """The command that draws the same grid, unless a class or prompt begins like an option."""


def list_runs(folder: Path) -> list[str]:
    """Returns the runs in a folder and its subfolders, newest first, as paths relative to the folder.

    Links that lead out of the folder are left out, and so are folders of weights, which do not say how they were
    trained, and what cannot be read or has an unprintable name.
    """
    root, found = folder.resolve(), []
    for place, inside, _ in os.walk(root):
        config, weights = files = [Path(place, name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        if not all(map(isfile, files)):
            continue
        inside.clear()  # a run holds no other
        name = str(Path(place).relative_to(root))
        with contextlib.suppress(OSError):  # it may be deleted meanwhile
            within = all(path.resolve().is_relative_to(root) for path in files)
            if within and not UNPRINTABLE.search(name) and _holds_run(config):
                found.append((-getmtime(weights), name))
    return [name for _, name in sorted(found)]


def _holds_run(config: Path) -> bool:
    """Returns whether a config is that of a run; a broken one counts, so that choosing it shows what is wrong."""
    try:
        raw = read_json(config)
    except InputError:
        return True
    return not isinstance(raw, dict) or config_kind(raw) == "run"


def find_run(folder: Path, name: Any) -> Path:
    """Returns the folder of a run that `list_runs` finds.

    Raises:
        InputError: no run by that name, or no longer.
    """
    runs = list_runs(folder)
    if name in runs:
        return folder / name
    if not runs:
        raise InputError(f"no run in {folder} yet: {command_line('train')} configs/digits.py makes one")
    near = did_you_mean(name, runs) if isinstance(name, str) else ""
    raise InputError(f"run not found in {folder}: {short_repr(name)}{near}")


def draw(folder: Path, drawing: Drawing, on_progress: Callable[[int, int], object]) -> Drawn:
    """Draws what was asked for.

    Args:
        folder: of the runs.
        drawing: what to draw.
        on_progress: called with the number of evaluations done, counted per image, and their total.

    Raises:
        InputError: a run that does not exist or cannot be read, or settings that do not fit it.
    """
    run = find_run(folder, drawing.run)
    given = DrawArguments(
        checkpoint=str(run.resolve()),  # if it is deleted now, a relative path could be a hub name
        guidance=drawing.guidance,
        steps=drawing.steps,
        sampler=drawing.sampler,
        seed=drawing.seed,
    )
    try:
        config, model, encoders = given.load()
    except InputError as error:  # does not show visitors the folders of this machine
        raise InputError(PATH_IN_MESSAGE.sub("", str(error)).partition(", did you mean")[0]) from None
    rows = resolve_conditions(config, drawing.classes, drawing.prompts)
    conditions = [row for row in rows for _ in range(drawing.num_per_class)]
    if len(conditions) > MAX_PAGE_IMAGES:
        raise InputError(f"images must be at most {MAX_PAGE_IMAGES} in all, got {len(rows)} × {drawing.num_per_class}")

    # A strip follows the first image of each row, an animation all of them; both end with the images themselves. To be
    # followed, images are drawn as one batch; otherwise in batches of the fastest size.
    evaluations = num_evaluations(config.process, config.sample)
    batch_size = None if drawing.denoising == "none" else MAX_PAGE_IMAGES
    followed = slice(None, None, drawing.num_per_class if drawing.denoising == "strip" else 1)
    num_noisy = {"none": 0, "strip": STRIP_COLUMNS - 1, "animation": MAX_FRAMES - 1}[drawing.denoising]
    shown_at = {round(number * (evaluations - 1) / num_noisy) for number in range(num_noisy)}
    frames: list[Tensor] = []
    done = 0

    def watch(x: Tensor) -> None:
        nonlocal done
        if done // len(x) in shown_at:
            frames.append(decode_images(x[followed], encoders).cpu())
        done += len(x)
        on_progress(done, len(conditions) * evaluations)

    start = time.monotonic()
    images = generate(model, config, conditions, drawing.seed, batch_size, encoders, watch)
    seconds = time.monotonic() - start
    frames.append(images[followed])
    denoising = None
    if drawing.denoising == "strip":
        cells = torch.stack(frames, dim=1).flatten(0, 1)
        denoising = _to_webp([image_grid(cells, len(frames), condition_names(rows, config))])
    elif drawing.denoising == "animation":
        denoising = _to_webp([sample_grid(frame, rows, drawing.num_per_class, config) for frame in frames])
    count = f"{len(images)} image{'s' if len(images) > 1 else ''}"
    return Drawn(
        grid=sample_grid(images, rows, drawing.num_per_class, config),
        denoising=denoising,
        summary=f"{count} in {seconds:.1f} s, {describe_guidance(drawing.guidance, config)}",
        command=describe_command(run, drawing),
    )


def _to_webp(pictures: list[Image.Image]) -> bytes:
    """Encodes a picture, or several as an animation that pauses at the last, as a WebP file.

    They are scaled down, in place, to the largest size that a file can have.
    """
    for picture in pictures:
        picture.thumbnail((MAX_WEBP_SIDE, MAX_WEBP_SIDE))
    file = io.BytesIO()
    first, *others = pictures
    durations = [*[FRAME_MS] * len(others), LAST_FRAME_MS]
    first.save(file, "WEBP", lossless=True, save_all=True, append_images=others, duration=durations, loop=0)
    return file.getvalue()


def describe_command(run: Path, drawing: Drawing) -> str:
    """Returns the command line of sample.py that draws the same grid."""
    words = [*command_line("sample").split(), "--checkpoint", str(run)]
    if drawing.classes:
        words += ["--classes", *drawing.classes]
    if drawing.prompts:
        words += ["--prompt", *drawing.prompts]
    words += ["--num_per_class", str(drawing.num_per_class), "--guidance", f"{drawing.guidance:g}"]
    words += ["--steps", str(drawing.steps), "--sampler", drawing.sampler, "--seed", str(drawing.seed)]
    return shlex.join(words)


def describe_run(name: str, config: Config) -> str:
    """Describes in one line what a run draws, and its network."""
    model = config.model
    height, width = model.image_shape
    size = f"{height} × {width} × {model.in_chans} {'latents' if config.data.autoencoder else 'pixels'}"
    classes = f"{model.num_classes} classes" if model.num_classes else "unconditional"
    training = f"{config.process.schedule}, {config.train.num_steps:,} steps of training"
    return f"{name}: {size}, {'from text' if model.context_dim else classes} · {model.description} · {training}"
