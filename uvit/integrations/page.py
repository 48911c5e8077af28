"""A page in the browser that draws images from the runs of a folder."""

from __future__ import annotations

import contextlib
import html
import socket
import threading
from collections.abc import Iterator
from os.path import isdir
from pathlib import Path
from typing import Any, get_args

import gradio as gr
import torch
from gradio.processing_utils import save_bytes_to_cache

from uvit.common.errors import InputError, one_line, printable
from uvit.config import CONFIG_FILE, Config, SolverName, from_dict, read_json
from uvit.integrations.page_drawing import (
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_STEPS,
    Denoising,
    Drawing,
    describe_run,
    draw,
    find_run,
    list_runs,
)
from uvit.sampling.conditions import class_names

MAX_WAITING = 20
FIRST_CLASSES = 4
"""Classes that are chosen at first where all of them would be too many."""
CACHE_SECONDS = 3600
"""How long a picture can be downloaded."""
CSS = """
.pictures .image-container { padding-top: 2.5rem; }
.pictures img { image-rendering: pixelated; }
.facts * { font-size: var(--text-sm); color: var(--neutral-500); }
"""


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Shows what a user got wrong as one line on the page, without a traceback on the server."""
    try:
        yield
    except InputError as error:
        line = printable(one_line(error))
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
