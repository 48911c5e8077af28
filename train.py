"""Trains a U-ViT: `accelerate launch train.py configs/digits.py --optim.lr 1e-3`, or plain `python train.py …`.

Running the same command again goes on from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
)
from einops import rearrange
from timm.utils import ModelEmaV3
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from uvit import UViT
from uvit.attention import resolve_backend
from uvit.checkpoint import find_checkpoint, find_config, read_state, save_checkpoint
from uvit.cli import is_first_process, parse, process_state, run, warn_of_missing_processes
from uvit.config import CONFIG_FILE, Config, load_config, to_json
from uvit.data import Batch, ImageData
from uvit.diffusion import diffusion_loss
from uvit.errors import InputError, Interrupted, TrainingError
from uvit.files import (
    SKIPPED_FILE,
    add_lines,
    describe_skipped,
    hold,
    make_directory,
    remove_leftovers,
    write_aside,
    write_text,
)
from uvit.generate import condition_names, find_conditions, generate, set_threads
from uvit.grid import image_grid
from uvit.images import random_flip, to_unit_range
from uvit.interrupt import stop_on_signals
from uvit.latent_data import check_encoders
from uvit.latents import EMPTY_CAPTION, Encoders, load_encoders, sample_latents
from uvit.loader import build_loader, check_batch, load_data
from uvit.optim import build_optimizer, build_scheduler, load_optimizer_state
from uvit.precision import check_compile, compile_model, resolve_precision, tf32
from uvit.resume import METRICS_FILE, MetricsFile, Progress, check_same_run, survive, tell
from uvit.sharding import cut_all, gather, share_out
from uvit.weights import WEIGHTS_FILE, write_weights

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
    if config.train.mixed_precision != "auto":  # whether a GPU has bf16 is asked when each process has its own
        resolve_precision(config.train.mixed_precision, device_type, config.model.embed_dim)
    check_compile(config.train.compile, device_type)
    check_batch(config.train, int(os.environ.get("WORLD_SIZE", 1)))
    for engine in ("FSDP", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise InputError(f"train.py shares a model out by --train.shard True, got {engine}: launch without it")
    if config.train.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError("train.tracker 'wandb' needs the package wandb, which is not installed: pip install wandb")
    run_dir = config.train.run_dir or str(Path("runs", Path(arguments[0]).stem))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=run_dir))


def flat(config: Config) -> dict[str, str]:
    """Names every value of a config `section.field`, as trackers want them."""
    sections = dataclasses.asdict(config).items()
    return {f"{section}.{field}": str(value) for section, fields in sections for field, value in fields.items()}


def step_seed(*numbers: int) -> int:
    """Mixes numbers such as (seed, step, process) into one seed, so that every step has its own randomness."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def save_grid(accelerator: Accelerator, model: UViT, config: Config, encoders: Encoders, path: Path, step: int) -> None:
    """Draws the run's grid of samples, writes it as a picture and tells the trackers; what fails there is warned of."""
    rows = find_conditions(config)[:GRID_ROWS]
    num_images = GRID_COLUMNS * (GRID_COLUMNS if rows == [None] else len(rows))
    conditions = [row for row in rows for _ in range(num_images // len(rows))]
    images = generate(model, config, conditions, config.train.seed, encoders=encoders)
    picture = image_grid(images, GRID_COLUMNS, condition_names(rows, config))
    with survive(str(path)), write_aside(path) as aside:
        picture.save(aside)
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        with survive(f"to {tracker.name}", (Exception,)):
            tracker.log_images({"samples": np.asarray(picture)[None]}, step=step, **layout)


def gather_model(model: UViT, keep: bool) -> UViT:
    """Puts a model that is shared out together, in a copy; every process must call it.

    Args:
        model: shared out.
        keep: whether this process wants the copy; if not, it gets the model.
    """
    weights = gather(model.state_dict(), keep)
    if not keep:
        return model
    copy = UViT(model.config)
    copy.load_state_dict(weights)
    return copy.to(next(model.parameters()).device)


def first_captions(data: ImageData) -> tuple[str, ...]:
    """Returns the data's first captions, each once, for the rows of a grid."""
    some = data.read(range(min(len(data), CAPTIONS_READ)), np.random.default_rng(0)).captions
    return tuple(dict.fromkeys(texts[0] for texts in some))[:GRID_ROWS]


def batches_on(device: torch.device, loader: Iterable[Batch], run_dir: Path) -> Iterator[Batch]:
    """Yields a loader's batches on the device, and tells of images that were left out.

    Raises:
        TrainingError: a worker died, as where memory ran out.
        InputError: a batch cannot be read.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(f"{' '.join(str(error).split())}: run the same command again") from None
        with survive(str(run_dir / SKIPPED_FILE)):
            for line in add_lines(run_dir / SKIPPED_FILE, batch.skipped):
                tell(f"skipped: {line}")
        yield batch.to(device)


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


def compute_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    config: Config,
    encoders: Encoders,
    batches: Iterator[Batch],
    generator: torch.Generator,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of one global batch, in parts that fit in memory.

    Args:
        accelerator: of the process.
        model: as the accelerator prepared it.
        config: the run.
        encoders: its text encoder, for a model with context.
        batches: the parts of this process, on the device.
        generator: on the device; seeded here for each part.
        step: optimizer steps done.

    Returns:
        The loss of this process' share, and the norm of the gradients before they are clipped, both on the device.
    """
    num_parts = config.train.accumulation_steps
    total_loss = torch.zeros((), device=accelerator.device)
    for part in range(num_parts):
        generator.manual_seed(step_seed(config.train.seed, step, part, accelerator.process_index))
        with nullcontext() if part == num_parts - 1 else accelerator.no_sync(model):
            loss = training_loss(model, config, encoders, next(batches), generator)
            accelerator.backward(loss / num_parts)
        total_loss += loss.detach() / num_parts
    if config.optim.grad_clip:
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
    else:
        accelerator.unscale_gradients()
        grad_norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return total_loss, grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm


def agree(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, signum: int
) -> tuple[float, float, int]:
    """Returns the loss and the gradient's norm, means over all processes, and a signal that any of them got, or 0.

    This is the one time in a step that the host waits for the device (the scaler of fp16 waits, too): an update must
    be known to be sound before it is made, and all processes must leave it out, or stop, at the same step.
    """
    mine = torch.stack([loss, grad_norm.to(loss), torch.full_like(loss, signum)])
    losses, norms, signals = zip(*accelerator.gather(mine).view(-1, len(mine)).tolist())
    return sum(losses) / len(losses), sum(norms) / len(norms), int(max(signals))


def last_checkpoint(step: int) -> str:
    """Names the last good checkpoint; step 0 is none."""
    return f"the last good checkpoint is that of step {step}" if step else "there is no checkpoint yet"


def open_checkpoint(accelerator: Accelerator, run_dir: Path) -> dict[str, Any] | None:
    """Reads the newest whole checkpoint, the same in every process, or returns None where there is none.

    Broken ones are told of and renamed, so that none is taken for a good one later.
    """
    found: list[Path | None] = [None]
    if accelerator.is_main_process:
        found[0], broken = find_checkpoint(run_dir)
        for folder, fault in broken.items():
            tell(f"warning: {folder} is not a whole checkpoint ({fault}): passed over")
            aside = folder.with_name(f"broken_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):
                folder.rename(aside)
    (folder,) = broadcast_object_list(found)
    return None if folder is None else read_state(folder)


def load_state(state: dict[str, Any], stateful: dict[str, Any], run_dir: Path) -> int:
    """Puts every part of a run back to where a checkpoint has it; returns the steps that it has done.

    Raises:
        InputError: the checkpoint does not fit.
    """
    try:
        for name, part in stateful.items():
            if name == "optimizer":
                load_optimizer_state(part, state[name])
            else:
                part.load_state_dict(cut_all(state[name], part.state_dict()))
        if type(state["step"]) is not int or state["step"] < 0:
            raise TypeError(f"step {state['step']!r:.80}")
        return state["step"]
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint in {run_dir} does not fit the config: {error!s:.200}") from None


def save(
    config: Config, run_dir: Path, step: int, state: dict[str, Any], metrics: MetricsFile, keep: int | None
) -> None:
    """Writes what a run has at a step; the checkpoint last, which says that the rest is there.

    Raises:
        InputError: a file cannot be written; the last checkpoint is still there.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        tell(f"warning: {run_dir / CONFIG_FILE} is gone, and written again")
        write_text(run_dir / CONFIG_FILE, to_json(config))
    with survive(str(metrics.path)):
        metrics.sync()
    write_weights(run_dir, state["ema"])
    save_checkpoint(run_dir, config, step, state, keep)


def main(arguments: Sequence[str]) -> None:
    """Reads the command line, opens the run folder and trains."""
    config = read_arguments(arguments)
    data = load_data(config.data, config.model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=data.class_names))
    if config.model.context_dim and not config.sample.prompts:
        prompts = first_captions(data)
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompts=prompts))
    run_dir = Path(config.train.run_dir or "")
    changed = check_same_run(config, run_dir, find_config(run_dir))
    encoders = load_encoders(config.data, config.model)
    check_encoders(data, config.data, encoders)
    make_directory(run_dir)
    with hold(run_dir) if is_first_process() else nullcontext():
        train(config, data, encoders, run_dir, changed)


def train(config: Config, data: ImageData, encoders: Encoders, run_dir: Path, changed: Sequence[str] = ()) -> None:
    """Trains to config.train.num_steps, from the newest whole checkpoint in the run folder where there is one.

    Args:
        config: the run.
        data: its images.
        encoders: its autoencoder and text encoder.
        run_dir: its folder, which no other process writes to.
        changed: what differs from the config that the folder's run had, to tell of.

    Raises:
        Interrupted: SIGTERM or SIGINT came; the step was finished and saved.
        TrainingError: too many steps in a row were not finite, or the last checkpoint could not be written.
        InputError: a checkpoint that does not fit, or data that cannot be read.
    """
    settings = config.train
    set_threads(config)
    accelerator = Accelerator(
        mixed_precision=resolve_precision(
            settings.mixed_precision, process_state().device.type, config.model.embed_dim
        ),
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
    compile_model(plain_model, plain_model.blocks, settings.compile)
    is_shared = settings.shard and accelerator.num_processes > 1
    if settings.shard and not is_shared:
        tell("warning: train.shard True shares nothing out with one process: start more")
    if is_shared:
        for each in (plain_model, ema.module):
            share_out(each, each.blocks, device, accelerator.num_processes)
    model = accelerator.prepare_model(plain_model, evaluation_mode=is_shared)  # which leaves out DDP alone
    optimizer = accelerator.prepare_optimizer(build_optimizer(plain_model, config.optim))
    progress = Progress(num_processes=accelerator.num_processes, num_images=len(data))
    stateful = {"model": plain_model, "ema": ema.module, "optimizer": optimizer, "progress": progress}
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler

    start = 0
    if (state := open_checkpoint(accelerator, run_dir)) is not None:
        start = load_state(state, stateful, run_dir)
        for name, value in {"num_processes": accelerator.num_processes, "num_images": len(data)}.items():
            if (before := getattr(progress, name)) != value:
                changed = [*changed, f"{name} {before}, got {value}"]
                setattr(progress, name, value)
        different = f", with {'; '.join(changed)}" if changed else ""
        accelerator.print(f"going on from step {start} of {settings.num_steps} in {run_dir}{different}")
    if start >= settings.num_steps:
        accelerator.print(f"nothing to do: {run_dir} has {start} steps (train.num_steps is {settings.num_steps})")
        return
    scheduler = build_scheduler(optimizer, config.optim, settings.num_steps, start)
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # a first update may be left out

    if is_main:
        for file in (CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, "samples/step_*.png"):
            remove_leftovers(run_dir / file)
        write_text(run_dir / CONFIG_FILE, to_json(config))
        metrics = MetricsFile(run_dir / METRICS_FILE, start)
    if settings.tracker != "none":
        with survive(f"to {settings.tracker}", (Exception,)):
            accelerator.init_trackers("uvit", config=flat(config))
    generator = torch.Generator(device)
    ending: TrainingError | Interrupted | None = None
    clock, clock_step = time.perf_counter(), start

    model.train()
    with (
        tf32(),
        stop_on_signals() as request,
        tqdm(total=settings.num_steps, initial=start, unit="step", disable=not is_main, dynamic_ncols=True) as bar,
    ):
        loader = build_loader(
            data, config, start, accelerator.process_index, accelerator.num_processes, pin_memory=device.type == "cuda"
        )
        batches = batches_on(device, loader, run_dir)
        for step in range(start, settings.num_steps):
            loss, grad_norm = compute_gradients(accelerator, model, config, encoders, batches, generator, step)

            # The update, unless its numbers went wrong in any process.
            mean_loss, norm, signum = agree(accelerator, loss, grad_norm, request.signum)
            is_sound, scaler = math.isfinite(mean_loss) and math.isfinite(norm), accelerator.scaler
            # Half precision overflows until its scale is small enough: that is no fault of the run.
            is_overflow = not is_sound and scaler is not None and math.isfinite(mean_loss) and scaler.get_scale() >= 1
            lr = scheduler.get_last_lr()[0]
            if is_sound:
                optimizer.step()
                ema.update(plain_model)
            elif scaler is not None:
                scaler.update()
            scheduler.step()
            optimizer.zero_grad()
            bar.update()
            done = step + 1

            progress.count(mean_loss, is_sound, is_overflow)
            if is_main and not is_sound and not is_overflow:
                tell(f"warning: step {done} is left out: loss {mean_loss:g}, norm of the gradient {norm:g}")
                with survive(str(metrics.path)):
                    metrics.add(step=done, skipped=True, loss=mean_loss, grad_norm=norm)
            is_lost = progress.bad_steps >= settings.max_bad_steps
            is_end = done == settings.num_steps

            if done % settings.log_every == 0 or is_end:
                average = progress.take_loss()
                rate = (done - clock_step) * settings.batch_size / (time.perf_counter() - clock)
                numbers = {"loss": average, "lr": lr, "grad_norm": norm, "images_per_second": rate}
                with survive(f"to {settings.tracker}", (Exception,)):
                    accelerator.log(numbers, step=done)
                if is_main:
                    with survive(str(metrics.path)):
                        metrics.add(step=done, **numbers)
                bar.set_postfix_str(f"loss {average:.4f}, {rate:.0f} images/s")
                clock, clock_step = time.perf_counter(), done

            paused_at, failure = time.perf_counter(), ""
            joins = is_main or is_shared  # what is shared out is put together by all
            if joins and settings.sample_every and (done % settings.sample_every == 0 or is_end):
                whole = gather_model(ema.module, keep=is_main) if is_shared else ema.module
                if is_main:
                    path = run_dir / "samples" / f"step_{done:08d}.png"
                    save_grid(accelerator, whole, config, encoders, path, done)
            if joins and not is_lost and (done % settings.save_every == 0 or is_end or signum):
                # What came before steps went wrong is kept until they are right again.
                good_step, keep = progress.good_step, None if progress.bad_steps else settings.keep
                progress.good_step = good_step if progress.bad_steps else done
                state = gather({name: part.state_dict() for name, part in stateful.items()}, keep=is_main)
                try:
                    if is_main:
                        save(config, run_dir, done, state, metrics, keep)
                except (OSError, InputError) as error:
                    progress.good_step = good_step
                    failure = f"step {done} could not be saved ({error}); {last_checkpoint(good_step)}"
            clock += time.perf_counter() - paused_at  # grids and checkpoints do not count in images/s

            if is_lost or (is_end and progress.bad_steps):
                why = f"{progress.bad_steps} steps in a row had a loss or gradient that is not finite"
                ending = TrainingError(f"{why}, the last step {done}; {last_checkpoint(progress.good_step)}")
            elif is_end and failure:
                ending = TrainingError(failure)
            elif signum and not is_end:
                ending = Interrupted(
                    signum, f"at step {done} of {settings.num_steps} in {run_dir}, {failure or 'saved'}"
                )
            elif failure:
                tell(f"warning: {failure}, training goes on and tries again")
            if ending is not None:
                break

    accelerator.wait_for_everyone()  # a launcher ends all processes with the first, and the main one may be writing
    with survive(f"to {settings.tracker}", (Exception,)):
        accelerator.end_training()
    if ending is not None:
        raise ending
    accelerator.print(
        f"{settings.num_steps} steps done; sample with: python sample.py --checkpoint {run_dir}"
        + describe_skipped(run_dir)
    )


if __name__ == "__main__":
    run(main)
