"""Sampling: grids of times, guidance, and the whole way from noise to images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import Kind, ProcessConfig, SampleConfig, SolverName, Spacing, check_solver
from uvit.diffusion.average import average_velocity
from uvit.diffusion.process import TIME_MARGIN, Schedule, schedule_of, separate, shift_time
from uvit.diffusion.solvers import ALL_SOLVERS, Denoise, Noise, check_times, fast_orders

Predict = Callable[..., Tensor]
"""predict(x, timesteps, **condition) -> the prediction; channels after those of x are a network's own."""


def time_grid(
    schedule: Schedule,
    num_steps: int,
    spacing: Spacing = "uniform",
    t_start: float = 1.0,
    t_end: float = 0.0,
    shift: float = 1.0,
) -> list[float]:
    """Returns the num_steps + 1 decreasing times of a solver.

    Args:
        schedule: needed for `log_snr`.
        num_steps: steps between the times.
        spacing: uniform in t (`uniform`) or in log-SNR (`log_snr`). Where α or σ is about 0 at an end, the grid keeps
            TIME_MARGIN away from it, and its last step goes to t_end.
        t_start: first time, at most 1.
        t_end: last time, at least 0 and below t_start.
        shift: s in t -> s t / (1 + (s - 1) t), for `uniform`.

    Raises:
        InputError: fewer than one step, an unknown spacing, or times that do not decrease within [0, 1].
    """
    if num_steps < 1:
        raise InputError(f"steps must be at least 1, got {num_steps}")
    if not 1 >= t_start > t_end >= 0:
        raise InputError(f"times must satisfy 1 >= t_start > t_end >= 0, got {t_start} and {t_end}")
    if spacing not in get_args(Spacing):
        raise InputError(f"spacing must be one of {get_args(Spacing)}, got {spacing!r}")
    if shift <= 0:
        raise InputError(f"shift must be above 0, got {shift}")
    if spacing == "uniform":
        # Ends are chosen so that the shifted ones are t_start and t_end, which are then set exactly.
        first, last = (shift_time(torch.tensor(t, dtype=torch.float64), 1 / shift).item() for t in (t_start, t_end))
        t = shift_time(torch.linspace(first, last, num_steps + 1, dtype=torch.float64), shift)
        return [t_start, *t[1:-1].tolist(), t_end]
    to_zero = schedule.at(t_end)[1] == 0
    first = min(t_start, 1 - TIME_MARGIN) if schedule.singular_start else t_start
    last = TIME_MARGIN if to_zero else t_end
    low, high = schedule.log_snr(torch.tensor([first, last], dtype=torch.float64)).tolist()
    log_snr = torch.linspace(low, high, num_steps + (0 if to_zero else 1), dtype=torch.float64)
    t = schedule.time_at(log_snr)
    t[0] = first
    times = t.tolist() + ([t_end] if to_zero else [])
    check_times(times)
    return times


def guide(
    network: Predict,
    schedule: Schedule,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    weak: Predict | None = None,
) -> Callable[..., Tensor]:
    """Binds a network to its condition, with guidance w · cond + (1 - w) · uncond on all channels (arXiv 2207.12598).

    With a weak network, it is bad + w (good - bad) of two networks (autoguidance, arXiv 2406.02507), on the channels of
    the images.

    Args:
        network: network(x, timesteps, **cond).
        schedule: defines the network's time.
        cond: keyword arguments of the network, batches of B.
        uncond: the same for the empty condition; required unless scale is 1.
        scale: w; 1 is no guidance, and uncond is never computed.
        interval: (low, high) times of guidance (arXiv 2404.07724); outside, uncond is not computed.
        weak: predicts what guidance leads away from, called as weak(x, timesteps, **uncond); None is the network.

    Returns:
        output(x, t) -> the guided prediction, or output(x, t, s) -> that for the interval [s, t], of a network that
        takes one; without a weak network, cond and uncond run as one batch of 2B.

    Raises:
        InputError: a scale other than 1 without uncond, or with a guidance among cond.
    """
    if scale != 1 and "guidance" in cond:
        raise InputError(f"guidance is either among the conditions or by two passes, got both, the latter {scale}")
    if scale != 1 and uncond is None:
        raise InputError(f"guidance {scale} needs a model with a null class, got one without")

    def output(x: Tensor, t: float, s: float | None = None) -> Tensor:
        guided = scale != 1 and interval[0] <= t <= interval[1]
        batch = x.shape[0] * (2 if guided and weak is None else 1)  # an exporter would take len(x) for a constant
        times = {} if s is None else {"interval": torch.full((batch,), schedule.time_scale * (t - s), device=x.device)}
        timesteps = torch.full((batch,), schedule.network_time(t), device=x.device)
        if not guided or uncond is None:
            return network(x, timesteps, **times, **cond)
        if weak is None:
            both = {name: torch.cat([value, uncond[name]]) for name, value in cond.items()}
            good, bad = network(torch.cat([x, x]), timesteps, **times, **both).chunk(2)
        else:
            good = network(x, timesteps, **times, **cond)[:, : x.shape[1]]
            bad = weak(x, timesteps, **times, **uncond)[:, : x.shape[1]]
        return bad + scale * (good - bad)

    return output


def denoiser(output: Callable[[Tensor, float], Tensor], schedule: Schedule, prediction: Kind) -> Denoise:
    """Turns a network's prediction into denoise(x, t) -> (x_0, ε), in float32."""

    def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        predicted = output(x, t)[:, : x.shape[1]]  # a network may add channels of its own, such as ADM's variance
        return separate(prediction, predicted.float(), x, *schedule.at(t))

    return denoise


def average_denoiser(output: Callable[..., Tensor], prediction: Kind) -> Denoise:
    """Turns a network's average velocity, or the image that gives it, into denoise(x, t, s) -> (x_0, ε), in float32.

    They are the ends of the straight way from x_t to x_s, so that x_s = (1 - s) x_0 + s ε; without s, of an instant.
    """

    def denoise(x: Tensor, t: float, s: float | None = None) -> tuple[Tensor, Tensor]:
        predicted = output(x, t, t if s is None else s)[:, : x.shape[1]]
        u = average_velocity(prediction, predicted.float(), x, t)
        return x - t * u, x + (1 - t) * u

    return denoise


class ImageNoise:
    """Standard normal noise, from one generator per image: the same for any batch size and on any device.

    Args:
        keys: for each image, the numbers that seed its generator.
        shape: (C, H, W).
        device: where the noise goes.
    """

    def __init__(self, keys: Sequence[Sequence[int]], shape: tuple[int, ...], device: torch.device) -> None:
        self.generators = [np.random.default_rng(key) for key in keys]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        """Returns the next (B, C, H, W) of noise."""
        noise = np.stack([generator.standard_normal(self.shape, dtype=np.float32) for generator in self.generators])
        tensor = torch.from_numpy(noise)
        if self.device.type == "cuda":  # from pinned memory, the copy does not wait for work queued on the device
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def sampling_times(process: ProcessConfig, config: SampleConfig) -> list[float]:
    """Returns the time grid for a process and sampling settings, away from ends where a formula is singular.

    Raises:
        InputError: as time_grid; a solver that needs another prediction, or is unstable on the grid; a grid finer than
            a discrete schedule.
    """
    check_solver(process, config.sampler)
    times = _sampling_times(process, config)
    smallest, first = min(t for t in times if t > 0), schedule_of(process).first_time
    if smallest < first * (1 - 1e-6):
        begins = f"schedule {process.schedule!r} begins at time {first:g}"
        raise InputError(f"{begins}, got a grid with {smallest:g}: take fewer steps, or another t_end")
    return times


FAST_SOLVERS: tuple[SolverName, ...] = ("dpm_solver_fast", "dpmpp_fast")


def _is_stiff(process: ProcessConfig, sampler: SolverName) -> bool:
    """Returns whether a solver needs a log-SNR grid: where α(1) ≈ 0, the SDE's drift and steps in ε divide by α."""
    return schedule_of(process).singular_start and sampler in (*FAST_SOLVERS, "euler_maruyama")


def resolve_spacing(process: ProcessConfig, config: SampleConfig) -> Spacing:
    """Returns the spacing of times, with `auto` resolved to the solver's default.

    Raises:
        InputError: a solver that is unstable with this spacing.
    """
    if config.sampler == "average" and config.spacing == "log_snr":
        raise InputError("average needs spacing 'uniform', got 'log_snr', whose last step is of almost nothing")
    stiff = _is_stiff(process, config.sampler)
    if stiff and config.spacing == "uniform":
        raise InputError(f"{config.sampler} on schedule {process.schedule!r} needs spacing 'log_snr', got 'uniform'")
    if config.spacing != "auto":
        return config.spacing
    return "log_snr" if stiff or config.sampler == "dpm_solver_fast" else "uniform"


def _sampling_times(process: ProcessConfig, config: SampleConfig) -> list[float]:
    schedule, sampler, shift = schedule_of(process), config.sampler, process.time_shift
    spacing = resolve_spacing(process, config)
    divides_by_alpha = schedule.singular_start and (_is_stiff(process, sampler) or process.prediction == "noise")
    t_start = 1 - TIME_MARGIN if divides_by_alpha else 1.0

    if sampler in FAST_SOLVERS:
        t_end = config.t_end or TIME_MARGIN
        if sampler == "dpmpp_fast":  # each step uses the next times of the grid as its inner times
            return time_grid(schedule, config.num_steps, spacing, t_start, t_end, shift)
        # The grid has one time per step; the inner times of a step are uniform in log-SNR.
        orders = fast_orders(config.num_steps)
        outer = time_grid(schedule, len(orders), spacing, t_start, t_end, shift)
        parts = [time_grid(schedule, k, "log_snr", t, s) for k, t, s in zip(orders, outer, outer[1:])]
        return outer[:1] + [t for part in parts for t in part[1:]]
    steep = sampler == "euler_maruyama" or (sampler == "euler" and not math.isfinite(schedule.derivative_at(0.0)[1]))
    if steep and spacing == "uniform" and not config.t_end and config.num_steps > 1:
        # σ'(0) is infinite there, or noise is left: the last slope is taken at TIME_MARGIN, as in the paper's runs.
        return [*time_grid(schedule, config.num_steps - 1, spacing, t_start, TIME_MARGIN, shift), 0.0]
    return time_grid(schedule, config.num_steps, spacing, t_start, config.t_end, shift)


def guided_denoiser(
    network: Predict,
    process: ProcessConfig,
    config: SampleConfig,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None,
    weak: Predict | None = None,
) -> Denoise:
    """Returns the denoise of a solver; a guidance among `cond` stands instead of two passes."""
    scale = 1.0 if "guidance" in cond and weak is None else config.guidance
    output = guide(network, schedule_of(process), cond, uncond, scale, config.guidance_interval, weak)
    if process.objective == "average":
        return average_denoiser(output, process.prediction)
    return denoiser(output, schedule_of(process), process.prediction)


@torch.no_grad()
def sample(
    network: Predict,
    process: ProcessConfig,
    config: SampleConfig,
    noise: Noise,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None = None,
    on_evaluation: Callable[[Tensor], object] | None = None,
    weak: Predict | None = None,
) -> Tensor:
    """Draws images.

    Args:
        network: network(x, timesteps, **cond), in eval mode.
        process: what the network was trained on.
        config: solver, steps, spacing and guidance.
        noise: source of (B, C, H, W) standard normal noise.
        cond: the network's condition, batches of B, such as {"y": labels}; {} for none.
        uncond: the same for the empty condition; required for guidance.
        on_evaluation: called after each evaluation of the network with its x_t, (B, C, H, W): for a progress bar, or to
            watch the denoising.
        weak: as for `guide`.

    Returns:
        (B, C, H, W) in float32, images in about [-1, 1].

    Raises:
        InputError: guidance without uncond, or as sampling_times.
    """
    denoise = guided_denoiser(network, process, config, cond, uncond, weak)

    def observed_denoise(x: Tensor, *ends: float) -> tuple[Tensor, Tensor]:
        estimates = denoise(x, *ends)
        if on_evaluation is not None:
            on_evaluation(x)
        return estimates

    times = sampling_times(process, config)
    return ALL_SOLVERS[config.sampler](observed_denoise, noise(), schedule_of(process), times, noise)


def num_evaluations(process: ProcessConfig, config: SampleConfig) -> int:
    """Returns how many times a solver calls the denoiser.

    Raises:
        InputError: as sampling_times.
    """
    *_, last = times = sampling_times(process, config)
    num_steps = len(times) - 1
    return 2 * num_steps - (last == 0) if config.sampler == "heun" else num_steps
