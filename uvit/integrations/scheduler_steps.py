"""How diffusers' schedulers step from noise to images: the times at which they need predictions, and the loop."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import ProcessConfig, SampleConfig, SolverName
from uvit.diffusion.average import average_velocity
from uvit.diffusion.process import shift_time
from uvit.diffusion.samplers import sampling_times

TABLE_STEPS = 1000
"""diffusers' tables of a process hold time t at index 1000 t - 1."""
Scheduler = Any
"""diffusers' schedulers have no base class that declares their methods."""
FLOW_SCHEDULERS: dict[SolverName, Scheduler] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
OWN_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "shift_terminal")
"""Options of a scheduler for grids that are not uniform in time."""


def option_of(scheduler: Scheduler, name: str) -> Any:
    """Returns an option of a scheduler's own class; None for those that `from_config` kept from another class."""
    return scheduler.config.get(name) if name in inspect.signature(type(scheduler).__init__).parameters else None


def is_flow(scheduler: Scheduler) -> bool:
    """Returns whether a scheduler's sigmas are times of rectified flow."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(option_of(scheduler, "use_flow_sigmas"))


def shift_of(scheduler: Scheduler) -> float:
    """Returns the shift of a scheduler's times towards noise; 1 is none."""
    return option_of(scheduler, "flow_shift") or option_of(scheduler, "shift") or 1.0


def set_times(
    scheduler: Scheduler, process: ProcessConfig, num_steps: int, device: torch.device | None = None
) -> list[float]:
    """Prepares a scheduler for sampling from noise, and returns the times in [0, 1] at which it needs predictions.

    The network's times are Schedule.network_time of these; diffusers' `timesteps` are off by up to one. On `flow`, the
    grid is that of sample.py for the same solver; with tables, the scheduler's own, in multiples of 1/1000.

    Args:
        scheduler: one that fits the process.
        process: what the network was trained on.
        num_steps: number of steps.
        device: of the images.

    Returns:
        A time for each of `scheduler.timesteps`.

    Raises:
        InputError: more steps than a table has entries.
    """
    if not is_flow(scheduler):
        if num_steps > (entries := len(scheduler.alphas_cumprod)):
            raise InputError(f"num_inference_steps must be at most {entries}, the entries of a table, got {num_steps}")
        scheduler.set_timesteps(num_steps, device=device)
        if scheduler.timesteps[-1] < 0 and scheduler.order == 1:  # their np.arange may give one timestep too many
            scheduler.timesteps = scheduler.timesteps[:-1]
            if hasattr(scheduler, "sigmas"):
                scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])
        times = ((scheduler.timesteps.double() + 1) / TABLE_STEPS).tolist()
    else:
        samplers = [name for name, cls in FLOW_SCHEDULERS.items() if isinstance(scheduler, cls)]
        shift = shift_of(scheduler)
        grid = sampling_times(
            dataclasses.replace(process, time_shift=shift),
            SampleConfig(num_steps=num_steps, sampler=samplers[0] if samplers else "ddim"),
        )
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            before_shift = shift_time(torch.tensor(grid[:-1], dtype=torch.float64), 1 / shift)
            scheduler.set_timesteps(sigmas=before_shift.numpy(), num_inference_steps=num_steps, device=device)
        else:
            scheduler.set_timesteps(num_steps, device=device)
            if samplers and not any(option_of(scheduler, option) for option in OWN_GRIDS):
                # Its own grid starts at 0.999, or ends with a step of 0.001, and set_timesteps accepts no other.
                sigmas = torch.tensor(grid)
                inner = sigmas[1:-1].repeat_interleave(scheduler.order)  # Heun's method evaluates twice there
                scheduler.sigmas = torch.cat([sigmas[:1], inner, sigmas[-1:]])
                scheduler.timesteps = (scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps).to(device)
        times = scheduler.sigmas[: len(scheduler.timesteps)].tolist()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return times


def as_instant(process: ProcessConfig) -> ProcessConfig:
    """Returns the process that a scheduler sees: of an average velocity, flow matching."""
    if process.objective == "instant":
        return process
    return dataclasses.replace(process, objective="instant", prediction="flow", time_scale=None)


def steps_are_averages(process: ProcessConfig, scheduler: Scheduler) -> bool:
    """Returns whether a scheduler steps as the solver `average` does, with a network of an average velocity."""
    return process.objective == "average" and isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def average_output(
    output: Callable[..., Tensor], process: ProcessConfig, scheduler: Scheduler, times: Sequence[float]
) -> Callable[[Tensor, float], Tensor]:
    """Returns output(x, t) -> the average velocity over the step from t; of an instant, if it is not an Euler step.

    Args:
        output: output(x, t, s) -> the network's prediction.
        process: what the network was trained on.
        scheduler: prepared by set_times.
        times: what that returned.
    """
    ends = dict(zip(times, [*times[1:], 0.0] if steps_are_averages(process, scheduler) else times))
    return lambda x, t: average_velocity(process.prediction, output(x, t, ends[t]), x, t)


def run_scheduler(
    scheduler: Scheduler,
    times: Sequence[float],
    output: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: Callable[[int, Any, Tensor], tuple[Tensor, bool]] | None = None,
) -> Tensor:
    """Draws images.

    Args:
        scheduler: prepared by set_times.
        times: what that returned.
        output: output(x, t) -> the network's prediction.
        noise: (B, C, H, W), standard normal.
        generator: source of further noise.
        on_step: called after each step with its number, its timestep and the images; returns those to go on with, and
            whether to go on.

    Returns:
        (B, C, H, W).
    """
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for step, (timestep, t) in enumerate(zip(scheduler.timesteps, times)):
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(output(scaled, t), timestep, x, **options, return_dict=False)[0]
        if on_step is not None:
            x, goes_on = on_step(step, timestep, x)
            if not goes_on:
                break
    return x
