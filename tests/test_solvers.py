"""Solvers against Gaussian data, where the solution is known in closed form."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers.gaussian import MEAN, gaussian_denoiser, spread

from uvit.common.errors import InputError
from uvit.diffusion.process import SCHEDULES, TIME_MARGIN
from uvit.diffusion.samplers import time_grid
from uvit.diffusion.solvers import SOLVERS, euler_maruyama, fast_orders

T_END = 0.01


def exact_solution(schedule, x, t, s):
    """The probability-flow ODE keeps an x at its place within the Gaussian."""
    standard = (x - schedule.at(t)[0] * MEAN) / spread(schedule, t)
    return schedule.at(s)[0] * MEAN + spread(schedule, s) * standard


def errors(solver, schedule, spacing, all_steps, t_end):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    found = []
    start = 1 - TIME_MARGIN if schedule is SCHEDULES["iddpm"] else 1.0  # before its last step, whose β is capped
    for num_steps in all_steps:
        times = time_grid(schedule, num_steps, spacing, start, t_end)
        reached = SOLVERS[solver](gaussian_denoiser(schedule), x, schedule, times)
        found.append((reached - exact_solution(schedule, x, times[0], times[-1])).abs().max().item())
    return found


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("euler", 1)])
def test_error_falls_at_the_solvers_order(name, spacing, solver, order):
    coarse, middle, fine = errors(solver, SCHEDULES[name], spacing, (80, 160, 320), T_END)
    for before, after in ((coarse, middle), (middle, fine)):
        assert order - 0.15 < math.log2(before / after) < order + 0.3
    assert fine < 1e-2 / 8**order * 8


@pytest.mark.parametrize("name", SCHEDULES)
def test_unipc_has_order_three(name):
    coarse, middle, fine = errors("unipc", SCHEDULES[name], "log_snr", (40, 80, 160), T_END)
    assert 2.8 < math.log2(coarse / middle) < 3.1 and 2.9 < math.log2(middle / fine) < 3.1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("solver", ["dpm_solver_fast", "dpmpp_fast"])
def test_fast_solvers_have_order_three(name, solver):
    """On 3 K + 2 evaluations: steps of order 3 and a last one of order 2, whose own error is of size h³."""
    schedule = SCHEDULES[name]
    start = 1 - TIME_MARGIN if schedule.singular_start else 1.0
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    found = []
    for num_steps in (62, 482):
        times = time_grid(schedule, num_steps, "log_snr", start, T_END)
        reached = SOLVERS[solver](gaussian_denoiser(schedule), x, schedule, times)
        found.append((reached - exact_solution(schedule, x, times[0], times[-1])).abs().max().item())
    # Over three doublings: a table's log α has kinks at its steps, which makes a single doubling uneven.
    assert 2.5 < math.log2(found[0] / found[1]) / 3 < 3.3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.1, 0.5, 0.9], "times must decrease within [0, 1], got 0.1 and then 0.5"),
        ([1.0, 0.5, 0.7, 0.1], "got 0.5 and then 0.7"),
        ([0.5, 0.5, 0.1], "got 0.5 and then 0.5"),
        ([1.5, 0.5], "got 1.5 and then 0.5"),
        ([0.5, -0.1], "got 0.5 and then -0.1"),
        ([], "a grid must have 2 times or more, got 0"),
    ],
)
def test_times_that_do_not_decrease_are_refused(solver, times, message):
    schedule = SCHEDULES["vp"]
    with pytest.raises(InputError, match=re.escape(message)):
        SOLVERS[solver](gaussian_denoiser(schedule), torch.zeros(3), schedule, times, lambda: torch.zeros(3))


def test_orders_of_fast_solvers_add_up():
    assert [fast_orders(n) for n in (1, 2, 3, 4, 10, 50)][:5] == [[1], [2], [2, 1], [3, 1], [3, 3, 3, 1]]
    assert all(sum(fast_orders(n)) == n for n in range(1, 60))


@pytest.mark.parametrize("name", ["cosine", "flow"])
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
def test_solvers_reach_clean_data(name, solver):
    """The last step to σ = 0 is exact enough too."""
    coarse, fine = errors(solver, SCHEDULES[name], "uniform", (40, 160), 0.0)
    assert fine < coarse / 3.5 < 0.03


@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_maruyama_has_weak_order_one(name):
    """The solver is affine in x and its noises, so its mean and variance follow exactly from unit inputs."""
    schedule = SCHEDULES[name]
    start = 1 - TIME_MARGIN if schedule.singular_start else 1.0
    found = []
    for num_steps in (100, 200, 400):
        times = time_grid(schedule, num_steps, "log_snr", start, T_END)
        rows = torch.zeros(num_steps + 2, dtype=torch.float64)
        rows[1] = 1.0  # row 0: nothing; row 1: a unit x; row 2 + i: a unit noise at step i
        units = iter(torch.eye(num_steps + 2, dtype=torch.float64)[2:])
        reached = euler_maruyama(gaussian_denoiser(schedule), rows, schedule, times, lambda: next(units))  # noqa: B023
        gains = reached - reached[0]
        mean = reached[0] + gains[1] * schedule.at(start)[0] * MEAN
        variance = (gains[1] * spread(schedule, start)) ** 2 + gains[2:].square().sum()
        mean_error = abs(mean.item() - schedule.at(T_END)[0] * MEAN)
        found.append((mean_error, abs(variance.item() - spread(schedule, T_END) ** 2)))
    for coarse, fine in zip(found, found[1:]):
        for before, after in zip(coarse, fine):
            exact = max(before, after) < 1e-12  # as the mean is for flow
            assert exact or 0.85 < math.log2(before / after) < 1.3
    assert max(found[-1]) < 0.02


def test_euler_maruyama_takes_the_reverse_sde_of_flow():
    """f = -1 / (1 - t) and g² = 2 t / (1 - t), and no noise in the last step."""
    schedule, x, z = SCHEDULES["flow"], torch.linspace(-2, 2, 9, dtype=torch.float64), 0.3
    draws = iter([torch.full_like(x, z)])
    expected = x
    for t, s in ((0.8, 0.5), (0.5, 0.1)):
        score = -gaussian_denoiser(schedule)(expected, t)[1] / t
        drift = -expected / (1 - t) - 2 * t / (1 - t) * score
        expected = expected + (s - t) * drift + (math.sqrt(2 * t / (1 - t) * (t - s)) * z if s > 0.1 else 0)
    found = euler_maruyama(gaussian_denoiser(schedule), x, schedule, [0.8, 0.5, 0.1], lambda: next(draws))
    torch.testing.assert_close(found, expected)


def test_unipc_corrects_its_first_step_by_the_trapezoid():
    """With B(h) = e^h - 1: the estimate over the step becomes the mean of those at its ends."""
    schedule, x = SCHEDULES["vp"], torch.linspace(-2, 2, 9, dtype=torch.float64)
    denoise, (t, s, end) = gaussian_denoiser(schedule), (0.9, 0.6, 0.3)

    def advance(x, x0, t, s):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        return sigma_s / sigma_t * x + (alpha_s - alpha_t * sigma_s / sigma_t) * x0

    first = denoise(x, t)[0]
    second = denoise(advance(x, first, t, s), s)[0]
    corrected = advance(x, (first + second) / 2, t, s)
    log_snr = [math.log(alpha / sigma) for alpha, sigma in map(schedule.at, (t, s, end))]
    ratio = (log_snr[2] - log_snr[1]) / (log_snr[1] - log_snr[0])
    expected = advance(corrected, second + (second - first) * ratio / 2, s, end)
    torch.testing.assert_close(SOLVERS["unipc"](denoise, x, schedule, [t, s, end]), expected)


def test_euler_maruyama_needs_noise():
    with pytest.raises(InputError, match="needs a source of noise"):
        euler_maruyama(gaussian_denoiser(SCHEDULES["vp"]), torch.zeros(1), SCHEDULES["vp"], [1.0, 0.0])


def test_ddim_is_euler_for_flow():
    schedule, x = SCHEDULES["flow"], torch.linspace(-2, 2, 9, dtype=torch.float64)
    denoise, times = gaussian_denoiser(schedule), time_grid(SCHEDULES["flow"], 7)
    euler = x
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(euler, t)
        euler = euler + (s - t) * (eps - x0)
    torch.testing.assert_close(SOLVERS["ddim"](denoise, x, schedule, times), euler)
