"""Trains a U-ViT: `accelerate launch train.py configs/digits.py --optim.lr 1e-3`, or plain `python train.py …`.

Running the same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, parse_flag_from_env
from einops import rearrange
from timm.utils import ModelEmaV3
from tqdm import tqdm

from uvit import UViT
from uvit.attention import resolve_backend
from uvit.checkpoint import load_checkpoint, save_checkpoint
from uvit.cli import parse, run, warn_of_missing_processes
from uvit.config import CONFIG_FILE, Config, from_dict, load_config, read_json, to_json
from uvit.data import Batch, ImageData
from uvit.diffusion import diffusion_loss
from uvit.errors import InputError
from uvit.files import SKIPPED_FILE, add_lines, describe_skipped, make_directory, write_aside, write_text
from uvit.generate import condition_names, find_conditions, generate, set_threads
from uvit.grid import image_grid
from uvit.images import random_flip, to_unit_range
from uvit.latent_data import check_encoders
from uvit.latents import EMPTY_CAPTION, Encoders, load_encoders, sample_latents
from uvit.loader import build_loader, check_batch, load_data
from uvit.optim import build_optimizer, build_scheduler
from uvit.weights import write_weights

USAGE = "train.py CONFIG"
GRID_ROWS, GRID_COLUMNS = 10, 8
CAPTIONS_READ = 100  # to find enough different ones for the rows


def read_arguments(arguments: Sequence[str]) -> Config:
    """Reads CONFIG and its overrides, and checks all that can be checked before any device starts."""
    if not arguments or arguments[0].startswith("-"):
        if "-h" in arguments or "--help" in arguments:
            parse(Config, ["--help"], USAGE, __doc__ or "")
        raise InputError("the first argument must be a config file, such as configs/digits.py")
    config = parse(Config, arguments[1:], USAGE, __doc__ or "", default=load_config(arguments[0]))
    accelerator = None if parse_flag_from_env("ACCELERATE_USE_CPU") else torch.accelerator.current_accelerator()
    device_type = accelerator.type if accelerator is not None and torch.accelerator.is_available() else "cpu"
    resolve_backend(config.model.attention, device_type, config.model.embed_dim // config.model.num_heads)
    if config.train.mixed_precision == "fp16" and device_type != "cuda":
        raise InputError(f"train.mixed_precision 'fp16' needs a CUDA device, got {device_type!r}: use 'bf16' or 'no'")
    check_batch(config.train, int(os.environ.get("WORLD_SIZE", 1)))
    for engine in ("FSDP", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise InputError(
                f"train.py shares batches between processes, not the model, got {engine}: launch without it"
            )
    if config.train.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError("train.tracker 'wandb' needs the package wandb, which is not installed: pip install wandb")
    run_dir = config.train.run_dir or str(Path("runs", Path(arguments[0]).stem))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=run_dir))


# What may change when a run goes on; anything else would make it another run.
HARMLESS = {
    "model": {"attention", "gradient_checkpointing"},
    "process": set(),
    "data": {"num_workers", "test_split", "class_names"},
    "optim": set(),
    "train": {"run_dir", "num_steps", "num_threads", "log_every", "sample_every", "save_every", "keep", "tracker"},
}


def check_same_run(config: Config, run_dir: Path) -> None:
    """Stops where the run folder holds a run that this config cannot go on with."""
    if not os.path.isdir(run_dir / "checkpoints") or not os.path.isfile(run_dir / CONFIG_FILE):
        return
    before, now = from_dict(Config, read_json(run_dir / CONFIG_FILE)), config
    for section, harmless in HARMLESS.items():
        for field in dataclasses.fields(getattr(now, section)):
            was, value = (getattr(getattr(each, section), field.name) for each in (before, now))
            if was != value and field.name not in harmless:
                held = f"{run_dir} holds a run with {section}.{field.name} {was!r}"
                raise InputError(f"{held}, got {value!r}: use another --train.run_dir")


def flat(config: Config) -> dict[str, str]:
    """Names every value of a config `section.field`, as trackers want them."""
    sections = dataclasses.asdict(config).items()
    return {f"{section}.{field}": str(value) for section, fields in sections for field, value in fields.items()}


def step_seed(*numbers: int) -> int:
    """Mixes numbers such as (seed, step, process) into one seed, so that every step has its own randomness."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def save_grid(model: UViT, config: Config, encoders: Encoders, path: Path) -> np.ndarray:
    """Draws the run's grid of samples, writes it as a picture and returns it as (H, W, 3)."""
    rows = find_conditions(config)[:GRID_ROWS]
    num_images = GRID_COLUMNS * (GRID_COLUMNS if rows == [None] else len(rows))
    conditions = [row for row in rows for _ in range(num_images // len(rows))]
    images = generate(model, config, conditions, config.train.seed, num_images, encoders)
    picture = image_grid(images, GRID_COLUMNS, condition_names(rows, config))
    with write_aside(path) as aside:
        picture.save(aside)
    return np.asarray(picture)


def first_captions(data: ImageData) -> tuple[str, ...]:
    """Returns the data's first captions, each once, for the rows of a grid."""
    some = data.read(range(min(len(data), CAPTIONS_READ)), np.random.default_rng(0)).captions
    return tuple(dict.fromkeys(texts[0] for texts in some))[:GRID_ROWS]


def keep_metrics(path: Path, step: int) -> None:
    """Drops the lines after a step, which a run that goes on from there will write again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if json.loads(line)["step"] <= step))


def training_loss(
    network: Callable[..., torch.Tensor],
    config: Config,
    encoders: Encoders,
    batch: Batch,
    generator: torch.Generator,
) -> torch.Tensor:
    """Returns the loss of a batch; flips, latents, dropped conditions, times and noise are drawn on the device.

    Args:
        network: network(x, timesteps, **condition).
        config: the run.
        encoders: its text encoder, for a model with context.
        batch: on the device.
        generator: source of all randomness, on the device.
    """
    if config.data.autoencoder is not None:
        images = sample_latents(batch.images, config.data.scale_factor, generator)
    else:
        images = to_unit_range(batch.images)
        if config.data.flip:
            images = random_flip(images, generator)
    # Guidance needs dropped labels to become the null class, and dropped captions the empty one.
    dropped = torch.rand(len(images), device=images.device, generator=generator) < config.train.label_dropout
    condition = {}
    if config.model.num_classes:
        condition["y"] = torch.where(dropped, config.model.num_classes, batch.labels)
    if encoders.text is not None:
        if batch.context is not None and batch.empty_context is not None:
            context, empty = batch.context.float(), batch.empty_context.float()
        else:
            context, empty = encoders.text([texts[0] for texts in batch.captions]), encoders.text([EMPTY_CAPTION])
        condition["context"] = torch.where(rearrange(dropped, "B -> B 1 1"), empty, context)
    return diffusion_loss(partial(network, **condition), images, config.process, generator)


def main(arguments: Sequence[str]) -> None:
    """Reads the command line, opens the run folder and trains."""
    config = read_arguments(arguments)
    data = load_data(config.data, config.model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=data.class_names))
    if config.model.context_dim and not config.sample.prompts:
        prompts = first_captions(data)
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompts=prompts))
    run_dir = Path(config.train.run_dir or "")
    check_same_run(config, run_dir)
    encoders = load_encoders(config.data, config.model)
    check_encoders(data, config.data, encoders)
    make_directory(run_dir)
    train(config, data, encoders, run_dir)


def train(config: Config, data: ImageData, encoders: Encoders, run_dir: Path) -> None:
    """Trains to config.train.num_steps, from the newest checkpoint in the run folder where there is one."""
    settings = config.train
    torch.set_float32_matmul_precision("high")
    set_threads(config)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop below does it itself
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_config=ProjectConfiguration(project_dir=str(run_dir), logging_dir=str(run_dir)),
    )
    device, is_main = accelerator.device, accelerator.is_main_process
    warn_of_missing_processes(accelerator.num_processes)

    # Everything that changes over the run.
    torch.manual_seed(settings.seed)
    plain_model, encoders = UViT(config.model).to(device), encoders.to(device)
    ema = ModelEmaV3(plain_model, decay=settings.ema_decay)
    model, optimizer = accelerator.prepare(plain_model, build_optimizer(plain_model, config.optim))
    scheduler = build_scheduler(optimizer, config.optim, settings.num_steps)
    stateful = {"model": plain_model, "ema": ema.module, "optimizer": optimizer, "scheduler": scheduler}
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler

    start = 0
    if (state := load_checkpoint(run_dir)) is not None:
        start = state["step"]
        try:
            for name, part in stateful.items():
                part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"the checkpoint in {run_dir} does not fit the config: {error!s:.200}") from None
        accelerator.print(f"going on from step {start} of {settings.num_steps} in {run_dir}")
    if start >= settings.num_steps:
        accelerator.print(f"nothing to do: {run_dir} has {start} steps (train.num_steps is {settings.num_steps})")
        return

    if is_main:
        write_text(run_dir / CONFIG_FILE, to_json(config))
        keep_metrics(run_dir / "metrics.jsonl", start)
    generator = torch.Generator(device)
    loader = build_loader(
        data, config, start, accelerator.process_index, accelerator.num_processes, pin_memory=device.type == "cuda"
    )
    batches = iter(loader)
    if settings.tracker != "none":
        accelerator.init_trackers("uvit", config=flat(config))
    running_loss, logged_at, logged_step = torch.zeros((), device=device), time.perf_counter(), start

    model.train()
    with tqdm(
        total=settings.num_steps, initial=start, unit="step", disable=not is_main, dynamic_ncols=True
    ) as progress:
        for step in range(start, settings.num_steps):
            # One optimizer step on a global batch, in parts that fit in memory.
            for part in range(settings.accumulation_steps):
                batch = next(batches).to(device)
                for line in add_lines(run_dir / SKIPPED_FILE, batch.skipped):
                    progress.write(f"skipped: {line}", file=sys.stderr)
                generator.manual_seed(step_seed(settings.seed, step, part, accelerator.process_index))
                is_last = part == settings.accumulation_steps - 1
                with nullcontext() if is_last else accelerator.no_sync(model):
                    loss = training_loss(model, config, encoders, batch, generator)
                    accelerator.backward(loss / settings.accumulation_steps)
                running_loss += loss.detach() / settings.accumulation_steps

            if config.optim.grad_clip:
                accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            ema.update(plain_model)
            progress.update()
            done = step + 1

            if done % settings.log_every == 0 or done == settings.num_steps:
                mean_loss = accelerator.reduce(running_loss, "mean").item() / (done - logged_step)
                rate = (done - logged_step) * settings.batch_size / (time.perf_counter() - logged_at)
                metrics = {"loss": mean_loss, "lr": lr, "images_per_second": rate}
                accelerator.log(metrics, step=done)
                if is_main:
                    with open(run_dir / "metrics.jsonl", "a") as lines:
                        print(json.dumps({"step": done, **metrics}), file=lines)
                progress.set_postfix_str(f"loss {mean_loss:.4f}, {rate:.0f} images/s")
                running_loss.zero_()
                logged_step, logged_at = done, time.perf_counter()

            is_end, paused_at = done == settings.num_steps, time.perf_counter()
            if is_main and settings.sample_every and (done % settings.sample_every == 0 or is_end):
                picture = save_grid(ema.module, config, encoders, run_dir / "samples" / f"step_{done:08d}.png")
                for tracker in accelerator.trackers:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"samples": picture[None]}, step=done, **layout)
            if is_main and (done % settings.save_every == 0 or is_end):
                write_weights(run_dir, ema.module.state_dict())
                save_checkpoint(
                    run_dir, done, {name: part.state_dict() for name, part in stateful.items()}, settings.keep
                )
            logged_at += time.perf_counter() - paused_at  # grids and checkpoints do not count in images/s

    accelerator.end_training()
    accelerator.print(
        f"{settings.num_steps} steps done; sample with: python sample.py --checkpoint {run_dir}"
        + describe_skipped(run_dir)
    )


if __name__ == "__main__":
    run(main)
