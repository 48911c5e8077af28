"""Grids of times, guidance, and sampling of Gaussian data by networks that know it."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from helpers.gaussian import MEAN, STD, gaussian_denoiser
from helpers.golden import ARRAYS, golden_model, rnd

from uvit.common.errors import InputError
from uvit.config import ProcessConfig, SampleConfig
from uvit.diffusion.process import SCHEDULES, TIME_MARGIN, Discrete, combine, shift_time
from uvit.diffusion.samplers import (
    ImageNoise,
    denoiser,
    guide,
    num_evaluations,
    resolve_spacing,
    sample,
    sampling_times,
    time_grid,
)
from uvit.diffusion.solvers import SOLVERS

DISCRETE = [name for name, schedule in SCHEDULES.items() if isinstance(schedule, Discrete)]


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        ("vp", {"spacing": "log_snr", "t_start": 5e-4}, "times must decrease"),
        ("ldm", {"spacing": "log_snr", "t_start": 1e-3}, "times must decrease"),
        ("flow", {"spacing": "log_snr", "t_end": 0.9995}, "times must decrease"),
        ("ldm", {"shift": 0.0}, "shift must be above 0, got 0.0"),
        ("ldm", {"spacing": "bogus"}, "spacing must be one of ('uniform', 'log_snr'), got 'bogus'"),
    ],
)
def test_invalid_grids_are_refused(schedule, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        time_grid(SCHEDULES[schedule], 3, **arguments)


def test_grids_of_the_fast_solvers():
    """DPM-Solver-fast spaces whole steps, their inner times in log-SNR; DPM-Solver++ takes one grid of all times."""
    schedule = SCHEDULES["vp"]
    for spacing in ("uniform", "log_snr"):
        config = SampleConfig(sampler="dpmpp_fast", num_steps=7, spacing=spacing, t_end=1e-3)
        assert sampling_times(ProcessConfig(schedule="vp"), config) == time_grid(schedule, 7, spacing, t_end=1e-3)
        config = SampleConfig(sampler="dpm_solver_fast", num_steps=7, spacing=spacing, t_end=1e-3)
        times = sampling_times(ProcessConfig(schedule="vp"), config)
        assert [times[i] for i in (0, 3, 6, 7)] == pytest.approx(time_grid(schedule, 3, spacing, t_end=1e-3))
        log_snr = [math.log(alpha / sigma) for alpha, sigma in map(schedule.at, times)]
        steps = [after - before for before, after in zip(log_snr, log_snr[1:])]
        assert steps[0:3] == pytest.approx([steps[0]] * 3) and steps[3:6] == pytest.approx([steps[3]] * 3)


def relative_error(ours, key):
    theirs = torch.from_numpy(ARRAYS[key])
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


GOLDEN_SAMPLERS = [
    ("euler_maruyama_ode_10", "tiny_uncond", "vp", SampleConfig(sampler="euler", num_steps=10)),
    (
        "dpm_solver_fast_10",
        "tiny_uncond",
        "vp",
        SampleConfig(sampler="dpm_solver_fast", num_steps=10, spacing="log_snr", t_end=1e-4),
    ),
    (
        "dpm_solver_pp_discrete_10_scale0.4",
        "tiny_class",
        "ldm",
        SampleConfig(sampler="dpmpp_fast", num_steps=10, t_end=1e-3, guidance=1.4),
    ),
]


@pytest.mark.parametrize(("key", "case", "name", "config"), GOLDEN_SAMPLERS, ids=[row[0] for row in GOLDEN_SAMPLERS])
def test_samplers_equal_the_reference(key, case, name, config):
    labels = torch.tensor([3, 10])
    cond = {"y": labels} if case == "tiny_class" else {}
    uncond = {"y": torch.full_like(labels, 10)} if cond else None
    process = ProcessConfig(schedule=name, prediction="noise")
    x_init = rnd("x_init", (2, 3, 8, 8))
    reached = sample(golden_model(case).eval(), process, config, lambda: x_init, cond, uncond)
    assert relative_error(reached, f"sampler/{key}") < 1e-4


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_grid_is_uniform_in_log_snr(name):
    times = time_grid(SCHEDULES[name], 10, "log_snr", t_end=0.01)
    steps = SCHEDULES[name].log_snr(torch.tensor(times, dtype=torch.float64)).diff()
    assert len(times) == 11 and times[-1] == pytest.approx(0.01)
    torch.testing.assert_close(steps, steps[:1].expand(10), rtol=5e-3, atol=0)


@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_grids_decrease_to_zero_with_as_many_steps_as_asked(name, spacing, num_steps):
    times = time_grid(SCHEDULES[name], num_steps, spacing)
    assert len(times) == num_steps + 1 and times[-1] == 0
    assert all(t > s for t, s in zip(times, times[1:]))


def test_grids_of_invalid_steps_and_times_are_refused():
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        time_grid(SCHEDULES["flow"], 0)
    with pytest.raises(InputError, match=r"got 0.2 and 0.5"):
        time_grid(SCHEDULES["flow"], 4, t_start=0.2, t_end=0.5)


class CountingNetwork:
    """A linear network that records the batch of each call."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, timesteps, y):
        self.batches.append(len(x))
        return x * (1 + y[:, None]) + timesteps[:, None]


def test_guidance_is_one_batch_and_the_formula():
    network, x = CountingNetwork(), torch.randn(3, 4)
    y, null = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    output = guide(network, SCHEDULES["flow"], {"y": y}, {"y": null}, scale=1.4)(x, 0.5)
    cond, uncond = x * (1 + y[:, None]) + 500, x + 500
    torch.testing.assert_close(output, 1.4 * cond + (1 - 1.4) * uncond)
    assert network.batches == [6]


def test_uncond_is_not_computed_without_guidance_or_outside_its_interval():
    network, x = CountingNetwork(), torch.randn(3, 4)
    y, null = torch.ones(3), torch.zeros(3)
    guide(network, SCHEDULES["flow"], {"y": y}, {"y": null}, scale=1.0)(x, 0.5)
    guided = guide(network, SCHEDULES["flow"], {"y": y}, {"y": null}, scale=2.0, interval=(0.2, 0.7))
    for t in (0.1, 0.2, 0.7, 0.8):
        guided(x, t)
    assert network.batches == [3, 3, 6, 6, 3]


def test_the_network_is_told_its_time_where_the_images_are():
    devices = []
    output = guide(lambda x, timesteps: devices.append(timesteps.device.type), SCHEDULES["flow"], {})
    output(torch.empty(2, 1, 4, 4, device="meta"), 0.5)
    assert devices == ["meta"]


def test_guidance_without_a_null_class():
    with pytest.raises(InputError, match=r"guidance 1.5 needs a model with a null class"):
        guide(CountingNetwork(), SCHEDULES["flow"], {"y": torch.ones(3)}, None, scale=1.5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", ["noise", "data", "v", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("spacing", ["auto", "log_snr"])
def test_every_combination_draws_gaussian_data(name, prediction, solver, spacing):
    """A network that knows the answer, told its time in its own units, in whatever prediction it was trained for."""
    schedule = SCHEDULES[name]

    def network(x, timesteps):
        first, last = schedule.network_time(0.0), schedule.network_time(1.0)
        t = (timesteps[0].item() - first) / (last - first)
        x0, eps = gaussian_denoiser(schedule)(x, t)
        return combine(prediction, x0, eps, *schedule.at(t))

    process = ProcessConfig(schedule=name, prediction=prediction)
    config = SampleConfig(sampler=solver, num_steps=200 if solver == "euler_maruyama" else 30, spacing=spacing)
    noise = ImageNoise([(0, k) for k in range(64)], (1, 8, 8), torch.device("cpu"))
    calls = []
    images = sample(network, process, config, noise, {}, on_evaluation=calls.append)
    assert images.mean().item() == pytest.approx(MEAN, abs=0.06)
    assert images.std().item() == pytest.approx(STD, rel=0.15)
    assert len(calls) == num_evaluations(process, config)
    assert all(x.shape == images.shape for x in calls)
    assert calls[0].std() > calls[-1].std()  # it begins in noise
    calls.clear()
    ending = dataclasses.replace(config, num_steps=4, t_end=0.01)
    sample(network, process, ending, noise, {}, on_evaluation=calls.append)
    assert len(calls) == num_evaluations(process, ending)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_takes_equal_steps_where_the_slope_of_the_noise_is_finite(schedule):
    process = ProcessConfig(schedule=schedule, prediction="data")
    times = sampling_times(process, SampleConfig(sampler="euler", num_steps=4))
    if schedule in ("flow", "cosine"):
        assert times == [1.0, 0.75, 0.5, 0.25, 0.0]
    else:  # σ grows as √t
        assert times[-2:] == [0.001, 0.0] and len(times) == 5
        assert sampling_times(process, SampleConfig(sampler="euler", num_steps=2)) == [1.0, 0.001, 0.0]
    assert sampling_times(process, SampleConfig(sampler="euler", num_steps=1)) == [1.0, 0.0]


@pytest.mark.parametrize("solver", ["euler_maruyama", "dpm_solver_fast", "dpmpp_fast"])
@pytest.mark.parametrize("name", ["iddpm", "cosine", "flow"])
def test_a_grid_on_which_a_solver_is_unstable_is_refused(name, solver):
    config = SampleConfig(sampler=solver, spacing="uniform")
    with pytest.raises(InputError, match=f"'{name}' needs spacing 'log_snr', got 'uniform'"):
        sampling_times(ProcessConfig(schedule=name), config)


def test_denoiser_inverts_the_prediction():
    schedule = SCHEDULES["cosine"]
    x0, eps = torch.randn(2, 3, 1, 2, 2)
    alpha, sigma = schedule.at(0.3)
    x = alpha * x0 + sigma * eps
    for kind in ("noise", "data", "v", "flow"):
        output = combine(kind, x0, eps, alpha, sigma)
        torch.testing.assert_close(denoiser(lambda x, t: output, schedule, kind)(x, 0.3), (x0, eps))  # noqa: B023


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_network_of_six_channels_draws_as_its_first_three(guidance):
    """ADM's networks predict the noise and, after it, a variance."""

    def noise(x, timesteps, y):
        return 0.8 * x + 1e-4 * timesteps[:, None, None, None] * y[:, None, None, None]

    def noise_and_variance(x, timesteps, y):
        predicted = noise(x, timesteps, y)
        return torch.cat([predicted, 100 - predicted], dim=1)

    process, config = ProcessConfig(schedule="ddpm", prediction="noise"), SampleConfig(guidance=guidance)
    x_init, labels = rnd("x_init", (2, 3, 8, 8)), {"y": torch.tensor([1.0, 2.0])}
    images = [
        sample(network, process, config, lambda: x_init, labels, {"y": torch.zeros(2)})
        for network in (noise, noise_and_variance)
    ]
    assert torch.equal(*images) and images[0].shape == x_init.shape


def test_noise_belongs_to_the_image_not_to_the_batch():
    keys, cpu = [(7, 0, k) for k in range(6)], torch.device("cpu")
    whole = ImageNoise(keys, (1, 4, 4), cpu)
    parts = [ImageNoise(keys[:1], (1, 4, 4), cpu), ImageNoise(keys[1:], (1, 4, 4), cpu)]
    for _ in range(3):
        assert torch.equal(whole(), torch.cat([part() for part in parts]))
    assert not torch.equal(whole()[0], whole()[0])
    first = ImageNoise([(7, 0, 3)], (1, 4, 4), cpu)()
    assert first.dtype == torch.float32  # numpy's own float32 numbers, which are others than its float64 ones
    assert np.array_equal(first[0], np.random.default_rng((7, 0, 3)).standard_normal((1, 4, 4), dtype=np.float32))


@pytest.mark.parametrize("shift", [0.1, 0.3, 3.0, 20.0])
def test_shifted_grids_keep_their_ends(shift):
    """A first time above 1 is outside the guidance interval; one within the margin would divide by almost 0."""
    times = time_grid(SCHEDULES["flow"], 8, t_start=1 - TIME_MARGIN, shift=shift)
    assert (times[0], times[-1]) == (1 - TIME_MARGIN, 0)
    assert all(t > s for t, s in zip(times, times[1:]))
    process = ProcessConfig(time_shift=shift)
    network, config = CountingNetwork(), SampleConfig(num_steps=3, guidance=2.0)
    sample(network, process, config, lambda: torch.randn(2, 4), {"y": torch.ones(2)}, {"y": torch.zeros(2)})
    assert network.batches == [4, 4, 4]
    assert sampling_times(process, config)[1] == pytest.approx(shift_time(torch.tensor(2 / 3), shift).item(), rel=1e-4)


def test_shifted_grids_are_uniform_before_the_shift():
    times = time_grid(SCHEDULES["flow"], 4, t_start=0.9, t_end=0.1, shift=3.0)
    before = torch.tensor([t / (3 - 2 * t) for t in times], dtype=torch.float64)  # t -> 3 t / (1 + 2 t) undone
    torch.testing.assert_close(before.diff(), (before[-1:] - before[0]).expand(4) / 4)
    # The steps of dpm_solver_fast are of orders 3, 3 and 2: they end at every third time.
    fast = SampleConfig(sampler="dpm_solver_fast", spacing="uniform", num_steps=8, t_end=0.1)
    found = sampling_times(ProcessConfig(schedule="vp", prediction="noise", time_shift=3.0), fast)
    assert [found[n] for n in (0, 3, 6, 8)] == pytest.approx(time_grid(SCHEDULES["vp"], 3, t_end=0.1, shift=3.0))
    inner = SCHEDULES["vp"].log_snr(torch.tensor(found[:4], dtype=torch.float64)).diff()
    torch.testing.assert_close(inner, inner[:1].expand(3))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_log_snr_grid_begins_exactly_where_it_should(name):
    singular = SCHEDULES[name].singular_start
    for t_start in (1.0, 0.7003):
        expected = min(t_start, 1 - TIME_MARGIN) if singular else t_start
        assert time_grid(SCHEDULES[name], 5, "log_snr", t_start=t_start)[0] == expected


def test_spacing_is_the_solvers_own_unless_given():
    def spacing(name, sampler, **given):
        return resolve_spacing(ProcessConfig(schedule=name, prediction="data"), SampleConfig(sampler=sampler, **given))

    assert spacing("vp", "dpm_solver_fast") == spacing("flow", "dpmpp_fast") == "log_snr"
    assert spacing("flow", "euler_maruyama") == "log_snr"
    assert spacing("vp", "euler_maruyama") == spacing("vp", "dpmpp_fast") == spacing("flow", "dpmpp_2m") == "uniform"
    assert spacing("vp", "dpm_solver_fast", spacing="uniform") == "uniform"
    assert spacing("flow", "dpmpp_2m", spacing="log_snr") == "log_snr"


def test_estimates_are_computed_in_single_precision():
    x, output = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4).bfloat16()
    found = denoiser(lambda x, t: output, SCHEDULES["ldm"], "noise")(x, 0.3)
    expected = denoiser(lambda x, t: output.float(), SCHEDULES["ldm"], "noise")(x, 0.3)
    assert all(torch.equal(ours, theirs) and ours.dtype == torch.float32 for ours, theirs in zip(found, expected))


def test_sampling_respects_the_guidance_interval():
    network = CountingNetwork()
    config = SampleConfig(num_steps=4, guidance=2.0, guidance_interval=(0.3, 0.8))
    sample(network, ProcessConfig(), config, lambda: torch.randn(2, 4), {"y": torch.ones(2)}, {"y": torch.zeros(2)})
    assert network.batches == [2, 4, 4, 2]  # at times 1, 0.75, 0.5 and 0.25


def test_sampling_keeps_clear_of_singular_ends():
    for name, schedule in SCHEDULES.items():
        first = {
            kind: sampling_times(ProcessConfig(schedule=name, prediction=kind), SampleConfig(num_steps=4))[0]
            for kind in ("noise", "v")
        }
        assert first == {"noise": 1 - TIME_MARGIN if schedule.singular_start else 1, "v": 1}


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_error_of_the_noise_does_not_drown_the_image(name):
    """No network is exact: at the first step, its error is divided by α."""
    schedule, generator = SCHEDULES[name], torch.Generator().manual_seed(0)

    def network(x, timesteps):
        start = schedule.network_time(0.0)
        t = (timesteps[0].item() - start) / (schedule.network_time(1.0) - start)
        return gaussian_denoiser(schedule)(x, t)[1] + 0.01 * torch.randn(x.shape, generator=generator)

    process = ProcessConfig(schedule=name, prediction="noise")
    noise = ImageNoise([(0, k) for k in range(64)], (1, 8, 8), torch.device("cpu"))
    images = sample(network, process, SampleConfig(num_steps=50), noise, {})
    assert images.std().item() == pytest.approx(STD, rel=0.1)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_networks_are_asked_at_times_they_were_trained_at(name):
    process, first = ProcessConfig(schedule=name, prediction="v"), SCHEDULES[name].network_time(0.001)
    whole = torch.tensor(sampling_times(process, SampleConfig(num_steps=1000))[:-1], dtype=torch.float64)
    expected = torch.arange(999, -1, -1, dtype=torch.float64) + first
    torch.testing.assert_close(SCHEDULES[name].network_time(whole), expected, rtol=0, atol=1e-9)
    for solver in SOLVERS:
        for spacing in ("auto", "log_snr"):
            times = sampling_times(process, SampleConfig(sampler=solver, spacing=spacing))
            assert SCHEDULES[name].network_time(min(t for t in times if t > 0)) > first - 1e-9
    for config in (SampleConfig(num_steps=1001), SampleConfig(t_end=1e-4)):
        with pytest.raises(InputError, match=f"schedule '{name}' begins at time 0.001, got a grid with"):
            sampling_times(process, config)
