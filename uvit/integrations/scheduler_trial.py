"""Whether a scheduler of diffusers draws right images, by drawing some whose distribution is known.

Its options are too many, and the ways in which some of them go wrong, to be told by name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uvit.common.errors import InputError, one_line
from uvit.common.libraries import quiet
from uvit.config import ProcessConfig, SampleConfig
from uvit.diffusion.process import combine, schedule_of
from uvit.diffusion.samplers import denoiser, sampling_times
from uvit.diffusion.solvers import SOLVERS
from uvit.integrations.scheduler_steps import TABLE_STEPS, Scheduler, is_flow, run_scheduler, set_times, shift_of

CLIPPING = ("clip_sample", "thresholding")
"""Options that keep estimates of the images inside [-1, 1]."""
TRIAL_MEAN, TRIAL_STD, TRIAL_SHAPE = 0.3, 0.5, (1, 1, 64, 64)
"""Normal data on which schedulers are tried, without clipping: a network that knows it predicts exactly."""
TRIAL_STEPS = 111
"""Steps in which a scheduler must come near to that data, besides those that are asked for: about a divisor of 1000 and
of 999, and enough to tell one that does not converge, as those for distilled networks."""
TRIAL_SLACK = 1.25, 0.06
"""How much spread its images may lack: a multiple of what those of `ddim` lack in as many steps, and a share more."""
TRIAL_EXCESS = 0.1
"""How much larger their spread may be, and how far off their mean, as shares of the data's spread."""
NOISE_LEFT = 0.005
"""Largest standard deviation of what is left of the noise, besides that of the first entry of a table."""


def check_by_trial(scheduler: Scheduler, process: ProcessConfig, num_steps: int) -> None:
    """Checks that a scheduler draws right images in a number of steps, or in all of its table if that has fewer.

    Raises:
        InputError: other images, or none.
    """
    most = min(num_steps, len(getattr(scheduler, "betas", range(num_steps))))
    trial: Any = _trial  # whose cache mypy takes for one of hashable values alone
    with torch.device("cpu"):  # whatever the default one
        fault = trial(type(scheduler), scheduler.to_json_string(), process, most)
    if fault:
        draws = f"{type(scheduler).__name__} does not draw right images in {most} steps"
        raise InputError(f"{draws}, {fault}: make_scheduler gives schedulers that do")


@functools.lru_cache(maxsize=64)
def _trial(cls: Any, config: str, process: ProcessConfig, num_steps: int) -> str:
    """Returns what is wrong with the images of a scheduler, or "" if they are as right as those of `ddim`."""
    schedule, own = schedule_of(process), inspect.signature(cls.__init__).parameters
    # A config may keep options of another class.
    options = {name: value for name, value in json.loads(config).items() if name in own and name not in CLIPPING}
    options |= {name: False for name in CLIPPING if name in own}
    drawn = {}
    for std in (TRIAL_STD, 0.0):
        try:
            with quiet("diffusers"):
                scheduler, generator = cls(**options), torch.Generator().manual_seed(0)
                noise = torch.randn(TRIAL_SHAPE, generator=generator, dtype=torch.float32)
                output = _trial_network(process, std)
                drawn[std] = run_scheduler(
                    scheduler, set_times(scheduler, process, num_steps), output, noise, generator
                )
        except Exception as error:  # options that do not go together fail in many ways
            return f"but ends with {type(error).__name__}: {one_line(error, 100)}"
    shifted = dataclasses.replace(process, time_shift=shift_of(scheduler) if is_flow(scheduler) else 1.0)
    times = sampling_times(shifted, SampleConfig(num_steps=num_steps, sampler="ddim"))
    denoise = denoiser(_trial_network(process, TRIAL_STD), schedule, process.prediction)
    reference = SOLVERS["ddim"](denoise, noise, schedule, times)
    factor, more = TRIAL_SLACK
    least = 1 - factor * (1 - reference.std().item() / TRIAL_STD) - more
    mean, std, left = drawn[TRIAL_STD].mean().item(), drawn[TRIAL_STD].std().item(), drawn[0.0].std().item()
    is_near = abs(mean - TRIAL_MEAN) <= TRIAL_EXCESS * TRIAL_STD and least <= std / TRIAL_STD <= 1 + TRIAL_EXCESS
    if not is_near:
        expected = f"mean {TRIAL_MEAN} and standard deviation {TRIAL_STD}"
        return f"of data with {expected} got {mean:.2g} and {std:.2g}"
    of_table = 0.0 if is_flow(scheduler) else schedule.at(1 / TABLE_STEPS)[1]
    return "" if left <= NOISE_LEFT + of_table else f"noise of standard deviation {left:.2g} is left in them"


def _trial_network(process: ProcessConfig, std: float) -> Callable[[Tensor, float], Tensor]:
    """Returns output(x, t), the exact prediction for normal data of TRIAL_MEAN and a standard deviation."""
    schedule = schedule_of(process)

    def output(x: Tensor, t: float) -> Tensor:
        alpha, sigma = schedule.at(min(max(t, 0.0), 1.0))
        away = (x.double() - alpha * TRIAL_MEAN) / max(alpha**2 * std**2 + sigma**2, 1e-12)
        return combine(process.prediction, TRIAL_MEAN + alpha * std**2 * away, sigma * away, alpha, sigma).float()

    return output
