"""The diffusion process: schedules, what a network predicts, and training times.

Time t is in [0, 1]: 0 is data, 1 is noise. x_t = α(t) x_0 + σ(t) ε.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import TypeVar

import torch
from torch import Tensor

from uvit.config import Kind, ProcessConfig, ScheduleName

# Where a formula divides by an α or σ that is about 0 at an end of [0, 1], times keep this distance from that end.
TIME_MARGIN = 1e-3

Number = TypeVar("Number", float, Tensor)


class Schedule:
    """Amplitudes of signal and noise over time, and the network's unit of time."""

    first_time = 0.0
    """Smallest time above 0 that the network is trained at."""

    @functools.cached_property
    def singular_start(self) -> bool:
        """Whether α(1) is 0, or so small that a network's error in the noise, divided by it, would drown the image."""
        return self.at(1.0)[0] < 1e-3

    time_scale = 1000.0
    """The network's time, as a multiple of t."""

    def network_time(self, t: Number) -> Number:
        """Returns the time that the network is given for t."""
        return self.time_scale * t

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (α(t), σ(t)), of the shape and dtype of t."""
        raise NotImplementedError

    def time_at(self, log_snr: Tensor) -> Tensor:
        """Returns the time t at which λ = log(α / σ) has the given value."""
        raise NotImplementedError

    def snap(self, t: Tensor) -> Tensor:
        """Rounds times up to those of a discrete process; a continuous one returns t."""
        return t

    def log_snr(self, t: Tensor) -> Tensor:
        """Returns λ(t) = log(α / σ); infinite where one of them vanishes."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha.log() - sigma.log()

    def at(self, t: float) -> tuple[float, float]:
        """Returns (α(t), σ(t)) of one time in double precision, as Python floats: no tensor, no device."""
        alpha, sigma = self.alpha_sigma(torch.tensor(t, dtype=torch.float64))
        return alpha.item(), sigma.item()

    def derivative_at(self, t: float) -> tuple[float, float]:
        """Returns (dα/dt, dσ/dt) of one time, as Python floats."""
        with torch.inference_mode(False), torch.enable_grad():
            point = torch.tensor(t, dtype=torch.float64, requires_grad=True)
            slopes = [
                torch.autograd.grad(value, point, retain_graph=True)[0].item() for value in self.alpha_sigma(point)
            ]
        return slopes[0], slopes[1]


class VP(Schedule):
    """Continuous variance-preserving schedule, β(t) = 0.1 + 19.9 t (Song et al., arXiv 2011.13456, equation 33)."""

    beta_min, beta_max = 0.1, 20.0
    time_scale = 999.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time_at(self, log_snr: Tensor) -> Tensor:
        # -log α = softplus(-2 λ) / 2 is quadratic in t; this form of its root has no cancellation for small t.
        twice = torch.nn.functional.softplus(-2 * log_snr)
        slope = self.beta_max - self.beta_min
        return 2 * twice / (self.beta_min + (self.beta_min**2 + 2 * slope * twice).sqrt())


NUM_STEPS = 1000
"""Steps of the discrete schedules."""


class Discrete(Schedule):
    """Discrete steps n = t NUM_STEPS with their own β, and log α linear between them; n = 0 is clean data.

    Args:
        betas: (NUM_STEPS,) β of steps 1, 2 …, in float64.
        first_network_time: the network's time of step 1.
    """

    first_time = 1 / NUM_STEPS

    def __init__(self, betas: Tensor, first_network_time: float = 1.0) -> None:
        self.betas, self.first_network_time = betas, first_network_time
        log_alphas = torch.cat([betas.new_zeros(1), 0.5 * torch.log1p(-betas).cumsum(0)])
        # Cast before the move: not every device has float64.
        self._log_alphas = functools.cache(lambda device, dtype: log_alphas.to(dtype).to(device))

    def network_time(self, t: Number) -> Number:
        return NUM_STEPS * t - (1.0 - self.first_network_time)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._log_alphas(t.device, t.dtype)
        position = t * NUM_STEPS
        left = position.floor().long().clamp(0, NUM_STEPS - 1)
        log_alpha = table[left] + (position - left) * (table[left + 1] - table[left])
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time_at(self, log_snr: Tensor) -> Tensor:
        # t is linear in λ between two steps, as in the published sampler; n = 0 is excluded, where λ is infinite.
        log_alpha = self._log_alphas(log_snr.device, log_snr.dtype)[1:]
        table = (log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))).flip(0)  # (NUM_STEPS,), increasing
        right = torch.searchsorted(table, log_snr.contiguous()).clamp(1, NUM_STEPS - 1)
        share = (log_snr - table[right - 1]) / (table[right] - table[right - 1])
        return (NUM_STEPS - (right - 1 + share)) / NUM_STEPS

    def snap(self, t: Tensor) -> Tensor:
        return (t * NUM_STEPS).ceil().clamp(1, NUM_STEPS) / NUM_STEPS


def ldm_betas() -> Tensor:
    """Returns the βs of latent diffusion, √β from 0.00085^½ to 0.012^½ (arXiv 2112.10752): (1000,)."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, NUM_STEPS, dtype=torch.float64) ** 2


def linear_betas() -> Tensor:
    """Returns the βs of DDPM, from 1e-4 to 0.02 (arXiv 2006.11239, section 4): (1000,)."""
    return torch.linspace(1e-4, 0.02, NUM_STEPS, dtype=torch.float64)


def cosine_betas() -> Tensor:
    """Returns the βs of improved DDPM, at most 0.999 (arXiv 2102.09672, equation 17): (1000,)."""
    t = torch.arange(NUM_STEPS + 1, dtype=torch.float64) / NUM_STEPS
    alphas_cumprod = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


class Cosine(Schedule):
    """α = cos(π t / 2), σ = sin(π t / 2) (Salimans & Ho, arXiv 2202.00512)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # sin(π (1 - t) / 2) equals cos(π t / 2), and is exactly 0 at t = 1
        return torch.sin(0.5 * math.pi * (1 - t)), torch.sin(0.5 * math.pi * t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr)) * (2 / math.pi)


class Flow(Schedule):
    """Rectified flow: α = 1 - t, σ = t (Liu et al., arXiv 2209.03003)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr)


SCHEDULES: dict[ScheduleName, Schedule] = {
    "vp": VP(),
    "ldm": Discrete(ldm_betas()),
    "ddpm": Discrete(linear_betas(), first_network_time=0.0),
    "iddpm": Discrete(cosine_betas(), first_network_time=0.0),
    "cosine": Cosine(),
    "flow": Flow(),
}


@functools.cache
def _scaled(name: ScheduleName, time_scale: float) -> Schedule:
    schedule = copy.copy(SCHEDULES[name])
    schedule.time_scale = time_scale
    return schedule


def schedule_of(process: ProcessConfig) -> Schedule:
    """Returns the schedule of a process, with its unit of the network's time."""
    unit = process.unit_of_time
    return SCHEDULES[process.schedule] if unit is None else _scaled(process.schedule, unit)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Returns s t / (1 + (s - 1) t) (Esser et al., arXiv 2403.03206, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def combine(kind: Kind, x0: Tensor, eps: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """Returns a x_0 + b ε, the prediction of this kind."""
    a, b = prediction_coefficients(kind, alpha, sigma)
    return a * x0 + b * eps


def prediction_coefficients(kind: Kind, alpha: Number, sigma: Number) -> tuple[Number | float, Number | float]:
    """Returns (a, b) of the prediction a x_0 + b ε: noise (0, 1), data (1, 0), v (-σ, α), flow (-1, 1)."""
    match kind:
        case "noise":
            return 0.0, 1.0
        case "data":
            return 1.0, 0.0
        case "v":
            return -sigma, alpha
        case "flow":
            return -1.0, 1.0
    raise ValueError(f"unknown prediction {kind!r}")


def determinant(kind: Kind, alpha: Number, sigma: Number) -> Number:
    """Returns α b - σ a of the prediction a x_0 + b ε, which (x_0, ε) are divided by where they are found from it."""
    a, b = prediction_coefficients(kind, alpha, sigma)
    return alpha * b - sigma * a


def separate(kind: Kind, output: Tensor, x_t: Tensor, alpha: Number, sigma: Number) -> tuple[Tensor, Tensor]:
    """Solves x_t = α x_0 + σ ε and output = a x_0 + b ε for (x_0, ε).

    Args:
        kind: what `output` is.
        output: the network's output, (B, C, H, W).
        x_t: the noisy images it was computed from, (B, C, H, W).
        alpha: α, a number or a broadcastable tensor; not 0 for `noise`.
        sigma: σ, likewise; not 0 for `data`.

    Returns:
        (x_0, ε), (B, C, H, W) each.
    """
    a, b = prediction_coefficients(kind, alpha, sigma)
    divisor = determinant(kind, alpha, sigma)
    return (b * x_t - sigma * output) / divisor, (alpha * output - a * x_t) / divisor


def sample_times(
    process: ProcessConfig, batch: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draws (batch,) training times in [0, 1] on the device."""
    if process.time_distribution == "uniform":
        t = torch.rand(batch, device=device, generator=generator)
    else:
        normal = torch.randn(batch, device=device, generator=generator)
        t = torch.sigmoid(process.logit_mean + process.logit_std * normal)
    return SCHEDULES[process.schedule].snap(shift_time(t, process.time_shift))
