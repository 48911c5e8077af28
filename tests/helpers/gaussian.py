"""Gaussian data N(MEAN, STD²), where the best denoiser is known in closed form."""

from __future__ import annotations

import math

from torch import Tensor

from uvit.diffusion.process import Schedule
from uvit.diffusion.solvers import Denoise

MEAN, STD = 0.3, 0.5


def spread(schedule: Schedule, t: float) -> float:
    """Returns the standard deviation of x_t."""
    alpha, sigma = schedule.at(t)
    return math.sqrt(alpha**2 * STD**2 + sigma**2)


def gaussian_denoiser(schedule: Schedule) -> Denoise:
    """Returns denoise(x, t) -> (E[x_0 | x_t], E[ε | x_t])."""

    def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.at(t)
        away = (x - alpha * MEAN) / spread(schedule, t) ** 2
        return MEAN + alpha * STD**2 * away, sigma * away

    return denoise
