"""A web page, in gradio, that draws images from the runs in a folder."""

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
from uvit.config import CONFIG_FILE, Config, from_dict, read_json, solvers_of
from uvit.integrations.page_drawing import (
    MAX_GUIDANCE,
    MAX_PAGE_IMAGES,
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
"""Number of classes that are selected at first if all would be too many."""
CACHE_SECONDS = 3600
"""How long a picture is available for download."""
CSS = """
.pictures .image-container { padding-top: 2.5rem; }
.pictures img { image-rendering: pixelated; }
.facts * { font-size: var(--text-sm); color: var(--neutral-500); }
"""


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Shows a user's error in one line on the page, without a traceback on the server."""
    try:
        yield
    except InputError as error:
        line = printable(one_line(error))
    except RuntimeError as error:
        # PyTorch has no exception of its own for running out of memory on a CPU.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        line = "not enough memory for that many images: draw fewer"
    else:
        return
    raise gr.Error(html.escape(line), print_exception=False)


def _lines(value: Any) -> Any:
    """Returns the lines of a text as a tuple; other types are returned unchanged, to be rejected later."""
    return tuple(line.strip() for line in value.splitlines() if line.strip()) if isinstance(value, str) else value


def build_page(folder: Path) -> gr.Blocks:
    """Builds the page that draws from the runs in a folder, for one request at a time.

    Args:
        folder: of the runs.
    """
    with gr.Blocks(title="uvit", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        gr.Markdown("# uvit\nDraw images from a trained run.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                with gr.Group():
                    run = gr.Dropdown(label="Run", elem_id="run")
                    classes = gr.Dropdown(label="Classes (all if none is chosen)", multiselect=True, elem_id="classes")
                    prompts = gr.Textbox(label="Prompts, one per line", lines=3, visible=False, elem_id="prompts")
                    number = gr.Slider(
                        1, 16, Drawing.num_per_class, step=1, label="Images of each", elem_id="num_per_class"
                    )
                    guidance = gr.Slider(1, MAX_GUIDANCE, step=0.1, label="Guidance (1 is none)", elem_id="guidance")
                    steps = gr.Slider(1, MAX_STEPS, step=1, label="Steps", elem_id="steps")
                    with gr.Row():
                        sampler = gr.Dropdown([], label="Sampler", min_width=120, elem_id="sampler")
                        seed = gr.Number(Drawing.seed, label="Seed", precision=0, min_width=120, elem_id="seed")
                    views = list(get_args(Denoising))
                    denoising = gr.Radio(
                        views, value=Drawing.denoising, label="Show the denoising", elem_id="denoising"
                    )
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
            """Shows the settings for a run, with its own values, or the nearest ones that the page allows."""
            with _one_line_errors():
                config = from_dict(Config, read_json(find_run(folder, name) / CONFIG_FILE))
            model, sampling = config.model, config.sample
            guided = model.null_class or bool(model.context_dim) or sampling.guidance_path
            names = list(class_names(config))
            chosen = names[:FIRST_CLASSES] if len(names) * Drawing.num_per_class > MAX_PAGE_IMAGES else []
            return {
                facts: html.escape(describe_run(name, config)),
                classes: gr.update(choices=names, value=chosen, visible=bool(model.num_classes)),
                prompts: gr.update(value="\n".join(sampling.prompts), visible=bool(model.context_dim)),
                guidance: gr.update(value=min(max(sampling.guidance, 1.0), MAX_GUIDANCE), visible=guided),
                sampler: gr.update(choices=solvers_of(config.process), value=sampling.sampler),
                steps: min(sampling.num_steps, MAX_STEPS),
            }

        def load() -> Any:
            """Lists the runs, with the newest selected."""
            runs = list_runs(folder)
            return gr.update(choices=runs, value=runs[0] if runs else None)

        def press(*sent: Any, progress: gr.Progress = gr.Progress()) -> dict[gr.Component, Any]:  # noqa: B008
            """Draws images and shows them."""
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

        # Values are not preprocessed by gradio: Drawing checks them, with our messages.
        unprocessed: dict[str, Any] = {"preprocess": False, "api_visibility": "private"}
        page.load(load, None, run, api_visibility="private").then(choose, run, settings, **unprocessed)
        run.input(choose, run, settings, **unprocessed)
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
    """Serves a page in background threads, and returns its URL.

    Args:
        page: from build_page.
        host: address to listen on; 127.0.0.1 is only for this machine.
        port: port to listen on; 0 is any free port.

    Raises:
        InputError: an address that is not available, such as a port in use, or that cannot be reached.
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
            # System fonts, since gradio's are fetched from the internet.
            theme=gr.themes.Default(
                primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=CSS,
        )
    except OSError as error:
        reason = error.strerror or "it is in use"
        raise InputError(f"cannot listen on {host}:{port}: {reason}; give another --port") from None
    except Exception as error:
        # gradio requests its own address to see whether the page is up, which fails if that goes through a proxy.
        raise InputError(
            f"the page does not answer at {host}:{port}: set NO_PROXY=localhost,{host} ({error})"
        ) from None
    return address


def serve(folder: Path, host: str, port: int) -> None:
    """Serves the page until Ctrl-C or SIGTERM.

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
