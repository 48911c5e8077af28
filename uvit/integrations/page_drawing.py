"""What a page is asked to draw, and what it answers: no browser here.

Whatever the browser sends is checked here, as a command line is: a page is a server that any program may talk to. A
run is one that `list_runs` finds, so no name leads out of the folder.
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

# What one request may ask for: others wait for it.
MAX_IMAGES = 100
MAX_STEPS = 250
MAX_GUIDANCE = 8.0

STRIP_COLUMNS = 10
MAX_FRAMES = 40
FRAME_MS, LAST_FRAME_MS = 120, 1500
MAX_WEBP_SIDE = 2**14 - 1
PATH_IN_MESSAGE = re.compile(r"(?<![\w:/.])/\S*/")
"""Where in a message a path of this machine begins, up to its last part."""


@dataclass(frozen=True, kw_only=True)
class Drawing(Section):
    """What one press of the button asks for.

    Raises:
        InputError: a value of the wrong type, or more than a page draws.
    """

    run: str
    """Name of a run in the page's folder."""
    classes: tuple[str, ...] = ()
    """Names or numbers of classes; all where none is given."""
    prompts: tuple[str, ...] = ()
    """Prompts for a text model; those of its training grids where none is given."""
    num_per_class: int = 4
    """Images of each class or prompt; for a model without either, images in all."""
    guidance: float = 1.0
    """w in w * cond + (1 - w) * uncond, 1 is none."""
    steps: int = 20
    """Steps of the sampler."""
    sampler: SolverName = "dpmpp_2m"
    """Solver."""
    seed: int = 0
    """The same seed draws the same images."""
    denoising: Denoising = "none"
    """How the images come about: a `strip` of the first image of each row, an `animation` of all, or not shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_per_class", self.num_per_class >= 1, "at least 1")
        self._require("guidance", abs(self.guidance) <= MAX_GUIDANCE, f"at most {MAX_GUIDANCE:g} in size")
        self._require_at_most(num_per_class=MAX_IMAGES, steps=MAX_STEPS)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    grid: Image.Image
    """The images, a row for each class or prompt."""
    denoising: bytes | None
    """A picture file of the noisy images on the way, WebP."""
    summary: str
    """What was drawn, in one line."""
    command: str
    """The command that draws the same grid; no command line takes a class or prompt that begins like an option."""


def list_runs(folder: Path) -> list[str]:
    """Returns the runs in a folder and the folders inside it, newest first, by their path below the folder.

    Left out are links that lead out of the folder, weights alone, which do not say how they were trained, and what
    cannot be read or has a name that cannot be printed.
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
    """Tells a run's config from that of weights alone; what is broken stays in the list, and says so when chosen."""
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
        on_progress: called with evaluations of the network, one for each image, done and in all.

    Raises:
        InputError: a run that is not there or cannot be read, or settings that do not fit it.
    """
    run = find_run(folder, drawing.run)
    given = DrawArguments(
        checkpoint=str(run.resolve()),  # a relative one that is deleted now might be a name of the hub's
        guidance=drawing.guidance,
        steps=drawing.steps,
        sampler=drawing.sampler,
        seed=drawing.seed,
    )
    try:
        config, model, encoders = given.load()
    except InputError as error:  # what other folders this machine has is not for visitors
        raise InputError(PATH_IN_MESSAGE.sub("", str(error)).partition(", did you mean")[0]) from None
    rows = resolve_conditions(config, drawing.classes, drawing.prompts)
    conditions = [row for row in rows for _ in range(drawing.num_per_class)]
    if len(conditions) > MAX_IMAGES:
        raise InputError(f"images must be at most {MAX_IMAGES} in all, got {len(rows)} × {drawing.num_per_class}")

    # A strip follows the first image of each row, an animation all of them; both end in the images themselves. They
    # come about together, as one batch; what is not followed is drawn as many at a time as is fastest.
    evaluations = num_evaluations(config.process, config.sample)
    batch_size = None if drawing.denoising == "none" else MAX_IMAGES
    followed = slice(None, None, drawing.num_per_class if drawing.denoising == "strip" else 1)
    most = {"none": 0, "strip": STRIP_COLUMNS - 1, "animation": MAX_FRAMES - 1}[drawing.denoising]
    shown_at = {round(each * (evaluations - 1) / most) for each in range(most)}
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
        summary=f"{count} in {seconds:.1f} s, {describe_guidance(drawing.guidance)}",
        command=describe_command(run, drawing),
    )


def _to_webp(pictures: list[Image.Image]) -> bytes:
    """Writes a picture, or several as an animation that stays at the last, as the bytes of a WebP file.

    They are made smaller, in place, where a file would not take them.
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
    """Says in one line what a run draws, and with what network."""
    model = config.model
    height, width = model.image_shape
    size = f"{height} × {width} × {model.in_chans} {'latents' if config.data.autoencoder else 'pixels'}"
    classes = f"{model.num_classes} classes" if model.num_classes else "unconditional"
    network = f"{model.embed_dim} wide, {model.depth + 1} blocks"
    training = f"{config.process.schedule}, {config.train.num_steps:,} steps of training"
    return f"{name}: {size}, {'from text' if model.context_dim else classes} · {network} · {training}"
