"""Sampling: time grids, guidance, and solvers as pure functions of one signature.

A solver is `solver(denoise, x, schedule, times, noise)`: it carries x from times[0] to times[-1], asking
`denoise(x, t)` for the estimates (x_0, ε). Times are Python floats, so that no step waits for the device.

The probability-flow ODE is dx = x_0 dα + ε dσ for every schedule (differentiate x = α x_0 + σ ε at fixed x_0, ε), which
needs no derivative of the schedule and has no singular end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from uvit.config import Kind, ProcessConfig, SampleConfig, SolverName, Spacing
from uvit.diffusion import SCHEDULES, TIME_MARGIN, Schedule, separate, shift_time
from uvit.errors import InputError

Network = Callable[..., Tensor]
Denoise = Callable[[Tensor, float], tuple[Tensor, Tensor]]
Noise = Callable[[], Tensor]
Solver = Callable[..., Tensor]


def check_times(times: Sequence[float]) -> None:
    """Checks that times are a solver's: two or more, decreasing, within [0, 1].

    Raises:
        InputError: they are not, with the two that do not fit.
    """
    if len(times) < 2:
        raise InputError(f"a grid must have 2 times or more, got {len(times)}")
    for t, s in zip(times, times[1:]):
        if not 1 >= t > s >= 0:
            raise InputError(f"times must decrease within [0, 1], got {t:g} and then {s:g}")


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
        spacing: `uniform` in t, or uniform in log-SNR; the log-SNR is infinite at the ends of some schedules, so
            there the grid keeps TIME_MARGIN away from them and its last step goes to t_end.
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
        # Unshifted ends, so that the shifted ones are t_start and t_end; set, so that rounding does not move them.
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
    network: Network,
    schedule: Schedule,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, float], Tensor]:
    """Closes a network over its condition: w · cond + (1 - w) · uncond, on every channel (arXiv 2207.12598).

    Args:
        network: network(x, timesteps, **cond).
        schedule: gives the network's time.
        cond: keyword arguments of the network, batches of B.
        uncond: the same for the empty condition; needed where scale is not 1.
        scale: w; 1 is no guidance and never computes uncond.
        interval: (low, high) times between which guidance acts (arXiv 2404.07724); outside, uncond is not computed.

    Returns:
        output(x, t) -> the network's (guided) prediction; cond and uncond run as one batch of 2B.

    Raises:
        InputError: a scale other than 1 without uncond.
    """
    if scale != 1 and uncond is None:
        raise InputError(f"guidance {scale} needs a model with a null class, got one without")

    def output(x: Tensor, t: float) -> Tensor:
        guided = scale != 1 and interval[0] <= t <= interval[1]
        timesteps = torch.full((len(x) * (2 if guided else 1),), schedule.network_scale * t, device=x.device)
        if not guided or uncond is None:
            return network(x, timesteps, **cond)
        both = {name: torch.cat([value, uncond[name]]) for name, value in cond.items()}
        conditional, unconditional = network(torch.cat([x, x]), timesteps, **both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return output


def denoiser(output: Callable[[Tensor, float], Tensor], schedule: Schedule, prediction: Kind) -> Denoise:
    """Turns a network's prediction into denoise(x, t) -> (x_0, ε), in float32."""

    def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return separate(prediction, output(x, t).float(), x, *schedule.at(t))

    return denoise


def _solver(function: Solver) -> Solver:
    """Lets a solver check its times before it begins."""

    @functools.wraps(function)
    def checked(
        denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None
    ) -> Tensor:
        check_times(times)
        return function(denoise, x, schedule, times, noise)

    return checked


@_solver
def ddim(denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None) -> Tensor:
    """DDIM without noise (arXiv 2010.02502, equation 12): order 1. For `flow` it is Euler's method."""
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(x, t)
        alpha, sigma = schedule.at(s)
        x = alpha * x0 + sigma * eps
    return x


@_solver
def heun(denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None) -> Tensor:
    """The trapezoidal rule on dx = x_0 dα + ε dσ after a DDIM step: order 2, two evaluations a step.

    As in EDM (arXiv 2206.00364, algorithm 1), a last step to σ = 0 is left at order 1: there is no ε to average.
    """
    for t, s in zip(times, times[1:]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        x0, eps = denoise(x, t)
        proposal = alpha_s * x0 + sigma_s * eps
        if sigma_s > 0:
            x0_s, eps_s = denoise(proposal, s)
            x = x + (alpha_s - alpha_t) * (x0 + x0_s) / 2 + (sigma_s - sigma_t) * (eps + eps_s) / 2
        else:
            x = proposal
    return x


@_solver
def euler(
    denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None
) -> Tensor:
    """Euler's method in t on the probability-flow ODE (arXiv 2011.13456, equation 13): order 1."""
    for t, s in zip(times, times[1:]):
        d_alpha, d_sigma = schedule.derivative_at(t)
        x0, eps = denoise(x, t)
        x = x + (s - t) * (d_alpha * x0 + d_sigma * eps)
    return x


def fast_orders(num_evaluations: int) -> list[int]:
    """Returns the orders of DPM-Solver-fast's steps, 3 as often as the evaluations allow (arXiv 2206.00927, 3.4)."""
    threes, rest = divmod(num_evaluations, 3)
    if rest == 0:
        return [3] * (threes - 1) + [2, 1]
    return [3] * threes + [rest]


class _Point(NamedTuple):
    """A time of an exponential step: what it carries on, what it adds, and h, the way from the step's start."""

    t: float
    carried: float
    added: float
    h: float


def _exponential_step(estimate: Callable[[Tensor, float], Tensor], x: Tensor, points: Sequence[_Point]) -> Tensor:
    """One singlestep of order len(points) - 1, at most 3 (arXiv 2206.00927, section 3.3 and appendix B)."""
    start, *inner, end = points
    first = estimate(x, start.t)

    def reach(point: _Point, correction: Tensor | float = 0.0) -> Tensor:
        return (point.carried / start.carried) * x - point.added * (math.expm1(point.h) * first + correction)

    if not inner:
        return reach(end)
    r1 = inner[0].h / end.h
    change = estimate(reach(inner[0]), inner[0].t) - first
    if len(inner) == 1:
        return reach(end, math.expm1(end.h) / (2 * r1) * change)
    r2 = inner[1].h / end.h
    midway = reach(inner[1], r2 / r1 * (math.expm1(inner[1].h) / inner[1].h - 1) * change)
    change = estimate(midway, inner[1].t) - first
    return reach(end, (math.expm1(end.h) / end.h - 1) / r2 * change)


def _dpm_solver_fast(denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], of_noise: bool) -> Tensor:
    """Singlesteps whose evaluations are the grid's own times: one of order k goes from times[i] to times[i + k].

    In log-SNR λ the solution is α (x / α) plus an integral of e^{-λ} ε, or σ (x / σ) plus one of e^λ x_0: the same form
    with α and σ exchanged and the sign of h turned.
    """
    amplitudes = [schedule.at(t) for t in times]
    log_snr = [math.log(alpha / sigma) for alpha, sigma in amplitudes]

    def estimate(x: Tensor, t: float) -> Tensor:
        return denoise(x, t)[1 if of_noise else 0]

    start = 0
    for order in fast_orders(len(times) - 1):
        points = []
        for i in range(start, start + order + 1):
            (alpha, sigma), h = amplitudes[i], log_snr[i] - log_snr[start]
            points.append(_Point(times[i], alpha, sigma, h) if of_noise else _Point(times[i], sigma, alpha, -h))
        x = _exponential_step(estimate, x, points)
        start += order
    return x


@_solver
def dpm_solver_fast(
    denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None
) -> Tensor:
    """DPM-Solver-fast (arXiv 2206.00927, section 3.4): singlesteps of order up to 3 in ε. α and σ must not vanish."""
    return _dpm_solver_fast(denoise, x, schedule, times, of_noise=True)


@_solver
def dpmpp_fast(
    denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None
) -> Tensor:
    """DPM-Solver++ in x_0 (arXiv 2211.01095), singlesteps as in DPM-Solver-fast. α and σ must not vanish."""
    return _dpm_solver_fast(denoise, x, schedule, times, of_noise=False)


@_solver
def dpmpp_2m(
    denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): multistep, order 2, one evaluation a step."""
    previous: tuple[Tensor, float] | None = None  # x_0 and length in log-SNR of the step before
    for t, s in zip(times, times[1:]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        x0, _ = denoise(x, t)
        regular = alpha_t > 0 and sigma_s > 0
        step = math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t) if regular else math.inf
        estimate = x0
        if previous is not None and regular:
            before, step_before = previous
            estimate = x0 + (x0 - before) * (step / (2 * step_before))  # an infinite step before counts for nothing
        # α_s (1 - e^{-step}), written so that it holds for an infinite step too
        x = (sigma_s / sigma_t) * x + (alpha_s - alpha_t * sigma_s / sigma_t) * estimate
        previous = x0, step
    return x


@_solver
def unipc(
    denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None
) -> Tensor:
    """UniPC in x_0 with B(h) = e^h - 1 (arXiv 2302.04867, algorithms 1 and 2): multistep, one evaluation a step.

    It predicts as DPM-Solver++(2M) does, and corrects each step by the evaluation that the next one begins with: order
    3. A step that is infinite in log-SNR, from α = 0 or to σ = 0, is of order 1 and not corrected.
    """
    amplitudes = [schedule.at(t) for t in times]
    log_snr = [
        -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha / sigma) for alpha, sigma in amplitudes
    ]
    steps = [after - before for before, after in zip(log_snr, log_snr[1:])]
    estimates: dict[int, Tensor] = {}  # of x_0, at the last three times

    def advance(x: Tensor, i: int, correction: Tensor | float) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = amplitudes[i], amplitudes[i + 1]
        carried = sigma_s / sigma_t
        return carried * x + (alpha_s - alpha_t * carried) * (estimates[i] + correction)

    def has_past(i: int) -> bool:
        return i > 0 and math.isfinite(steps[i - 1]) and math.isfinite(steps[i])

    def past_change(i: int) -> Tensor:
        """The change of x_0 over step i if it goes on as in the step before."""
        return (estimates[i] - estimates[i - 1]) * (steps[i] / steps[i - 1])

    def correction(i: int) -> Tensor:
        """What step i should have added to its estimate of x_0, now that the one at its end is known."""
        change, h = estimates[i + 1] - estimates[i], steps[i]
        if not has_past(i):
            return change / 2
        # x_0 over the step is the parabola through three estimates; the exact step averages it with weight e^λ.
        curvature = (change - past_change(i)) / (1 + steps[i - 1] / h)
        mean = -1 / math.expm1(-h) - 1 / h
        mean_square = -1 / math.expm1(-h) - 2 / h * mean
        return change * mean + curvature * (mean_square - mean)

    start = x
    for i, t in enumerate(times[:-1]):
        estimates[i] = denoise(x, t)[0]
        estimates.pop(i - 3, None)
        if i > 0 and math.isfinite(steps[i - 1]):
            x = advance(start, i - 1, correction(i - 1))
        start = x
        x = advance(x, i, past_change(i) / 2 if has_past(i) else 0.0)
    return x


@_solver
def euler_maruyama(
    denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None
) -> Tensor:
    """Euler–Maruyama for the reverse SDE dx = [f x - g² ∇log p] dt + g dw (arXiv 2011.13456, equation 6): weak order 1.

    The last step adds no noise. α must not vanish at times[0], nor σ at any time but the last.
    """
    if noise is None:
        raise InputError("euler_maruyama needs a source of noise, got None")
    for t, s in zip(times, times[1:]):
        (alpha, sigma), (d_alpha, d_sigma) = schedule.at(t), schedule.derivative_at(t)
        g2 = 2 * sigma * (d_sigma - d_alpha / alpha * sigma)  # d(σ²)/dt - 2 f σ² with f = d(log α)/dt
        x0, eps = denoise(x, t)
        drift = d_alpha * x0 + (d_sigma + g2 / (2 * sigma)) * eps  # the ODE's, and -g²/2 ∇log p = g² ε / (2 σ)
        x = x + (s - t) * drift
        if s > times[-1]:
            x = x + math.sqrt(g2 * (t - s)) * noise()
    return x


SOLVERS: dict[SolverName, Solver] = {
    "ddim": ddim,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
    "dpmpp_fast": dpmpp_fast,
    "dpm_solver_fast": dpm_solver_fast,
    "euler": euler,
    "euler_maruyama": euler_maruyama,
}


class ImageNoise:
    """Standard normal noise, each image from its own generator: the same image at any batch size, on any device.

    Args:
        keys: for each image, the numbers that seed it.
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
        if self.device.type == "cuda":  # from pinned memory the copy does not wait for what the device has to do
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def sampling_times(process: ProcessConfig, config: SampleConfig) -> list[float]:
    """Returns the time grid of a process and a sampler's settings, clear of ends where a formula is singular.

    Raises:
        InputError: as time_grid, a solver that is not stable on the grid, or a grid finer than a discrete schedule.
    """
    times = _sampling_times(process, config)
    smallest, first = min(t for t in times if t > 0), SCHEDULES[process.schedule].first_time
    if smallest < first * (1 - 1e-6):
        begins = f"schedule {process.schedule!r} begins at time {first:g}"
        raise InputError(f"{begins}, got a grid with {smallest:g}: take fewer steps, or another t_end")
    return times


FAST_SOLVERS: tuple[SolverName, ...] = ("dpm_solver_fast", "dpmpp_fast")


def _is_stiff(process: ProcessConfig, sampler: SolverName) -> bool:
    """Where α(1) = 0 the drift of the reverse SDE and the steps in ε divide by α: only a grid in log-SNR keeps up."""
    return SCHEDULES[process.schedule].singular_start and sampler in (*FAST_SOLVERS, "euler_maruyama")


def resolve_spacing(process: ProcessConfig, config: SampleConfig) -> Spacing:
    """Returns the spacing of times that a sampler's settings mean; `auto` is the solver's own.

    Raises:
        InputError: a solver that is not stable on the spacing.
    """
    stiff = _is_stiff(process, config.sampler)
    if stiff and config.spacing == "uniform":
        raise InputError(f"{config.sampler} on schedule {process.schedule!r} needs spacing 'log_snr', got 'uniform'")
    if config.spacing != "auto":
        return config.spacing
    return "log_snr" if stiff or config.sampler == "dpm_solver_fast" else "uniform"


def _sampling_times(process: ProcessConfig, config: SampleConfig) -> list[float]:
    schedule, sampler, shift = SCHEDULES[process.schedule], config.sampler, process.time_shift
    spacing = resolve_spacing(process, config)
    divides_by_alpha = schedule.singular_start and (_is_stiff(process, sampler) or process.prediction == "noise")
    t_start = 1 - TIME_MARGIN if divides_by_alpha else 1.0

    if sampler in FAST_SOLVERS:
        t_end = config.t_end or TIME_MARGIN
        if sampler == "dpmpp_fast":  # its steps go from one time of the grid to the third after it
            return time_grid(schedule, config.num_steps, spacing, t_start, t_end, shift)
        # The grid is that of whole steps; each has its inner times at equal distances in log-SNR.
        orders = fast_orders(config.num_steps)
        outer = time_grid(schedule, len(orders), spacing, t_start, t_end, shift)
        parts = [time_grid(schedule, k, "log_snr", t, s) for k, t, s in zip(orders, outer, outer[1:])]
        return outer[:1] + [t for part in parts for t in part[1:]]
    if sampler in ("euler", "euler_maruyama") and spacing == "uniform" and not config.t_end and config.num_steps > 1:
        # σ'(t) grows without bound towards 0 for vp: the last slope is taken at TIME_MARGIN, as in the paper's runs.
        return [*time_grid(schedule, config.num_steps - 1, spacing, t_start, TIME_MARGIN, shift), 0.0]
    return time_grid(schedule, config.num_steps, spacing, t_start, config.t_end, shift)


@torch.no_grad()
def sample(
    network: Network,
    process: ProcessConfig,
    config: SampleConfig,
    noise: Noise,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None = None,
    on_evaluation: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Draws images.

    Args:
        network: network(x, timesteps, **cond), in eval mode.
        process: what the network was trained on.
        config: solver, steps, spacing and guidance.
        noise: source of (B, C, H, W) standard normal noise.
        cond: the network's condition, batches of B, such as {"y": labels}; {} for none.
        uncond: the same for the empty condition; needed with guidance.
        on_evaluation: called with the x_t, (B, C, H, W), of each evaluation of the network after it: for a progress
            bar, or to watch the denoising.

    Returns:
        (B, C, H, W) in float32, images in about [-1, 1].

    Raises:
        InputError: guidance without uncond, or a grid that cannot be made.
    """
    schedule = SCHEDULES[process.schedule]
    output = guide(network, schedule, cond, uncond, config.guidance, config.guidance_interval)
    denoise = denoiser(output, schedule, process.prediction)

    def counted(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        estimates = denoise(x, t)
        if on_evaluation is not None:
            on_evaluation(x)
        return estimates

    return SOLVERS[config.sampler](counted, noise(), schedule, sampling_times(process, config), noise)


def num_evaluations(process: ProcessConfig, config: SampleConfig) -> int:
    """Returns how often a solver asks the denoiser.

    Raises:
        InputError: as sampling_times.
    """
    *_, last = times = sampling_times(process, config)
    num_steps = len(times) - 1
    return 2 * num_steps - (last == 0) if config.sampler == "heun" else num_steps
