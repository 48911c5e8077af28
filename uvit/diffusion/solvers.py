"""Solvers, as pure functions with one signature.

A solver is `solver(denoise, x, schedule, times, noise)`: it takes x from times[0] to times[-1], calling `denoise(x, t)`
for the estimates (x_0, ε); `average` calls `denoise(x, t, s)` for those of a straight way from t to s. Times are Python
floats, so that no step waits for the device.

The probability-flow ODE is dx = x_0 dα + ε dσ for every schedule (differentiate x = α x_0 + σ ε at fixed x_0, ε), which
needs no derivative of the schedule and has no singular end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import SolverName
from uvit.diffusion.process import Schedule

Denoise = Callable[..., tuple[Tensor, Tensor]]
Noise = Callable[[], Tensor]
Solver = Callable[..., Tensor]


def check_times(times: Sequence[float]) -> None:
    """Checks that there are two or more times, decreasing within [0, 1].

    Raises:
        InputError: fewer times, or the first two that do not decrease.
    """
    if len(times) < 2:
        raise InputError(f"a grid must have 2 times or more, got {len(times)}")
    for t, s in zip(times, times[1:]):
        if not 1 >= t > s >= 0:
            raise InputError(f"times must decrease within [0, 1], got {t:g} and then {s:g}")


def _solver(function: Solver) -> Solver:
    """Makes a solver check its times first."""

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

    As in EDM (arXiv 2206.00364, algorithm 1), a last step to σ = 0 stays at order 1: there is no ε to average.
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
    """Returns the orders of DPM-Solver-fast's steps, as many of order 3 as possible (arXiv 2206.00927, section 3.4)."""
    threes, rest = divmod(num_evaluations, 3)
    if rest == 0:
        return [3] * (threes - 1) + [2, 1]
    return [3] * threes + [rest]


class _Point(NamedTuple):
    """A time in an exponential step, with the factors of x and of the estimate, and h, the distance from its start."""

    t: float
    x_factor: float
    estimate_factor: float
    h: float


def _exponential_step(estimate: Callable[[Tensor, float], Tensor], x: Tensor, points: Sequence[_Point]) -> Tensor:
    """One singlestep of order len(points) - 1, at most 3 (arXiv 2206.00927, section 3.3 and appendix B)."""
    start, *inner, end = points
    first = estimate(x, start.t)

    def reach(point: _Point, correction: Tensor | float = 0.0) -> Tensor:
        decay = point.x_factor / start.x_factor
        return decay * x - point.estimate_factor * (math.expm1(point.h) * first + correction)

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
    """Singlesteps that evaluate at the times of the grid: one of order k goes from times[i] to times[i + k].

    In log-SNR λ, the solution is α (x / α) plus an integral of e^{-λ} ε, or σ (x / σ) plus one of e^λ x_0: the same
    form with α and σ swapped and the sign of h flipped.
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
    previous: tuple[Tensor, float] | None = None  # x_0 and step size in log-SNR of the previous step
    for t, s in zip(times, times[1:]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        x0, _ = denoise(x, t)
        regular = alpha_t > 0 and sigma_s > 0
        step = math.log(alpha_s / sigma_s) - math.log(alpha_t / sigma_t) if regular else math.inf
        estimate = x0
        if previous is not None and regular:
            x0_before, step_before = previous
            estimate = x0 + (x0 - x0_before) * (step / (2 * step_before))  # a previous infinite step has no effect
        # α_s (1 - e^{-step}), in a form that also holds for an infinite step
        x = (sigma_s / sigma_t) * x + (alpha_s - alpha_t * sigma_s / sigma_t) * estimate
        previous = x0, step
    return x


@_solver
def unipc(
    denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None
) -> Tensor:
    """UniPC in x_0 with B(h) = e^h - 1 (arXiv 2302.04867, algorithms 1 and 2): multistep, one evaluation a step.

    It predicts like DPM-Solver++(2M), and corrects each step with the evaluation that starts the next one: order 3. A
    step that is infinite in log-SNR, from α = 0 or to σ = 0, is of order 1 and not corrected.
    """
    amplitudes = [schedule.at(t) for t in times]
    log_snr = [
        -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha / sigma) for alpha, sigma in amplitudes
    ]
    steps = [after - before for before, after in zip(log_snr, log_snr[1:])]
    estimates: dict[int, Tensor] = {}  # of x_0, at the last three times

    def advance(x: Tensor, i: int, correction: Tensor | float) -> Tensor:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = amplitudes[i], amplitudes[i + 1]
        decay = sigma_s / sigma_t
        return decay * x + (alpha_s - alpha_t * decay) * (estimates[i] + correction)

    def has_past(i: int) -> bool:
        return i > 0 and math.isfinite(steps[i - 1]) and math.isfinite(steps[i])

    def past_change(i: int) -> Tensor:
        """The change of x_0 over step i, extrapolated from the step before."""
        return (estimates[i] - estimates[i - 1]) * (steps[i] / steps[i - 1])

    def correction(i: int) -> Tensor:
        """The correction to step i's estimate of x_0, given the estimate at its end."""
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


@_solver
def average(
    denoise: Denoise, x: Tensor, schedule: Schedule, times: Sequence[float], noise: Noise | None = None
) -> Tensor:
    """Each step by the average velocity over it: x_s = x_t - (t - s) u (arXiv 2505.13447, section 4). For `flow`.

    It is exact where u is, whatever the steps.
    """
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(x, t, s)
        x = (1 - s) * x0 + s * eps
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
"""Those that need the estimates of an instant."""
ALL_SOLVERS = {**SOLVERS, "average": average}
