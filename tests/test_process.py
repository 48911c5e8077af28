from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from helpers.golden import ARRAYS

from uvit.config import ProcessConfig
from uvit.diffusion.process import SCHEDULES, Discrete, combine, sample_times, separate, shift_time
from uvit.diffusion.samplers import time_grid

STEPS = torch.arange(1, 1001, dtype=torch.float64)
KINDS = ["noise", "data", "v", "flow"]
DISCRETE = [name for name, schedule in SCHEDULES.items() if isinstance(schedule, Discrete)]
INSIDE = torch.linspace(0.01, 0.99, 41, dtype=torch.float64)


def test_vp_and_ldm_equal_the_reference():
    alpha, sigma = SCHEDULES["vp"].alpha_sigma(torch.from_numpy(ARRAYS["schedule/t"]).double())
    torch.testing.assert_close(alpha, torch.from_numpy(ARRAYS["schedule/vp_alpha"]).double(), rtol=1e-6, atol=1e-7)
    # theirs is sqrt(1 - α²) in fp32, which cancels for small t
    torch.testing.assert_close(sigma, torch.from_numpy(ARRAYS["schedule/vp_sigma"]).double(), rtol=1e-6, atol=2e-6)
    steps = torch.from_numpy(ARRAYS["schedule/n"]).double()
    alpha, sigma = SCHEDULES["ldm"].alpha_sigma(steps / 1000)
    torch.testing.assert_close(alpha, torch.from_numpy(ARRAYS["schedule/sd_alpha"]).double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sigma, torch.from_numpy(ARRAYS["schedule/sd_sigma"]).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_go_from_data_to_noise(name):
    schedule = SCHEDULES[name]
    assert schedule.at(0.0) == (1.0, 0.0)
    alpha, sigma = schedule.at(1.0)
    assert sigma > 0.99
    assert (schedule.log_snr(INSIDE).diff() < 0).all()
    if name != "flow":
        alpha, sigma = schedule.alpha_sigma(INSIDE)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_at_inverts_log_snr(name):
    schedule = SCHEDULES[name]
    on_grid = torch.arange(5, 1000, 5, dtype=torch.float64) / 1000
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(on_grid)), on_grid, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivatives(name):
    schedule, step = SCHEDULES[name], 1e-6
    for t in (0.1003, 0.5003, 0.9003):
        after, before = schedule.at(t + step), schedule.at(t - step)
        expected = [(a - b) / (2 * step) for a, b in zip(after, before)]
        assert schedule.derivative_at(t) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_round_trip(name, kind):
    alpha, sigma = SCHEDULES[name].alpha_sigma(INSIDE)
    x0, eps = torch.randn(2, *INSIDE.shape, dtype=torch.float64)
    x_t = alpha * x0 + sigma * eps
    again = separate(kind, combine(kind, x0, eps, alpha, sigma), x_t, alpha, sigma)
    torch.testing.assert_close(again, (x0, eps), rtol=1e-8, atol=1e-8)


def test_predictions_are_what_their_names_say():
    x0, eps = torch.randn(2, 5)
    alpha, sigma = 0.8, 0.6
    assert torch.equal(combine("noise", x0, eps, alpha, sigma), eps)
    assert torch.equal(combine("data", x0, eps, alpha, sigma), x0)
    torch.testing.assert_close(combine("v", x0, eps, alpha, sigma), alpha * eps - sigma * x0)
    torch.testing.assert_close(combine("flow", x0, eps, alpha, sigma), eps - x0)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_schedules_are_trained_at_their_steps_only(name):
    times = sample_times(ProcessConfig(schedule=name), 20_000, torch.device("cpu"), torch.Generator().manual_seed(0))
    steps = (times * 1000).round()
    torch.testing.assert_close(steps, times * 1000, rtol=0, atol=1e-3)
    assert steps.min() == 1 and steps.max() == 1000
    counts = torch.bincount(steps.long(), minlength=1001)[1:]
    assert counts.min() > 0 and counts.float().std() < 2 * 20**0.5


def test_time_distributions():
    generator = torch.Generator().manual_seed(0)
    uniform = sample_times(ProcessConfig(), 100_000, torch.device("cpu"), generator)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
    process = ProcessConfig(time_distribution="logit_normal", logit_mean=0.4, logit_std=1.2)
    logits = torch.logit(sample_times(process, 100_000, torch.device("cpu"), generator).double())
    assert logits.mean().item() == pytest.approx(0.4, abs=0.02)
    assert logits.std().item() == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_times_come_from_the_generator_alone(distribution):
    process = ProcessConfig(time_distribution=distribution)
    first, again, other = (
        sample_times(process, 5, torch.device("cpu"), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    with torch.device("meta"):  # not on the default device
        assert sample_times(process, 5, torch.device("cpu"), torch.Generator("cpu")).device.type == "cpu"


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_of_a_table_are_its_steps_and_nothing_between(name):
    schedule = SCHEDULES[name]
    times = torch.tensor([0.0, 1e-4, 0.0011, 0.5, 0.9999, 1.0], dtype=torch.float64)
    discrete = torch.tensor([0.001, 0.001, 0.002, 0.5, 1.0, 1.0], dtype=torch.float64)
    assert torch.equal(schedule.snap(times), discrete if name in DISCRETE else times)
    if name in DISCRETE:  # also at the ends of its table, beyond which log-SNR has no time
        ends = torch.tensor([0.001, 0.0015, 0.9995, 1.0], dtype=torch.float64)
        torch.testing.assert_close(schedule.time_at(schedule.log_snr(ends)), ends, rtol=0, atol=3e-4)
        assert schedule.time_at(schedule.log_snr(ends[[0, 3]])).tolist() == pytest.approx([0.001, 1.0], abs=1e-9)


def test_time_shift_keeps_the_ends_and_scales_the_log_snr_of_flow():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    assert shifted.tolist() == pytest.approx([0, 0.5, 0.75, 1])
    flow = SCHEDULES["flow"]
    torch.testing.assert_close(flow.log_snr(shifted[1:3]), flow.log_snr(t[1:3]) - torch.tensor(3.0).double().log())
    assert time_grid(flow, 4, shift=3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ldm", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("ddpm", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("iddpm", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_tables_equal_those_of_diffusers(name, fields):
    betas = DDPMScheduler(**fields).betas.double()  # of float32
    torch.testing.assert_close(SCHEDULES[name].betas, betas, rtol=1e-6, atol=0)
    alpha, _ = SCHEDULES[name].alpha_sigma(STEPS / 1000)
    # The last 1 - β of iddpm, 0.001, is rounded to 3e-5 of itself, where α² is 2e-9.
    torch.testing.assert_close(alpha.square(), (1 - betas).cumprod(0), rtol=1e-6, atol=1e-13)


def test_iddpm_is_a_squared_cosine_but_for_its_last_step():
    """Its βs are defined by their product, which needs no table (Nichol & Dhariwal, arXiv 2102.09672, equation 17)."""
    alpha, _ = SCHEDULES["iddpm"].alpha_sigma(STEPS / 1000)
    angle = (torch.cat([torch.zeros(1).double(), STEPS / 1000]) + 0.008) / 1.008 * (torch.pi / 2)
    torch.testing.assert_close(alpha[:-1], (angle.cos() / angle.cos()[0])[1:-1], rtol=1e-9, atol=0)
    assert (alpha[-1] / alpha[-2]).item() == pytest.approx(0.001**0.5)


@pytest.mark.parametrize(("name", "first"), [("ldm", 1), ("ddpm", 0), ("iddpm", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_discrete_network_counts_its_steps(name, first, dtype):
    schedule = SCHEDULES[name]
    assert schedule.network_time(schedule.first_time) == first
    times = schedule.network_time((STEPS / 1000).to(dtype))
    torch.testing.assert_close(times, (STEPS - 1 + first).to(dtype), rtol=1e-6, atol=0)
    assert times.min() == first


def test_networks_of_continuous_schedules_are_told_a_multiple_of_the_time():
    for name, scale in {"vp": 999, "cosine": 1000, "flow": 1000}.items():
        assert SCHEDULES[name].network_time(0.25) == scale / 4
        assert torch.equal(SCHEDULES[name].network_time(INSIDE), scale * INSIDE)


def test_starts_from_which_noise_gives_no_image():
    """There α is 0, or for iddpm 5e-5; of vp and ddpm it is 6e-3."""
    assert [name for name, schedule in SCHEDULES.items() if schedule.singular_start] == ["iddpm", "cosine", "flow"]
