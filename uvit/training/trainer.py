"""The training loop: build and resume, then step, report, draw and save until the end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from uvit.common.cli import command_line, process_state
from uvit.common.errors import InputError, Interrupted, TrainingError
from uvit.common.files import atomic_write, remove_leftovers
from uvit.common.messages import warn, warn_on_failure
from uvit.common.signals import StopRequest, stop_on_signals
from uvit.config import CONFIG_FILE, GRID_FOLDER, GRID_PATTERN, METRICS_FILE, WEIGHTS_FILE, Config, grid_path, save_json
from uvit.data.batch import ImageData
from uvit.data.loader import build_loader
from uvit.data.skipped import describe_skipped
from uvit.networks.contract import Network
from uvit.networks.encoders import Encoders
from uvit.networks.runtime import compile_model, resolve_precision, set_up_process, tf32
from uvit.sampling.conditions import resolve_conditions
from uvit.sampling.generate import generate, sample_grid
from uvit.training.alignment import build_projector, last_term, with_projector
from uvit.training.averages import Averages
from uvit.training.checkpoint import save_checkpoint
from uvit.training.initial import initial_network
from uvit.training.optim import build_optimizer, build_schedule
from uvit.training.progress import MetricsFile, Progress, Stopwatch
from uvit.training.resume import last_checkpoint, load_state, open_checkpoint
from uvit.training.sharding import shard, unshard, unshard_network
from uvit.training.step import (
    Lookahead,
    Loss,
    StepResult,
    batches_on_device,
    compute_gradients,
    mean_over_processes,
    training_loss,
)
from uvit.weights.tensors import write_weights

GRID_ROWS, GRID_COLUMNS = 10, 8


class Trainer:
    """A run, in one process. `train` calls its stages, each a method.

    Args:
        config: the run.
        data: its images.
        encoders: its autoencoder and text encoder.
        run_dir: its folder, which only this run writes to.
        loss_of: the loss of a batch.
    """

    def __init__(
        self, config: Config, data: ImageData, encoders: Encoders, run_dir: Path, loss_of: Loss = training_loss
    ) -> None:
        self.config, self.data, self.encoders, self.run_dir, self.loss_of = config, data, encoders, run_dir, loss_of
        self.done = 0  # number of steps

    def build(self) -> None:
        """Builds the network, its average and the optimizer, on the device, and sharded or replicated."""
        config, settings = self.config, self.config.train
        device_type = process_state().device.type
        set_up_process(settings.num_threads, device_type)
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(settings.mixed_precision, device_type, config.model.width),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # compute_gradients accumulates
            log_with=None if settings.tracker == "none" else settings.tracker,
            project_config=ProjectConfiguration(project_dir=str(self.run_dir), logging_dir=str(self.run_dir)),
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        num_processes = self.accelerator.num_processes
        torch.manual_seed(settings.seed)
        self.network, num_absent = initial_network(config, self.run_dir, self.device)
        self.encoders = self.encoders.to(self.device)
        self.ema = ModelEmaV3(cast(nn.Module, self.network), decay=settings.ema_decay)
        compile_model(self.network, settings.compile)
        projector: Any = build_projector(config, self.encoders, self.device)
        self.is_sharded = settings.shard and num_processes > 1
        if settings.shard and not self.is_sharded:
            warn("train.shard True has no effect with one process: start more")
        if self.is_sharded:
            for each in filter(None, (self.network, self.average, projector)):
                shard(each, self.device, num_processes)
        self.averages = Averages(self.network, settings, self.run_dir)
        # evaluation_mode only omits DDP, which FSDP2 replaces.
        trained = with_projector(self.network, projector, config)
        self.model = self.accelerator.prepare_model(trained, evaluation_mode=self.is_sharded)
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(self.network, config.optim, projector))
        self.progress = Progress(num_processes=num_processes, num_images=len(self.data), num_absent=num_absent)
        # All state that changes during the run.
        self.stateful: dict[str, Any] = {"model": self.network, "ema": self.average}
        self.stateful |= {"optimizer": self.optimizer, "progress": self.progress, **self.averages.stateful}
        self.stateful |= {"projector": projector} if projector is not None else {}
        if self.accelerator.scaler is not None:
            self.stateful["scaler"] = self.accelerator.scaler
        self.generator = torch.Generator(self.device)

    @property
    def average(self) -> Network:
        """The network with the averaged weights."""
        return cast(Network, self.ema.module)

    @property
    def is_end(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.config.train.num_steps

    def train(self, changed: Sequence[str] = ()) -> None:
        """Trains to config.train.num_steps, from the newest complete checkpoint in the run folder if there is one.

        Args:
            changed: differences from the config of the run to resume, to report.

        Raises:
            Interrupted: SIGTERM or SIGINT was received; the current step was finished and saved.
            TrainingError: too many steps in a row were not finite, or the last checkpoint could not be written.
            InputError: a checkpoint that does not fit, or data that cannot be read.
        """
        self.build()
        self.resume(changed)
        if self.is_end:
            has = f"has {self.done} steps (train.num_steps is {self.config.train.num_steps})"
            self.accelerator.print(f"nothing to do: {self.run_dir} {has}")
            return
        self.open_records()
        ending: Exception | None = None
        with tf32(), stop_on_signals() as request, self.bar:
            while ending is None and not self.is_end:
                result = self.step(request)
                self.report(result)
                with self.stopwatch.paused():
                    self.draw()
                    self.averages.snapshot(self.done, self.is_end, self.is_main)
                    failure = self.save(result)
                ending = self.find_ending(result, failure)
        self.end(ending)

    def resume(self, changed: Sequence[str]) -> None:
        """Restores the newest complete checkpoint, if any, and prepares loader and learning rate for the next step."""
        settings, progress = self.config.train, self.progress
        state = open_checkpoint(self.accelerator, self.run_dir)
        if state is not None:
            self.done = load_state(state, self.stateful, self.run_dir)
            now = {"num_processes": self.accelerator.num_processes, "num_images": len(self.data)}
            for name, value in now.items():
                if (before := getattr(progress, name)) != value:
                    changed = [*changed, f"{name} {before}, got {value}"]
                    setattr(progress, name, value)
            different = f", with {'; '.join(changed)}" if changed else ""
            at = f"step {self.done} of {settings.num_steps} in {self.run_dir}"
            self.accelerator.print(f"resuming from {at}{different}")
        self.set_learning_rate = build_schedule(self.optimizer, self.config.optim, settings.num_steps)
        loader = build_loader(
            self.data,
            self.config,
            self.done,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            pin_memory=self.device.type == "cuda",
        )
        batches = batches_on_device(self.device, loader, self.run_dir)
        self.batches = Lookahead(itertools.chain([next(batches)], batches))  # data may be broken: before any file

    def open_records(self) -> None:
        """Opens the outputs of the run: its folder, metrics, tracker and progress bar."""
        settings = self.config.train
        if self.is_main:
            for file in (CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, Path(GRID_FOLDER, GRID_PATTERN)):
                remove_leftovers(self.run_dir / file)
            save_json(self.run_dir / CONFIG_FILE, self.config)
            self.metrics = MetricsFile(self.run_dir / METRICS_FILE, self.done)
            self.averages.forget_after(self.done)
        if settings.tracker != "none":
            with warn_on_failure(f"to {settings.tracker}", (Exception,)):
                self.accelerator.init_trackers("uvit", config=self.config.flattened())
        self.stopwatch = Stopwatch(self.done)
        self.bar = tqdm(
            total=settings.num_steps, initial=self.done, unit="step", disable=not self.is_main, dynamic_ncols=True
        )
        self.model.train()

    def step(self, request: StopRequest) -> StepResult:
        """Takes one step: gradients, then the updates of weights and average, unless loss or norm are not finite.

        Args:
            request: the stop request of this process, which is read after the gradients are computed.
        """
        for each in (self.network, self.average) if self.progress.num_absent else ():
            each.fade_in(min(1.0, self.done / max(1, self.config.optim.warmup_steps)), self.progress.num_absent)
        loss, grad_norm = compute_gradients(
            self.accelerator,
            self.model,
            self.config,
            self.encoders,
            self.batches,
            self.generator,
            self.done,
            self.loss_of,
        )
        if self.done + 1 < self.config.train.num_steps:
            self.batches.fetch()  # while the device computes what the host waits for next
        mean_loss, norm, signum = mean_over_processes(self.accelerator, loss, grad_norm, request.signum)
        is_sound, scaler = math.isfinite(mean_loss) and math.isfinite(norm), self.accelerator.scaler
        # fp16 overflows until its scale is small enough, which is not a fault of the run.
        is_overflow = not is_sound and scaler is not None and math.isfinite(mean_loss) and scaler.get_scale() >= 1
        lr = self.set_learning_rate(self.done)
        if is_sound:
            self.optimizer.step()
            self.ema.update(cast(nn.Module, self.network))
            self.averages.update(self.network)
        elif scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()
        self.done += 1
        self.progress.record(mean_loss, is_sound, is_overflow)
        return StepResult(self.done, mean_loss, norm, lr, is_sound, is_overflow, signum)

    def report(self, result: StepResult) -> None:
        """Updates the progress bar, warns of a skipped step, and logs the metrics if due."""
        self.bar.update()
        if self.is_main and not result.is_sound and not result.is_overflow:
            warn(f"step {result.step} is skipped: loss {result.loss:g}, gradient norm {result.grad_norm:g}")
            with warn_on_failure(str(self.metrics.path)):
                self.metrics.add(step=result.step, skipped=True, loss=result.loss, grad_norm=result.grad_norm)
        settings = self.config.train
        if result.step % settings.log_every and not self.is_end:
            return
        rate = self.stopwatch.steps_per_second(result.step) * settings.batch_size
        numbers = {
            "loss": self.progress.pop_mean_loss(),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "images_per_second": rate,
        } | last_term(self.accelerator, self.model)
        with warn_on_failure(f"to {settings.tracker}", (Exception,)):
            self.accelerator.log(numbers, step=result.step)
        if self.is_main:
            with warn_on_failure(str(self.metrics.path)):
                self.metrics.add(step=result.step, **numbers)
        self.bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {rate:.0f} images/s")

    def draw(self) -> None:
        """Draws the grid of samples if due, writes it as a picture and logs it to the trackers."""
        every = self.config.train.sample_every
        if not every or (self.done % every and not self.is_end) or not (self.is_main or self.is_sharded):
            return
        network = unshard_network(self.average, keep=self.is_main) if self.is_sharded else self.average
        if not self.is_main:
            return
        rows = resolve_conditions(self.config)[:GRID_ROWS]
        num_images = GRID_COLUMNS * (GRID_COLUMNS if rows == [None] else len(rows))
        conditions = [row for row in rows for _ in range(num_images // len(rows))]
        images = generate(network, self.config, conditions, self.config.train.seed, encoders=self.encoders)
        picture = sample_grid(images, rows, GRID_COLUMNS, self.config)
        path = grid_path(self.run_dir, self.done)
        with warn_on_failure(str(path)), atomic_write(path) as temporary:
            picture.save(temporary)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with warn_on_failure(f"to {tracker.name}", (Exception,)):
                tracker.log_images({"samples": np.asarray(picture)[None]}, step=self.done, **layout)

    def save(self, result: StepResult) -> str:
        """Saves the run if due: the checkpoint comes last, so that all that it relies on is there.

        Returns:
            What failed, or ""; the last checkpoint is still there.
        """
        settings, progress = self.config.train, self.progress
        is_due = result.step % settings.save_every == 0 or self.is_end or result.signum
        if not is_due or progress.bad_steps >= settings.max_bad_steps or not (self.is_main or self.is_sharded):
            return ""
        # Checkpoints from before bad steps are kept until steps are good again.
        good_step, keep = progress.good_step, None if progress.bad_steps else settings.keep
        progress.good_step = good_step if progress.bad_steps else result.step
        state = unshard({name: part.state_dict() for name, part in self.stateful.items()}, keep=self.is_main)
        try:
            if self.is_main:
                self.write(state, keep)
        except (OSError, InputError) as error:
            progress.good_step = good_step
            return f"step {result.step} could not be saved ({error}); {last_checkpoint(good_step)}"
        return ""

    def write(self, state: dict[str, Any], keep: int | None) -> None:
        """Writes metrics, weights and a checkpoint of whole tensors.

        Args:
            state: state dicts of everything that must be restored to resume.
            keep: number of checkpoints to keep; None keeps all.

        Raises:
            InputError: a file cannot be written.
        """
        config_file = self.run_dir / CONFIG_FILE
        if not config_file.is_file():
            warn(f"{config_file} is gone, and is written again")
            save_json(config_file, self.config)
        with warn_on_failure(str(self.metrics.path)):
            self.metrics.sync()
        write_weights(self.run_dir, state["ema"])
        save_checkpoint(self.run_dir, self.config, self.done, state, keep)

    def find_ending(self, result: StepResult, failure: str) -> Exception | None:
        """Returns the exception that ends the run after a step, or None if it continues or is done.

        Args:
            result: of the step.
            failure: what failed in saving it, or "".
        """
        settings, bad_steps = self.config.train, self.progress.bad_steps
        if bad_steps >= settings.max_bad_steps or (self.is_end and bad_steps):
            why = f"{bad_steps} steps in a row had a loss or gradient that is not finite"
            return TrainingError(f"{why}, the last step {result.step}; {last_checkpoint(self.progress.good_step)}")
        if self.is_end:
            return TrainingError(failure) if failure else None
        if result.signum:
            at = f"at step {result.step} of {settings.num_steps} in {self.run_dir}"
            return Interrupted(result.signum, f"{at}, {failure or 'saved'}")
        if failure:
            warn(f"{failure}, training continues and tries again")
        return None

    def end(self, ending: Exception | None) -> None:
        """Waits for all processes, closes the trackers, and reports how the run ended.

        Args:
            ending: the exception that ended the run early, to raise; None if it is done.
        """
        self.accelerator.wait_for_everyone()  # a launcher kills the others once one exits, and rank 0 may be writing
        with warn_on_failure(f"to {self.config.train.tracker}", (Exception,)):
            self.accelerator.end_training()
        if ending is not None:
            raise ending
        sample = f"{command_line('sample')} --checkpoint {self.run_dir}"
        skipped = describe_skipped(self.run_dir)
        self.accelerator.print(f"{self.config.train.num_steps} steps done; sample with: {sample}{skipped}")
