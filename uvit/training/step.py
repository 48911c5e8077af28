"""One training step, from batches to gradients, loss and gradient norm over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from einops import rearrange
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from uvit.common.errors import TrainingError, one_line
from uvit.common.messages import warn_on_failure
from uvit.config import Config, Derivative
from uvit.data.batch import Batch
from uvit.data.images import random_flip, to_unit_range
from uvit.data.skipped import SKIPPED_FILE, report_skipped
from uvit.diffusion.average import DIFFERENCE_STEPS, average_loss, sample_guidance
from uvit.diffusion.objective import diffusion_loss
from uvit.networks.encoders import EMPTY_CAPTION, Encoders, sample_latents
from uvit.networks.runtime import resolve_precision, tf32
from uvit.training.alignment import aligned
from uvit.training.sparse import at_step, sparse_inputs

Loss = Callable[[Callable[..., torch.Tensor], Config, Encoders, Batch, torch.Generator], torch.Tensor]
"""loss(network, config, encoders, batch, generator), as `training_loss`."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same in all processes."""

    step: int
    """Steps done, including this one."""
    loss: float
    grad_norm: float
    lr: float
    is_sound: bool
    """Whether the update was made."""
    is_overflow: bool
    """Whether it was skipped because fp16 overflowed, which is not a fault of the run."""
    signum: int
    """A signal that any process received, or 0."""


def step_seed(*numbers: int) -> int:
    """Hashes numbers such as (seed, step, process) to one seed, so that each step has its own random numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def batches_on_device(device: torch.device, loader: Iterable[Batch], run_dir: Path) -> Iterator[Batch]:
    """Yields a loader's batches on the device, and reports images that were skipped.

    Raises:
        TrainingError: a worker died, for example because memory ran out.
        InputError: a batch cannot be read.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(f"{one_line(error)}: run the same command again") from None
        with warn_on_failure(str(run_dir / SKIPPED_FILE)):
            report_skipped(run_dir, batch.skipped)
        yield batch.to(device)


class Lookahead(Iterator[Batch]):
    """Batches of which the next one can be fetched before it is needed.

    Args:
        batches: to take them from.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches, self._fetched = batches, Future[Batch]()

    def fetch(self) -> None:
        """Takes the next batch, unless that has been done; what fails is raised by `next`, after the step's update."""
        if not self._fetched.done():
            try:
                self._fetched.set_result(next(self._batches))
            except Exception as error:
                self._fetched.set_exception(error)

    def __next__(self) -> Batch:
        self.fetch()
        fetched, self._fetched = self._fetched, Future()
        return fetched.result()


def as_written(
    network: Any, derivative: Derivative = "forward", *, is_compiled: bool = False
) -> Callable[..., torch.Tensor]:
    """Returns a function that calls a network without what a step puts around it: DDP, compilation, perhaps autocast.

    DDP must be called once for each gradient; compiled code has no forward-mode derivatives, and its graphs would
    overwrite one output by the next.

    Args:
        network: what the accelerator returned.
        derivative: what it is called for. `forward` mode mixes dtypes under autocast, and does without it; differences
            do without TF32, whose rounding is as large as what a short time changes.
        is_compiled: whether the network has been compiled.
    """
    inner = extract_model_from_parallel(network)
    is_forward = derivative == "forward"

    def call(x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        wrapped = vars(inner).pop("forward", None) if is_forward else None  # by the accelerator, in autocast
        try:
            with (
                torch.autocast(x.device.type, enabled=False) if is_forward else tf32(False),
                torch.compiler.set_stance("force_eager") if is_compiled else nullcontext(),
            ):
                return inner(x, *arguments, **named)
        finally:
            if wrapped is not None:
                inner.forward = wrapped

    return call


def training_loss(
    network: Callable[..., torch.Tensor],
    config: Config,
    encoders: Encoders,
    batch: Batch,
    generator: torch.Generator,
) -> torch.Tensor:
    """Returns the loss of a batch; flips, latents, dropped conditions, times and noise are drawn on the device.

    Args:
        network: network(x, timesteps, **condition); with an alignment, as `uvit.training.alignment.with_projector`
            returns it.
        config: the run.
        encoders: the run's encoders; its text encoder is used for captions without features.
        batch: on the device.
        generator: source of all random numbers, on the device.
    """
    if config.data.autoencoder is not None:
        images = sample_latents(batch.images, config.data.scale_factor, generator)
    else:
        images = to_unit_range(batch.images)
        if config.data.flip:
            images = random_flip(images, generator)
    # Guidance needs dropped labels to become the null class, and dropped captions the empty one.
    dropped = torch.rand(len(images), device=images.device, generator=generator) < config.train.label_dropout
    condition, uncond = {}, {}
    if config.model.num_classes:
        condition["y"] = torch.where(dropped, config.model.num_classes, batch.labels)
        uncond["y"] = torch.full_like(batch.labels, config.model.num_classes)
    if encoders.text is not None:
        if batch.context is not None and batch.empty_context is not None:
            context, empty = batch.context.float(), batch.empty_context.float()
        else:
            context, empty = encoders.text([texts[0] for texts in batch.captions]), encoders.text([EMPTY_CAPTION])
        condition["context"] = torch.where(rearrange(dropped, "B -> B 1 1"), empty, context)
        uncond["context"] = empty.expand_as(context)
    sparse = sparse_inputs(config, len(images), images.device, generator)
    condition, uncond = {**condition, **sparse}, {**uncond, **sparse}
    with aligned(network, config, encoders, images, sparse.get("kept")) as add_alignment:
        if config.process.objective == "instant":
            return add_alignment(diffusion_loss(partial(network, **condition), images, config.process, generator))
        guidance = None
        if config.model.takes_guidance:
            guidance = sample_guidance(config.process, len(images), images.device, generator)
            guidance[:, 0] = torch.where(dropped, 1.0, guidance[:, 0])
        bare = as_written(network, config.process.derivative, is_compiled=config.train.compile != "no")
        precision = resolve_precision(config.train.mixed_precision, images.device.type, config.model.width)
        loss_of = partial(average_loss, bare=bare, difference_step=DIFFERENCE_STEPS[precision], guidance=guidance)
        return add_alignment(loss_of(network, images, config.process, generator, cond=condition, uncond=uncond))


def compute_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    config: Config,
    encoders: Encoders,
    batches: Iterator[Batch],
    generator: torch.Generator,
    step: int,
    loss_of: Loss = training_loss,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of one global batch, accumulated over parts that fit in memory.

    Args:
        accelerator: of the process.
        model: as prepared by the accelerator.
        config: the run.
        encoders: the run's encoders.
        batches: this process's share of each part, on the device.
        generator: on the device; seeded here for each part.
        step: optimizer steps done.
        loss_of: the loss of a part of the batch, such as `training_loss`.

    Returns:
        The loss of this process's share, and the norm of the gradients before clipping, both on the device.
    """
    config, num_parts = at_step(config, step), config.train.accumulation_steps
    total_loss = torch.zeros((), device=accelerator.device)
    for part in range(num_parts):
        generator.manual_seed(step_seed(config.train.seed, step, part, accelerator.process_index))
        with nullcontext() if part == num_parts - 1 else accelerator.no_sync(model):
            loss = loss_of(model, config, encoders, next(batches), generator)
            accelerator.backward(loss / num_parts)
        total_loss += loss.detach() / num_parts
    if config.optim.grad_clip:
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
    else:
        accelerator.unscale_gradients()
        grad_norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return total_loss, grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm


def mean_over_processes(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor, signum: int
) -> tuple[float, float, int]:
    """Returns loss and gradient norm as means over all processes, and a signal that any of them received, or 0.

    Only here does the host wait for the device in a step (besides in fp16's gradient scaler): whether loss and norm are
    finite must be known before the update, and all processes must skip it, or stop, at the same step.
    """
    values = torch.stack([loss, grad_norm.to(loss), torch.full_like(loss, signum)])
    losses, norms, signals = zip(*accelerator.gather(values).view(-1, len(values)).tolist())
    return sum(losses) / len(losses), sum(norms) / len(norms), int(max(signals))
