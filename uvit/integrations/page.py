"""A page in the browser that draws images from the runs of a folder; app.py serves it.

Whatever the browser sends is checked here, as a command line is: a page is a server that any program may talk to. A
run is one that `list_runs` finds, so no name leads out of the folder.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os.path import getmtime, isdir, isfile
from pathlib import Path
from typing import Any, Literal, get_args

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image
from torch import Tensor

from uvit.common.errors import UNPRINTABLE, InputError, did_you_mean, printable, short_repr
from uvit.config import CONFIG_FILE, WEIGHTS_FILE, Config, Section, SolverName, config_kind, from_dict, read_json
from uvit.diffusion.samplers import num_evaluations
from uvit.sampling.conditions import class_names, condition_names, resolve_conditions
from uvit.sampling.generate import decode_images, describe_guidance, generate, sample_grid
from uvit.sampling.grid import image_grid
from uvit.sampling.runs import DrawArguments

Denoising = Literal["none", "strip", "animation"]

# What one request may ask for: others wait for it.
MAX_IMAGES = 100
MAX_STEPS = 250
MAX_GUIDANCE = 8.0
MAX_WAITING = 20

FIRST_CLASSES = 4
"""Classes that are chosen at first where all of them would be too many."""
STRIP_COLUMNS = 10
MAX_FRAMES = 40
FRAME_MS, LAST_FRAME_MS = 120, 1500
MAX_WEBP_SIDE = 2**14 - 1
CACHE_SECONDS = 3600
"""How long a picture can be downloaded."""

PATH_IN_MESSAGE = re.compile(r"(?<![\w:/.])/\S*/")
"""Where in a message a path of this machine begins, up to its last part."""
CSS = """
.pictures .image-container { padding-top: 2.5rem; }
.pictures img { image-rendering: pixelated; }
.facts * { font-size: var(--text-sm); color: var(--neutral-500); }
"""


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
        raise InputError(f"no run in {folder} yet: python train.py configs/digits.py makes one")
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
    words = ["python", "sample.py", "--checkpoint", str(run)]
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


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Shows what a user got wrong as one line on the page, without a traceback on the server."""
    try:
        yield
    except InputError as error:
        line = printable(" ".join(str(error).split()))
    except RuntimeError as error:
        # A processor's memory that runs out has no exception of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        line = "not enough memory for that many images: draw fewer"
    else:
        return
    raise gr.Error(html.escape(line), print_exception=False)


def _lines(value: Any) -> Any:
    """Makes a tuple of a text's lines; what is no text is left for the check of its type."""
    return tuple(line.strip() for line in value.splitlines() if line.strip()) if isinstance(value, str) else value


def build_page(folder: Path) -> gr.Blocks:
    """Builds the page that draws from the runs of a folder.

    One request draws at a time, the others wait their turn.

    Args:
        folder: of the runs.
    """
    with gr.Blocks(title="U-ViT", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        gr.Markdown("# U-ViT\nDraw images from a trained run.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                with gr.Group():
                    run = gr.Dropdown(label="Run", elem_id="run")
                    classes = gr.Dropdown(
                        label="Classes (all where none is chosen)", multiselect=True, elem_id="classes"
                    )
                    prompts = gr.Textbox(label="Prompts, one a line", lines=3, visible=False, elem_id="prompts")
                    number = gr.Slider(
                        1, 16, Drawing.num_per_class, step=1, label="Images of each", elem_id="num_per_class"
                    )
                    guidance = gr.Slider(1, MAX_GUIDANCE, step=0.1, label="Guidance (1 is none)", elem_id="guidance")
                    steps = gr.Slider(1, MAX_STEPS, step=1, label="Steps", elem_id="steps")
                    with gr.Row():
                        solvers = list(get_args(SolverName))
                        sampler = gr.Dropdown(solvers, label="Sampler", min_width=120, elem_id="sampler")
                        seed = gr.Number(Drawing.seed, label="Seed", precision=0, min_width=120, elem_id="seed")
                    ways = list(get_args(Denoising))
                    denoising = gr.Radio(ways, value=Drawing.denoising, label="Show the denoising", elem_id="denoising")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                facts = gr.Markdown(elem_id="facts", elem_classes="facts")
            with gr.Column(scale=3, min_width=320):
                picture: dict[str, Any] = {
                    "interactive": False,
                    "buttons": ["download", "fullscreen"],
                    "elem_classes": "pictures",
                }
                grid = gr.Image(label="Images", format="png", elem_id="grid", **picture)
                film = gr.Image(label="Denoising", type="filepath", visible=False, elem_id="film", **picture)
                summary = gr.Markdown(elem_id="summary", elem_classes="facts")
                command = gr.Code(
                    label="The same grid from the command line",
                    language="shell",
                    visible=False,
                    wrap_lines=True,
                    show_line_numbers=False,
                    lines=1,
                    elem_id="command",
                )
        inputs = [run, classes, prompts, number, guidance, steps, sampler, seed, denoising]
        settings = [facts, classes, prompts, guidance, sampler, steps]

        def choose(name: Any) -> dict[gr.Component, Any]:
            """Shows the settings that a run takes, at its own values, or the nearest that a page draws."""
            with _one_line_errors():
                config = from_dict(Config, read_json(find_run(folder, name) / CONFIG_FILE))
            model, sampling = config.model, config.sample
            guided = model.null_class or bool(model.context_dim)
            names = list(class_names(config))
            chosen = names[:FIRST_CLASSES] if len(names) * Drawing.num_per_class > MAX_IMAGES else []
            return {
                facts: html.escape(describe_run(name, config)),
                classes: gr.update(choices=names, value=chosen, visible=bool(model.num_classes)),
                prompts: gr.update(value="\n".join(sampling.prompts), visible=bool(model.context_dim)),
                guidance: gr.update(value=min(max(sampling.guidance, 1.0), MAX_GUIDANCE), visible=guided),
                sampler: sampling.sampler,
                steps: min(sampling.num_steps, MAX_STEPS),
            }

        def load() -> Any:
            """Lists the runs, the newest chosen."""
            runs = list_runs(folder)
            return gr.update(choices=runs, value=runs[0] if runs else None)

        def press(*sent: Any, progress: gr.Progress = gr.Progress()) -> dict[gr.Component, Any]:  # noqa: B008
            """Draws, and shows what was drawn."""
            with _one_line_errors():
                values = {each.elem_id: value for each, value in zip(inputs, sent)}
                drawing = from_dict(Drawing, {**values, "prompts": _lines(values["prompts"])})
                progress(0, desc="loading")
                drawn = draw(folder, drawing, lambda done, total: progress((done, total), desc="drawing", unit="evals"))
            film_path = drawn.denoising and save_bytes_to_cache(drawn.denoising, "denoising.webp", film.GRADIO_CACHE)
            return {
                grid: drawn.grid,
                summary: drawn.summary,
                film: gr.update(value=film_path, visible=drawn.denoising is not None),
                command: gr.update(value=drawn.command, visible=True),
            }

        # Values come as they were sent: Drawing checks them, in our words.
        as_sent: dict[str, Any] = {"preprocess": False, "api_visibility": "private"}
        page.load(load, None, run, api_visibility="private").then(choose, run, settings, **as_sent)
        run.input(choose, run, settings, **as_sent)
        button.click(
            press,
            inputs,
            [grid, summary, film, command],
            api_name="draw",
            preprocess=False,
            concurrency_limit=1,
            show_progress_on=grid,
        )
    return page.queue(max_size=MAX_WAITING)


def launch(page: gr.Blocks, host: str, port: int) -> str:
    """Serves a page from threads of its own, and returns its address.

    Args:
        page: what build_page makes.
        host: address to listen on; 127.0.0.1 is this machine alone.
        port: where; 0 is any that is free.

    Raises:
        InputError: an address that cannot be listened on, such as a port in use, or that cannot be reached.
    """
    try:
        with socket.create_server((host, port)) as probe:
            port = probe.getsockname()[1]
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            inline=False,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            max_file_size=1,  # nothing is uploaded
            # The system's fonts: gradio's own come from the internet.
            theme=gr.themes.Default(
                primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=CSS,
        )
    except OSError as error:
        reason = error.strerror or "it is in use"
        raise InputError(f"cannot listen on {host}:{port}: {reason}; give another --port") from None
    except Exception as error:
        # gradio asks its own address whether the page is there, in vain where a proxy is asked instead.
        raise InputError(
            f"the page does not answer at {host}:{port}: set NO_PROXY=localhost,{host} ({error})"
        ) from None
    return address


def serve(folder: Path, host: str, port: int) -> None:
    """Serves the page until the process is told to stop.

    Raises:
        InputError: no such folder, or as launch.
    """
    if not isdir(folder):
        raise InputError(f"folder of runs not found: {folder}")
    page = build_page(folder)
    try:
        print(f"runs of {folder} at {launch(page, host, port)}, Ctrl-C to stop", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
