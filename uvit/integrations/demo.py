"""A page in the browser that draws images from the runs of a folder; app.py serves it.

Whatever the browser sends is checked here, as a command line is: a page is a server that any program may talk to. A
run is one that `list_runs` finds, so no name leads out of the folder.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image
from torch import Tensor

from uvit.config import CONFIG_FILE, Config, Section, SolverName, from_dict, read_json
from uvit.errors import InputError, did_you_mean, printable, shown
from uvit.generate import (
    DrawArguments,
    class_names,
    condition_names,
    decode_images,
    describe_guidance,
    find_conditions,
    generate,
    sample_grid,
)
from uvit.grid import image_grid
from uvit.samplers import num_evaluations
from uvit.weights import WEIGHTS_FILE

Denoising = Literal["none", "strip", "animation"]

# What one request may ask for: others wait for it.
MAX_IMAGES = 100
MAX_STEPS = 250
MAX_GUIDANCE = 8.0
MAX_WAITING = 20

STRIP_COLUMNS = 10
MAX_FRAMES = 40
FRAME_MS, LAST_FRAME_MS = 120, 1500
CACHE_SECONDS = 3600
"""How long a picture can be downloaded."""

NO_INTERNET: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = """
.pictures .image-container { padding-top: 2.5rem; }
.pictures img { image-rendering: pixelated; }
.facts * { font-size: var(--text-sm); color: var(--neutral-500); }
"""
HEAD = "# U-ViT\nDraw images from a trained run."


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
    """The command that draws the same grid."""


def list_runs(folder: Path) -> list[str]:
    """Returns the runs in a folder and the folders inside it, newest first, by their path below the folder.

    Links that lead out of the folder are left out, and so are weights alone, which do not say how they were trained.
    """
    root, found = folder.resolve(), []
    for place, inside, _ in os.walk(root):
        config, weights = (Path(place, name) for name in (CONFIG_FILE, WEIGHTS_FILE))
        if not weights.is_file() or not config.is_file():
            continue
        inside.clear()  # a run holds no other
        if all(path.resolve().is_relative_to(root) for path in (config, weights)) and _holds_run(config):
            found.append((-weights.stat().st_mtime, str(Path(place).relative_to(root))))
    return [name for _, name in sorted(found)]


def _holds_run(config: Path) -> bool:
    """Tells a run's config from that of weights alone; what is broken stays in the list, and says so when chosen."""
    try:
        raw = read_json(config)
    except InputError:
        return True
    return not isinstance(raw, dict) or "process" in raw


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
    raise InputError(f"run not found in {folder}: {shown(name)}{near}")


def draw(folder: Path, drawing: Drawing, on_progress: Callable[[int, int], object]) -> Drawn:
    """Draws what was asked for.

    Args:
        folder: of the runs.
        drawing: what to draw.
        on_progress: called with evaluations of the network, done and in all.

    Raises:
        InputError: a run that is not there or cannot be read, or settings that do not fit it.
    """
    run = find_run(folder, drawing.run)
    given = DrawArguments(
        checkpoint=str(run),
        guidance=drawing.guidance,
        steps=drawing.steps,
        sampler=drawing.sampler,
        seed=drawing.seed,
        batch_size=MAX_IMAGES,
    )
    config, model, encoders = given.load()
    rows = find_conditions(config, drawing.classes, drawing.prompts)
    conditions = [row for row in rows for _ in range(drawing.num_per_class)]
    if len(conditions) > MAX_IMAGES:
        raise InputError(f"images must be at most {MAX_IMAGES} in all, got {len(rows)} × {drawing.num_per_class}")

    # A strip follows the first image of each row, an animation all of them; both end in the images themselves.
    evaluations = num_evaluations(config.process, config.sample)
    followed = slice(None, None, drawing.num_per_class if drawing.denoising == "strip" else 1)
    most = {"none": 0, "strip": STRIP_COLUMNS - 1, "animation": MAX_FRAMES - 1}[drawing.denoising]
    shown_at = {round(each * (evaluations - 1) / most) for each in range(most)}
    frames: list[Tensor] = []
    done = 0

    def watch(x: Tensor) -> None:
        nonlocal done
        if done in shown_at:
            frames.append(decode_images(x[followed], encoders).cpu())
        done += 1
        on_progress(done, evaluations)

    start = time.monotonic()
    images = generate(model, config, conditions, drawing.seed, given.batch_size, encoders, watch)
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
    """Writes a picture, or several as an animation that stays at the last, as the bytes of a WebP file."""
    file = io.BytesIO()
    durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
    animated = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    pictures[0].save(file, "WEBP", lossless=True, **(animated if len(pictures) > 1 else {}))
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
    height, width = config.model.image_shape
    what = (
        f"{model.num_classes} classes" if model.num_classes else "from text" if model.context_dim else "unconditional"
    )
    size = f"{height} × {width} × {model.in_chans} {'latents' if config.data.autoencoder else 'pixels'}"
    network = f"{model.embed_dim} wide, {model.depth + 1} blocks"
    return (
        f"{name}: {size}, {what} · {network} · {config.process.schedule}, {config.train.num_steps:,} steps of training"
    )


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Shows what a user got wrong as one line on the page, without a traceback on the server."""
    try:
        yield
    except InputError as error:
        line = printable(" ".join(str(error).split()))
    except torch.OutOfMemoryError:
        line = "not enough memory for that many images: draw fewer"
    else:
        return
    raise gr.Error(html.escape(line), print_exception=False)


def _words(value: Any) -> Any:
    """Makes a tuple of what a list of choices sends; what is not one is left for the check of its type."""
    return tuple(value) if isinstance(value, list) else value


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
        gr.Markdown(HEAD)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                with gr.Group():
                    run = gr.Dropdown(label="Run", elem_id="run")
                    classes = gr.Dropdown(
                        label="Classes (all where none is chosen)", multiselect=True, elem_id="classes"
                    )
                    prompts = gr.Textbox(label="Prompts, one a line", lines=3, visible=False, elem_id="prompts")
                    number = gr.Slider(1, 16, Drawing.num_per_class, step=1, label="Images of each", elem_id="number")
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
        settings = [facts, classes, prompts, guidance, sampler, steps]

        def choose(name: Any) -> dict[gr.Component, Any]:
            """Shows the settings that a run takes, at its own values."""
            with _one_line_errors():
                config = from_dict(Config, read_json(find_run(folder, name) / CONFIG_FILE))
            model, sampling = config.model, config.sample
            guided = model.null_class or bool(model.context_dim)
            return {
                facts: html.escape(describe_run(name, config)),
                classes: gr.update(choices=list(class_names(config)), value=[], visible=bool(model.num_classes)),
                prompts: gr.update(value="\n".join(sampling.prompts), visible=bool(model.context_dim)),
                guidance: gr.update(value=sampling.guidance, visible=guided),
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
                values = dict(zip(inputs, sent))
                drawing = Drawing(
                    **{**values, "classes": _words(values["classes"]), "prompts": _lines(values["prompts"])}
                )
                progress(0, desc="loading")
                drawn = draw(folder, drawing, lambda done, total: progress((done, total), desc="drawing", unit="steps"))
            film_path = drawn.denoising and save_bytes_to_cache(drawn.denoising, "denoising.webp", film.GRADIO_CACHE)
            return {
                grid: drawn.grid,
                summary: drawn.summary,
                film: gr.update(value=film_path, visible=drawn.denoising is not None),
                command: gr.update(value=drawn.command, visible=True),
            }

        inputs: Mapping[str, gr.Component] = {
            "run": run,
            "classes": classes,
            "prompts": prompts,
            "num_per_class": number,
            "guidance": guidance,
            "steps": steps,
            "sampler": sampler,
            "seed": seed,
            "denoising": denoising,
        }
        # Values come as they were sent: Drawing checks them, in our words.
        chosen: dict[str, Any] = {"preprocess": False, "api_visibility": "private"}
        page.load(load, None, run, api_visibility="private").then(choose, run, settings, **chosen)
        run.input(choose, run, settings, **chosen)
        button.click(
            press,
            list(inputs.values()),
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
        InputError: an address that cannot be listened on, such as a port in use.
    """
    try:
        with socket.create_server((host, port)) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from None
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
        theme=gr.themes.Default(primary_hue="blue", **NO_INTERNET),
        css=CSS,
    )
    return address


def serve(folder: Path, host: str, port: int) -> None:
    """Serves the page until the process is told to stop.

    Raises:
        InputError: no such folder, or as launch.
    """
    if not folder.is_dir():
        raise InputError(f"folder of runs not found: {folder}")
    page = build_page(folder)
    try:
        print(f"runs of {folder} at {launch(page, host, port)}, Ctrl-C to stop", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
